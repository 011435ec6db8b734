"""Quality at equal bytes: what a user would pick instead, the authors' own recipe, and ours.

    python benchmarks/quality.py --bits 1.55 2.0 2.5 [--json FILE]
    python benchmarks/quality.py --bits 1.55 2.0 2.5 --methods mcmoe "mcmoe scalar"         # docs/trellis.md
    python benchmarks/quality.py --bits 2.0 2.2 --methods mcmoe "mcmoe scalar" --full-budget
    python benchmarks/quality.py --whole [--half 1]                  # the whole checkpoint under one budget
    python benchmarks/quality.py --bits 2 2.1 2.5 3 4 --model SMOL --length 512 --work DIR     # upcycle.py's model

Every method quantises the same model from the same calibration text; all are evaluated on the same other text with
the kernels' int8 activations. Bits and bytes are those of the experts' tensors as written, scales and zeros included.
Methods other than ours get the requested budget; with few experts per layer they cannot always spend all of it, and
mcmoe then gets what the thriftier of uniform and paper-code really used, never more. Budgets below the authors' least
counts (1.54 bits with 8 experts per layer) go without paper-code; so do those it cannot spend, having no width above
3. With --work, measurements, checkpoints and finished rows are kept, and the same command goes on from there.
Attention stays in 16 bits unless --linear-bits says otherwise, so that differences are the experts'.

With --whole, what is compared at equal bytes is the whole checkpoint: mcmoe at --bits with linears at 4 bits and the
output head at 16, against `--size` of as many bytes, which decides them all, or all but the head. --half 1 or 2 takes
one half of every evaluation text, so that one can be looked at while choosing and the other for the result.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.checkpoint.workdir import WorkDirectory, working_on
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions
from vllm_mcmoe.calibration.matrix.linears import count_by_width
from vllm_mcmoe.calibration.measure.factors import Factors
from vllm_mcmoe.calibration.measure.sensitivity import choose_store
from vllm_mcmoe.calibration.measure.statistics import Calibration, measure
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import TokenSequences, load_calibration_data
from vllm_mcmoe.calibration.model.weight_files import TensorFiles
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize_model
from vllm_mcmoe.calibration.recipes import RECIPES, Recipe, find_recipe, needs_gradients
from vllm_mcmoe.errors import PlanError

REFERENCE = Path(__file__).parent / "reference_model"
LENGTH = 256  # that it was trained at
ROUND_TO_NEAREST = replace(RECIPES["uniform"], gptq=GPTQOptions(compensate=False))
RECIPE_OF = {
    "uniform RTN": ROUND_TO_NEAREST,
    "uniform GPTQ": RECIPES["uniform"],
    "paper-code": RECIPES["paper-code"],
    "mcmoe": RECIPES["mcmoe"],
    "mcmoe scalar": replace(find_recipe("mcmoe", "best", codes="scalar"), name="mcmoe-scalar"),
}
OURS = ("mcmoe", "mcmoe scalar")


@dataclass
class Row:
    """One line of the table. expert_bits, expert_bytes: as written. perplexity: geometric mean over the files."""

    method: str
    requested_bits: float | None
    expert_bits: float
    expert_bytes: int
    total_bytes: int
    perplexity: float
    mean_kl: float | None
    top1_agreement: float | None


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    description = describe_model(options.model)
    model = LayerwiseModel(WeightFiles(description))
    sequences = load_calibration_data(description, options.calibration, options.sequences, options.length, print)
    with (
        tempfile.TemporaryDirectory() as temporary,
        working_on((options.work or Path(temporary)) / "table", _identity(options), log=print) as work,
    ):
        work.save("begun", {})  # so that the measurements in directories of their own are those of a run to continue
        if options.half is not None:
            options.evaluation = half_of(options.evaluation, options.half, work.path / f"half-{options.half}")
        _Table(options, model, sequences, work).make()


def _identity(options: argparse.Namespace) -> dict[str, str]:
    """What rows depend on; which of them are asked for may change."""
    kept = ("model", "calibration", "evaluation", "sequences", "evaluation_sequences", "length", "linear_bits")
    return {key: str(getattr(options, key)) for key in kept}


class _Table:
    """The benchmark's state: rows are shown as they are made and written to --json after each."""

    def __init__(
        self, options: argparse.Namespace, model: LayerwiseModel, sequences: TokenSequences, work: WorkDirectory
    ):
        self.options, self.model, self.sequences, self.work = options, model, sequences, work
        self.rows: list[Row] = []
        self.budget = "-full-budget" if options.full_budget else ""

    def _make_whole(self) -> None:
        calibration = self._measured(RECIPE_OF["mcmoe"])
        factors = calibration.factors
        for bits in self.options.bits:
            experts_alone = self._add(
                "experts alone, linears 4, head 16",
                bits,
                partial(self._quantise_and_evaluate, "experts", allocate(factors, bits=bits), bits, calibration, 4),
            )
            size = experts_alone.total_bytes + header_bytes(self.work.path / f"experts-{bits}")
            for method, plan in (
                ("--size", allocate(factors, size=size)),
                ("--size, head 16", without_head(factors, size)),
            ):
                make = partial(self._quantise_and_evaluate, method.replace(" ", ""), plan, bits, calibration, None)
                self._add(f"{method}: {count_by_width(plan.linears)}", bits, make)

    def make(self) -> None:
        if self.options.whole:
            self._add("16 bits", None, lambda: _evaluate(self.options, "16 bits", None, self.options.model))
            self._make_whole()
            return
        measured = {
            method: self._measured(recipe)
            for method, recipe in RECIPE_OF.items()
            if method == "paper-code" or (method in OURS and method in self.options.methods)
        }
        # A uniform plan needs no measurements, only the shapes that any factors have.
        for method in ("uniform RTN", "uniform GPTQ"):
            measured[method] = Calibration(measured["paper-code"].factors, {}, {})
        self._add("16 bits", None, lambda: _evaluate(self.options, "16 bits", None, self.options.model))
        for bits in self.options.bits:
            factors = {method: calibration.factors for method, calibration in measured.items()}
            for method, plan in plans(bits, factors, self.options.full_budget).items():
                if method in self.options.methods:
                    self._add(
                        method,
                        bits,
                        partial(
                            self._quantise_and_evaluate, method, plan, bits, measured[method], self.options.linear_bits
                        ),
                    )

    def _measured(self, recipe: Recipe) -> Calibration:
        with working_on(self.work.path / f"measured-{recipe.name}", {}, log=print) as work:
            # On disk where work is kept: a run that is continued then need not repeat the forward and backward pass.
            storage, tokens = "disk" if self.options.work else "auto", self.sequences.tokens.numel()
            gradients = needs_gradients(recipe)
            store = choose_store(storage, self.model, tokens, gradients, work.activations, print)
            calibration = measure(
                self.model,
                self.sequences,
                recipe=recipe,
                store=store,
                work=work,
                with_linears=True,
                log=print,
                show_progress=False,
            )
        calibration.factors.save(self.work.path / f"factors-{recipe.name}.json")
        return calibration

    def _add(self, method: str, bits: float | None, make: Callable[[], Row]) -> Row:
        half = "" if self.options.half is None else f"-half-{self.options.half}"
        unit = f"row-{method}-{bits}{self.budget}{half}".replace(" ", "-")
        document = self.work.load(unit)
        row = Row(**document) if document else replace(make(), method=method)
        self.work.save(unit, asdict(row))
        _show(row, header=not self.rows)
        self.rows.append(row)
        if self.options.json:
            self.options.json.write_text(json.dumps([asdict(row) for row in self.rows], indent=1) + "\n")
        return row

    def _quantise_and_evaluate(
        self, method: str, plan: Plan, bits: float, calibration: Calibration, linear_bits: int | None
    ) -> Row:
        out = self.work.path / f"{method}-{bits}{self.budget}".replace(" ", "-")
        recipe = RECIPE_OF.get(method, RECIPE_OF["mcmoe"])
        if not out.exists():
            quantize_model(
                self.model,
                out,
                plan=plan,
                sequences=self.sequences,
                recipe=recipe,
                linear_bits=linear_bits,
                gradient_norms=calibration.gradient_norms,
                output_gradients=calibration.output_gradients,
                show_progress=False,
            )
        return _evaluate(self.options, method, bits, out)


