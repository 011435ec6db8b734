"""A layer of a released model's true sizes: its parts timed one by one, and added up by how many there are.

    python benchmarks/true_sizes.py                                    # Mixtral-8x7B, Qwen3-30B-A3B; 10 minutes, 9 GB
    python benchmarks/true_sizes.py --models Qwen3-30B-A3B --codes scalar trellis
    python benchmarks/true_sizes.py --threads                          # are two threads twice as fast as one?

Times are CPU seconds of one thread: of the real functions, on matrices of the model's columns and at most --rows of its
rows, all of which take the same. The layer itself, with random weights, runs one batch forwards, up to its experts, and
backwards. Counts are those of the default 128 x 2048 calibration tokens. What is not timed here is predicted
(calibration/evaluate/speed.py).
"""

import argparse
import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from quantising_work import CONFIGS

from vllm_mcmoe.calibration.common.device import bfloat16_products, multiplies_in_bfloat16
from vllm_mcmoe.calibration.common.threads import side_by_side
from vllm_mcmoe.calibration.evaluate.times import predict_times
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions, HessianFactor, quantize_gptq
from vllm_mcmoe.calibration.matrix.second_moment import SecondMoment
from vllm_mcmoe.calibration.matrix.two_sided import COUPLED_ROWS, OutputHessian
from vllm_mcmoe.calibration.measure.expert_errors import MEASURED_TOKENS, measures_some_rows
from vllm_mcmoe.calibration.measure.expert_tokens import CHUNK_TOKENS
from vllm_mcmoe.calibration.model.description import MoeModel, describe_model
from vllm_mcmoe.calibration.model.experts import Expert
from vllm_mcmoe.calibration.model.layerwise import BATCH_TOKENS, skeleton
from vllm_mcmoe.calibration.recipes import Effort, Recipe, find_recipe

SEQUENCES, LENGTH = 128, 2048
TOKENS = SEQUENCES * LENGTH
BITS, SWEEPS = 2, 2


def cpu_seconds(piece: Callable[[], object]) -> float:
    started = time.process_time()
    piece()
    return time.process_time() - started


@dataclass
class MatrixTimes:
    """Of gate_up or down, in CPU seconds: a chunk of tokens into the Hessian, the factor, and of a row GPTQ, a sweep,
    and a sweep under the Hessian of outputs."""

    chunk: float
    factor: float
    gptq: float
    sweep: float
    output_sweep: float


def time_matrix(rows: int, columns: int, options: GPTQOptions) -> MatrixTimes:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    x, moment = torch.randn(CHUNK_TOKENS, columns, generator=generator), SecondMoment()
    moment.add(x)
    chunk = cpu_seconds(lambda: moment.add(x, torch.rand(len(x))))
    found: list[HessianFactor] = []
    factor = cpu_seconds(lambda: found.append(HessianFactor.build(moment.matrix(), options)))
    blocks = [torch.arange(first, min(first + COUPLED_ROWS, rows)) for first in range(0, rows, COUPLED_ROWS)]
    gradients = torch.randn(CHUNK_TOKENS, rows, generator=generator)
    outputs = OutputHessian.build(blocks, [gradients[:, b].t() @ gradients[:, b] for b in blocks], CHUNK_TOKENS)

    def quantise(sweeps: int, output_sweeps: int) -> float:
        chosen = replace(options, refinement_sweeps=sweeps, output_sweeps=output_sweeps)
        return cpu_seconds(lambda: quantize_gptq(weight, found[0], BITS, chosen, outputs=outputs))

    quantise(1, 1)  # what is compiled is compiled now
    gptq, swept, coupled = quantise(0, 0), quantise(SWEEPS, 0), quantise(0, SWEEPS)
    return MatrixTimes(chunk, factor, gptq / rows, (swept - gptq) / SWEEPS / rows, (coupled - gptq) / SWEEPS / rows)


