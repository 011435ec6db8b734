"""How fast this machine quantises: a self-test of each kind of work (work.py), and what follows for a model.

    speed = measure_speed(ModelSizes.of(description, length, layer_bytes), recipe)
    seconds = predict(work, speed)                                    # step -> seconds

Every kind is timed with the functions that will do it, on random matrices of the model's sizes, as far as these are
small: what a matrix takes grows with its weights, its products and no other way. Expert by expert work is timed as it
will run, on as many threads, several experts side by side where that is how a layer's are. Each time is the least of
several: other programs can only add to it.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_mcmoe.calibration.common.device import bfloat16_products, multiplies_in_bfloat16
from vllm_mcmoe.calibration.common.files import sha256_of, write_atomically
from vllm_mcmoe.calibration.common.threads import side_by_side
from vllm_mcmoe.calibration.evaluate.work import Work, attention_products, factor_products, upper_triangle
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions, HessianFactor, quantize_gptq
from vllm_mcmoe.calibration.matrix.grids import QuantizedMatrix, quantize_rtn
from vllm_mcmoe.calibration.matrix.second_moment import SecondMoment
from vllm_mcmoe.calibration.matrix.trellis import QuantizedTrellis
from vllm_mcmoe.calibration.matrix.two_sided import COUPLED_ROWS, OutputHessian
from vllm_mcmoe.calibration.measure.expert_tokens import CHUNK_TOKENS, experts_at_once
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.experts import Expert
from vllm_mcmoe.calibration.model.layerwise import BATCH_TOKENS
from vllm_mcmoe.calibration.recipes import Recipe
from vllm_mcmoe.kernels.expert_function import ExpertFunction
from vllm_mcmoe.kernels.packing import GROUP_SIZE

LARGEST_COLUMNS, LARGEST_ROWS = 2048, 1024  # of a layer's matrices
EXPERT_WEIGHTS = 1 << 24  # of a layer's experts together
ATTENTION_HEADS = 4
HESSIAN_COLUMNS = 2560
SQUARE = 1024  # sides of a product in float64
GPTQ_ROWS, GPTQ_COLUMNS, WIDE = COUPLED_ROWS, 768, 2048
FILE_WEIGHTS = 1 << 23
SWEEPS = 2  # timed at once; not so many that they converge
BITS = 2
LEAST_SHARE = 0.1  # of a time, that a part of it has which is known from a difference
REPEATED = 2
SHORTEST, LONG = 0.02, 0.2  # seconds: what is timed lasts, by repetition; is timed but once


@dataclass(frozen=True)
class Speed:
    """Seconds of one unit of every kind of work, as the whole machine does it."""

    linear: float
    expert: float
    backward: float
    score: float
    moment: float
    factor: float
    entry: float
    update: float
    coupling: float
    first: float
    swept: float
    rounded: float
    read: float
    decoded: float
    written: float


# One core of a Sapphire Rapids: what follows is how long parts of a run are in proportion to each other.
_TYPICAL = Speed(
    linear=1.0e-11, expert=1.1e-11, backward=1.2e-11, score=1.5e-11, moment=1.1e-11, factor=4e-11, entry=1.2e-8,
    update=1.1e-11, coupling=1.0e-10, first=5.5e-8, swept=1.5e-8, rounded=6e-9, read=4e-9, decoded=4e-9, written=4e-9,
)  # fmt: skip
_ROUNDED_PRODUCTS = {
    "linear": 3.6e-12, "expert": 4e-12, "backward": 5e-12, "score": 8e-12, "moment": 6e-12, "update": 4e-12,
}  # fmt: skip


def typical_speed(rounds: bool) -> Speed:
    """Of a machine that nothing is known of. rounds: whether products are in bfloat16, by AMX."""
    return replace(_TYPICAL, **_ROUNDED_PRODUCTS) if rounds else _TYPICAL


def predict(work: Work, speed: Speed) -> dict[str, float]:
    """Step -> seconds, of the whole model."""
    return {
        step: sum(amount * getattr(speed, kind) for kind, amount in amounts.items())
        for step, amounts in asdict(work).items()
    }


@dataclass(frozen=True)
class ModelSizes:
    """Of the model that is to be quantised, as far as speed depends on them.

    hidden, intermediate   of an expert, or less
    experts                of a layer
    may_round              whether bfloat16_products are for such a model, on this machine
    function               of its experts
    expert_tokens          that each gets of a batch, on average
    head_size, length      of attention, and
    eager                  whether it is computed by its definition
    at_once                experts that are worked on side by side
    """

    hidden: int
    intermediate: int
    experts: int
    may_round: bool
    function: ExpertFunction
    expert_tokens: int
    head_size: int
    length: int
    eager: bool
    at_once: int

    @classmethod
    def of(cls, description: MoeModel, length: int, layer_bytes: int) -> Self:
        """layer_bytes: of a decoder layer in float32; length: of a calibration sequence."""
        config, cpu = description.config, torch.device("cpu")
        tokens = max(BATCH_TOKENS, length) * description.top_k // description.num_experts
        return cls(
            min(description.hidden, LARGEST_COLUMNS),
            min(description.intermediate, LARGEST_ROWS),
            description.num_experts,
            multiplies_in_bfloat16(cpu, description.hidden),
            description.function,
            max(1, tokens),
            getattr(config, "head_dim", None) or description.hidden // config.num_attention_heads,
            length,
            config._attn_implementation == "eager",
            experts_at_once(description, cpu, layer_bytes),
        )


def measure_speed(sizes: ModelSizes, recipe: Recipe, known: Speed | None = None) -> Speed:
    """Takes some seconds; the first time on a machine longer, since loops are compiled. known: of a recipe that differs
    in its products alone, if at all, so that no more than these are timed."""
    allowed = recipe.bfloat16_products and sizes.may_round
    with torch.no_grad(), bfloat16_products(allowed), tempfile.TemporaryDirectory() as directory:
        test = _SelfTest(sizes, recipe.gptq)
        products = test.products()
        if known is not None:
            return replace(known, **products)
        loops = test.quantising(products)
        return Speed(**products, **test.factors(), **loops, **test.files(Path(directory) / "test.safetensors"))


class _SelfTest:
    """Seconds of a unit, by kind. What quantising gives is then packed and written."""

    def __init__(self, sizes: ModelSizes, options: GPTQOptions):
        self.sizes, self.options = sizes, options
        self.generator = torch.Generator().manual_seed(0)
        self.x = self._random(CHUNK_TOKENS, HESSIAN_COLUMNS)
        self.hessian = SecondMoment.of([self.x]).matrix()

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _of_experts(self, piece: Callable[[], object]) -> float:
        """Seconds per piece, when as many run as experts are worked on side by side."""

        def run(_: int) -> None:
            with torch.no_grad():
                piece()

        pieces = range(min(self.sizes.at_once, torch.get_num_threads()))
        return _seconds(lambda: side_by_side(run, pieces, self.sizes.at_once)) / len(pieces)

    def products(self) -> dict[str, float]:
        sizes = self.sizes
        weight = self._random(LARGEST_ROWS, sizes.hidden)
        x = self._random(BATCH_TOKENS, sizes.hidden)
        experts = self._experts()
        used = len(experts) * sizes.expert_tokens * (experts[0].gate_up.numel() + experts[0].down.numel())

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            """As transformers' modules of experts do it."""
            output = torch.zeros_like(hidden)
            for number, expert in enumerate(experts):
                tokens = (number + torch.arange(sizes.expert_tokens)) % len(hidden)
                output = output.index_add(0, tokens, expert(hidden[tokens]) * 0.5)
            return output

        def backward() -> None:
            hidden = x.clone().requires_grad_()
            with torch.enable_grad():
                forward(hidden).backward(x)

        q, k, v = (self._random(1, ATTENTION_HEADS, sizes.length, sizes.head_size) for _ in range(3))
        attend = _attention_by_definition if sizes.eager else partial(F.scaled_dot_product_attention, is_causal=True)
        scores = attention_products(sizes.length, 2 * ATTENTION_HEADS * sizes.head_size)
        moment, token_weights = SecondMoment.of([self.x]), torch.rand(CHUNK_TOKENS, generator=self.generator)
        change, block = self._random(GPTQ_ROWS, GROUP_SIZE), self._random(GROUP_SIZE, WIDE)
        wide = torch.zeros(GPTQ_ROWS, WIDE)
        moments = CHUNK_TOKENS * upper_triangle(HESSIAN_COLUMNS)
        return {
            "linear": _seconds(lambda: F.linear(x, weight)) / (len(x) * weight.numel()),
            "expert": _seconds(lambda: forward(x)) / used,
            "backward": _seconds(backward) / (2 * used),
            "score": _seconds(lambda: attend(q, k, v)) / scores,
            "moment": self._of_experts(lambda: moment.add(self.x, token_weights)) / moments,
            "update": self._of_experts(lambda: wide.addmm_(change, block)) / (change.numel() * WIDE),
        }

    def _experts(self) -> list[Expert]:
        """So many that no cache holds their weights, as if they were all of a layer's."""
        sizes = self.sizes
        gate_up = self._random(sizes.intermediate * sizes.function.factor, sizes.hidden) / sizes.hidden**0.5
        down = self._random(sizes.hidden, sizes.intermediate)
        count = min(sizes.experts, max(2, EXPERT_WEIGHTS // (gate_up.numel() + down.numel())))
        return [Expert(sizes.function, False, gate_up.clone(), down.clone(), None, None) for _ in range(count)]

    def factors(self) -> dict[str, float]:
        """Large products are what a large Hessian's factor takes, at float32's speed: half of float64's time, which no
        setting rounds. What the timed one takes beside that grows with its entries. (So 0.48 s of 3072 columns give
        the 19.6 s that 14,336 took, and 4.8 for 5.6 s of 8192.)"""
        matrix = self._random(SQUARE, SQUARE).double()
        product = self._of_experts(partial(torch.mm, matrix, matrix)) / (2 * SQUARE**3)
        building = self._of_experts(lambda: HessianFactor.build(SecondMoment.of([self.x[:1]]).matrix(), self.options))
        entry = (building - product * factor_products(HESSIAN_COLUMNS)) / HESSIAN_COLUMNS**2
        return {"factor": product, "entry": max(entry, LEAST_SHARE * building / HESSIAN_COLUMNS**2)}

    def quantising(self, products: Mapping[str, float]) -> dict[str, float]:
        """Differences between a matrix quantised without sweeps, with some, and with others, less their products."""
        rows, columns = GPTQ_ROWS, GPTQ_COLUMNS
        weight, factor = (
            self._random(rows, columns),
            HessianFactor.build(self.hessian[:columns, :columns], self.options),
        )
        outputs = OutputHessian.build([torch.arange(rows)], [self.hessian[:rows, :rows]], CHUNK_TOKENS)
        weights, update, linear = weight.numel(), products["update"], products["linear"]

        def quantise(sweeps: int, output_sweeps: int) -> QuantizedMatrix | QuantizedTrellis:
            options = replace(self.options, refinement_sweeps=sweeps, output_sweeps=output_sweeps)
            return quantize_gptq(weight, factor, BITS, options, outputs=outputs if output_sweeps else None)

        self.matrix = quantise(0, 0)
        first, separate, coupled = (
            self._of_experts(partial(quantise, *sweeps)) for sweeps in ((0, 0), (SWEEPS, 0), (0, SWEEPS))
        )
        least = LEAST_SHARE * separate / SWEEPS  # of noisy timings a difference may be nothing, or less
        swept = (separate - first - linear * weights * columns) / SWEEPS
        coupling = (coupled - separate) / SWEEPS - linear * weights * rows
        search = "mse" if self.options.mse_search and not self.options.compensate else "minmax"
        rounded = self._of_experts(
            lambda: quantize_rtn(weight, BITS, search=search, metadata=self.options.metadata).dequantize()
        )
        return {
            "first": max(first - update * weights * columns / 2, LEAST_SHARE * first) / weights,
            "swept": max(swept - update * weights * (columns + 2 * GROUP_SIZE), least) / weights,
            "coupling": max(coupling, least) / (weights * rows),
            "rounded": rounded / weights,
        }

    def files(self, path: Path) -> dict[str, float]:
        """From the page cache: a slow disk, or the hub, comes on top."""
        stored, matrix = self._random(FILE_WEIGHTS).bfloat16(), self.matrix
        write_atomically(path, lambda temporary: save_file({"weight": stored}, temporary))
        weights, columns = GPTQ_ROWS * GPTQ_COLUMNS, GPTQ_COLUMNS

        def keep(tensor: torch.Tensor) -> None:
            tensor.aminmax()
            torch.empty(tensor.shape).copy_(tensor.float())  # memory that nothing has been in, as a layer's

        def read() -> None:
            with safe_open(path, framework="pt") as file:
                keep(file.get_tensor("weight"))

        reading, packed = _seconds(read), matrix.pack()

        def write() -> None:
            write_atomically(path, lambda temporary: save_file({"qweight": matrix.pack().qweight}, temporary))
            sha256_of(path)

        return {
            "read": reading / FILE_WEIGHTS,
            "decoded": _seconds(lambda: keep(packed.dequantize(in_features=columns))) / weights,
            "written": _seconds(write) / weights,
        }


def _attention_by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2)
    scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
    return scores.softmax(-1) @ v


def _seconds(piece: Callable[[], object]) -> float:
    """The least of several, after one that does not count: of one thread in CPU time, which others do not add to."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = now()
    piece()
    repeated = REPEATED if now() - started < LONG else 1
    least = float("inf")
    for _ in range(repeated):
        count, started = 0, now()
        while count == 0 or now() - started < SHORTEST:
            piece()
            count += 1
        least = min(least, (now() - started) / count)
    return least