def plans(bits: float, factors: dict[str, Factors], full_budget: bool) -> dict[str, Plan]:
    """Method -> plan: the baselines at the budget, ours at the smallest of what they use, or at the budget, too.
    Without paper-code where its least counts of 2 and 3 bits cost more than the budget, or all experts at 3 bits less.
    """
    result = {
        method: allocate(factors[method], recipe=RECIPE_OF[method], bits=bits)
        for method in ("uniform RTN", "uniform GPTQ")
    }
    try:
        result["paper-code"] = allocate(factors["paper-code"], recipe=RECIPE_OF["paper-code"], bits=bits)
    except PlanError as error:
        print(f"No paper-code at {bits} bits: {error}")
    used = min(plan.average_bits for plan in result.values())
    for method in OURS:
        if method in factors:
            budget = bits if full_budget else used
            result[method] = allocate(factors[method], recipe=RECIPE_OF[method], bits=budget)
    return result


def without_head(factors: Factors, size: int) -> Plan:
    """A plan of that size that decides everything but the output head."""
    table = factors.linears
    (head,) = (module for module in table.modules if module.names[0] == table.head)
    others = [module for module in table.modules if module is not head]
    held = replace(table, modules=others, other_bytes=table.other_bytes + head.nbytes[16])
    plan = allocate(replace(factors, linears=held), size=size)
    plan.linears[table.head] = 16
    return plan