@dataclass
class LayerTimes:
    """Of a batch, in CPU seconds: through the layer, all of it but its experts, and through it forwards and
    backwards."""

    forward: float
    others: float
    backward: float


def time_layer(description: MoeModel) -> LayerTimes:
    """Of transformers' own layer, with random weights."""
    config = copy.deepcopy(description.config)
    config.num_hidden_layers, config.vocab_size = 1, 32
    model = skeleton(replace(description, config=config)).model.to_empty(device="cpu").requires_grad_(False)
    model.rotary_emb = type(model.rotary_emb)(config)
    few = torch.randn(1 << 16) * 0.02
    for weight in model.parameters():
        weight.flatten().copy_(few.repeat(-(-weight.numel() // len(few)))[: weight.numel()])
    experts = model.layers[0].get_submodule(description.family.moe_module).experts
    x = torch.randn(BATCH_TOKENS // LENGTH, LENGTH, description.hidden)

    def forward() -> None:
        model(inputs_embeds=x, use_cache=False)

    def backward() -> None:
        batch = x.clone().requires_grad_()
        with torch.enable_grad():
            model(inputs_embeds=batch, use_cache=False).last_hidden_state.backward(x)

    with torch.no_grad():
        forward()
        forwards, backwards = cpu_seconds(forward), cpu_seconds(backward)
        experts.forward = lambda x, ids, weights: torch.zeros_like(x)
        return LayerTimes(forwards, cpu_seconds(forward), backwards)


def time_intermediate(description: MoeModel) -> float:
    """Of a chunk of an expert's tokens, up to the intermediate."""
    rows, columns = description.part_shapes()["gate_up"]
    expert = Expert(description.function, False, torch.randn(rows, columns), torch.zeros(1, 1), None, None)
    x = torch.randn(CHUNK_TOKENS, columns)
    expert.intermediate(x)
    return cpu_seconds(lambda: expert.intermediate(x))


def minutes(
    description: MoeModel, recipe: Recipe, layer: LayerTimes, of: dict[str, MatrixTimes], intermediate: float
) -> Counter[str]:
    """Step -> CPU minutes of a layer."""
    seconds: Counter[str] = Counter()
    measured = TOKENS if recipe.measured_tokens is None else recipe.measured_tokens
    experts, top_k, stages = description.num_experts, description.top_k, len(description.family.linears)
    batches, measured_batches = TOKENS / BATCH_TOKENS, measured / BATCH_TOKENS
    seconds["forward"] = (batches + measured_batches) * layer.forward + batches * (1 + stages) * layer.others
    seconds["backward"] = measured_batches * layer.backward
    chunks = (TOKENS + measured) * top_k / experts / CHUNK_TOKENS * experts
    seconds["intermediates"] = chunks * intermediate
    if recipe.tuning is not None:
        tuned = recipe.tuning.tokens / BATCH_TOKENS
        seconds["tuning"] = tuned * (2 * layer.forward + layer.backward)
    for part, (rows, _) in description.part_shapes().items():
        times, gptq = of[part], recipe.gptq
        seconds["hessians"] += chunks * times.chunk
        seconds["factors"] += 2 * experts * times.factor
        seconds["gptq"] += experts * rows * times.gptq
        seconds["sweeps"] += experts * rows * gptq.refinement_sweeps * times.sweep
        seconds["output_sweeps"] += experts * rows * gptq.output_sweeps * times.output_sweep
        units = rows // (description.function.factor if part == "gate_up" else 1)
        share = recipe.measured_rows / units if measures_some_rows(recipe, units) else 1.0
        of_width = rows * share * (times.gptq + gptq.refinement_sweeps * times.sweep)
        seconds["measuring"] += experts * len(recipe.widths) * of_width
    seconds["measuring"] += experts * min(measured * top_k / experts, MEASURED_TOKENS) / CHUNK_TOKENS * 3 * intermediate
    return Counter({step: value / 60 for step, value in seconds.items()})


def show(name: str, codes: str, efforts: dict[Effort, Counter[str]]) -> None:
    print(f"\n| CPU minutes of a layer, {name}, {codes} codes |", " | ".join(efforts), "|")
    print("|---|", " | ".join("---:" for _ in efforts), "|")
    for step in next(iter(efforts.values())):
        print(f"| {step} |", " | ".join(f"{found[step]:.1f}" for found in efforts.values()), "|")
    print("| all |", " | ".join(f"{sum(found.values()):.1f}" for found in efforts.values()), "|", flush=True)


def time_model(name: str, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        CONFIGS[name].save_pretrained(directory)
        description = describe_model(directory)
        recipes = {effort: find_recipe("mcmoe", effort) for effort in ("normal", "fast")}
        predicted = predict_times(directory)
        rounds = multiplies_in_bfloat16(torch.device("cpu"), description.hidden)
        with bfloat16_products(rounds):
            layer, intermediate = time_layer(description), time_intermediate(description)
            print(f"{name}: {layer}, intermediate of a chunk {intermediate:.3f}", flush=True)
            for codes in options.codes:
                of = {}
                for part, (rows, columns) in description.part_shapes().items():
                    gptq = replace(recipes["normal"].gptq, codes=codes)
                    of[part] = time_matrix(min(rows, options.rows), columns, gptq)
                    print(f"{name}, {codes}, {part} {[rows, columns]}: {of[part]}", flush=True)
                efforts = {}
                for effort, recipe in recipes.items():
                    found = minutes(description, recipe, layer, of, intermediate)
                    others = ("files", "linears", "output_hessians")
                    found["the rest, predicted"] = (
                        sum(predicted[effort][s] for s in others) / 60 / description.num_layers
                    )
                    efforts[effort] = found
                show(name, codes, efforts)


def quantised(weight: torch.Tensor, moment: torch.Tensor, options: GPTQOptions) -> None:
    with torch.no_grad():
        quantize_gptq(weight, HessianFactor.build(moment, options), BITS, options)


def time_threads(rounds: int) -> None:
    """Two experts on one thread, and on two: side by side, or one after another on both."""
    for rows, columns in ((768, 2048), (4096, 4096)):
        options = replace(find_recipe("mcmoe").gptq, refinement_sweeps=2, output_sweeps=0)
        moment = SecondMoment.of([torch.randn(CHUNK_TOKENS, columns)]).matrix()
        quantise = partial(quantised, torch.randn(rows, columns), moment, options)
        ways = {"one thread": (1, 1), "two, side by side": (2, 2), "two, on one expert": (2, 1)}
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        with bfloat16_products(multiplies_in_bfloat16(torch.device("cpu"), columns)):
            for _ in range(rounds + 1):
                for way, (threads, at_once) in ways.items():
                    torch.set_num_threads(threads)
                    started = time.perf_counter(), time.process_time()
                    side_by_side(lambda _, quantise=quantise: quantise(), range(2), at_once)
                    found[way].append((time.perf_counter() - started[0], time.process_time() - started[1]))
        for way, times in found.items():
            wall, cpu = zip(*times[1:], strict=True)
            print(
                f"[{rows}, {columns}], two experts, {way}: wall {median(wall):.2f} s (least {min(wall):.2f}), "
                f"CPU {median(cpu):.2f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--codes", nargs="+", choices=("scalar", "trellis"), default=["scalar"])
    parser.add_argument("--rows", type=int, default=1024, help="of a matrix, at most, that are quantised")
    parser.add_argument("--threads", action="store_true", help="compare one thread with two, and nothing else")
    parser.add_argument("--rounds", type=int, default=5, help="of --threads")
    options = parser.parse_args()
    if options.threads:
        time_threads(options.rounds)
        return
    torch.set_num_threads(1)
    for name in options.models:
        time_model(name, options)


if __name__ == "__main__":
    main()