def header_bytes(checkpoint: Path) -> int:
    """What its safetensors files are larger than their tensors."""
    info = TensorFiles(checkpoint).info.values()
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) - sum(i.nbytes for i in info)


def corpus(part: str) -> list[Path]:
    """The reference model's texts. part: "calibration" or "evaluation"."""
    return sorted((REFERENCE / "corpus").glob(f"*.{part}.txt"))


def half_of(files: list[Path], half: int, directory: Path) -> list[Path]:
    """The first or second half of every text, in files of the same names."""
    directory.mkdir(exist_ok=True)
    for file in files:
        text = file.read_text(encoding="utf-8")
        middle = text.index("\n", len(text) // 2)
        (directory / file.name).write_text(text[:middle] if half == 1 else text[middle:], encoding="utf-8")
    return [directory / file.name for file in files]


def _evaluate(options: argparse.Namespace, method: str, bits: float | None, path: Path) -> Row:
    result = evaluate(
        path,
        options.evaluation,
        against=None if bits is None else options.model,
        sequences=options.evaluation_sequences,
        length=options.length,
        show_progress=False,
    )
    return Row(
        method,
        bits,
        result.average_bits["experts"],
        result.expert_bytes,
        result.total_bytes,
        result.geometric_mean_perplexity,
        result.mean_kl,
        result.top1_agreement,
    )


def _show(row: Row, header: bool = False) -> None:
    """Print a line of the markdown table at once: a long benchmark's first results are of use before its last."""
    if header:
        print("| method | written expert bits | expert bytes | all bytes | perplexity | KL | top-1 agreement |")
        print("|---|---|---|---|---|---|---|")
    distance = "- | -" if row.mean_kl is None else f"{row.mean_kl:.4f} | {row.top1_agreement:.1%}"
    print(
        f"| {row.method} | {row.expert_bits:.3f} | {row.expert_bytes:,} | {row.total_bytes:,} | {row.perplexity:.2f} | "
        f"{distance} |",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity and KL of every recipe at equal written bytes.")
    parser.add_argument(
        "--bits", type=float, nargs="+", default=[1.55, 2.0, 2.5], help="written bits per expert weight"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=RECIPE_OF, default=[method for method in RECIPE_OF if method != "mcmoe scalar"]
    )
    parser.add_argument("--full-budget", action="store_true", help="give mcmoe what was asked for, whatever others use")
    parser.add_argument(
        "--whole", action="store_true", help="compare whole checkpoints; --linear-bits and --methods do not count"
    )
    parser.add_argument("--half", type=int, choices=(1, 2), help="of every evaluation text; all of it without")
    parser.add_argument("--model", type=Path, default=REFERENCE / "tiny-mixtral")
    parser.add_argument("--calibration", type=Path, nargs="+", default=corpus("calibration"))
    parser.add_argument("--evaluation", type=Path, nargs="+", default=corpus("evaluation"))
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--evaluation-sequences", type=int, default=10**6, help="default: all of the text")
    parser.add_argument("--length", type=int, default=LENGTH, help="the reference model was trained at 256 tokens")
    parser.add_argument("--linear-bits", type=int, choices=(4, 8, 16), default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 is faster on a busy machine")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument("--work", type=Path, help="keep what is finished in this directory, and go on from it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
