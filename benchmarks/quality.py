"""Quality at equal bytes: what a user would pick instead, the authors' own recipe, and ours.

    python benchmarks/quality.py --bits 1.55 2.0 2.5 [--json FILE]

Every method quantises the same model from the same calibration text; all are evaluated on the same other text with
the kernels' int8 activations. Bits and bytes are those of the experts' tensors as written, scales and zeros included.
Methods other than ours get the requested budget; with few experts per layer they cannot always spend all of it, and
mcmoe then gets what the thriftier of uniform and paper-code really used, never more. (Below 1.54 bits the authors'
minimum counts leave no plan for 8 experts per layer.) Attention stays in 16 bits unless --linear-bits says otherwise,
so that differences are the experts'.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vllm_mcmoe.calibration.allocation import allocate
from vllm_mcmoe.calibration.artifacts import Factors, Plan
from vllm_mcmoe.calibration.data import TokenSequences
from vllm_mcmoe.calibration.evaluate import evaluate
from vllm_mcmoe.calibration.gptq import GPTQOptions
from vllm_mcmoe.calibration.layerwise import LayerwiseModel, WeightFiles
from vllm_mcmoe.calibration.models import describe_model
from vllm_mcmoe.calibration.pipeline import quantize_model
from vllm_mcmoe.calibration.recipes import RECIPES, Recipe
from vllm_mcmoe.calibration.statistics import Calibration, load_calibration_data, measure

REFERENCE = Path(__file__).parent / "reference_model"
ROUND_TO_NEAREST = replace(RECIPES["uniform"], gptq=GPTQOptions(compensate=False))
RECIPE_OF = {
    "uniform RTN": ROUND_TO_NEAREST,
    "uniform GPTQ": RECIPES["uniform"],
    "paper-code": RECIPES["paper-code"],
    "mcmoe": RECIPES["mcmoe"],
}


@dataclass
class Row:
    """One line of the table. expert_bits, expert_bytes: as written. perplexity: geometric mean over the files."""

    method: str
    requested_bits: float | None
    expert_bits: float
    expert_bytes: int
    perplexity: float
    mean_kl: float | None
    top1_agreement: float | None


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    description = describe_model(options.model)
    model = LayerwiseModel(WeightFiles(description))
    sequences = load_calibration_data(description, options.calibration, options.sequences, options.length, print)
    measured = {
        method: measure(model, sequences, recipe=recipe, log=print, show_progress=False)
        for method, recipe in RECIPE_OF.items()
        if recipe.objective != "uniform"
    }
    # A uniform plan needs no measurements, only the shapes that any factors have.
    for method in ("uniform RTN", "uniform GPTQ"):
        measured[method] = Calibration(measured["paper-code"].factors, {})
    rows = [_evaluate(options, "bf16", None, options.model)]
    _show(rows[0], header=True)
    for bits in options.bits:
        for method, plan in plans(bits, {m: c.factors for m, c in measured.items()}).items():
            rows.append(_quantise_and_evaluate(options, model, sequences, method, plan, bits, measured[method]))
            _show(rows[-1])
            if options.json:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def plans(bits: float, factors: dict[str, Factors]) -> dict[str, Plan]:
    """Method -> plan: the baselines at the budget, ours at the smaller of what they use."""
    result = {
        method: allocate(factors[method], recipe=recipe, bits=bits)
        for method, recipe in RECIPE_OF.items()
        if method != "mcmoe"
    }
    used = min(result["uniform GPTQ"].average_bits, result["paper-code"].average_bits)
    result["mcmoe"] = allocate(factors["mcmoe"], recipe=RECIPE_OF["mcmoe"], bits=used)
    return result


def _quantise_and_evaluate(
    options: argparse.Namespace,
    model: LayerwiseModel,
    sequences: TokenSequences,
    method: str,
    plan: Plan,
    bits: float,
    calibration: Calibration,
) -> Row:
    recipe: Recipe = RECIPE_OF[method]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "checkpoint"
        quantize_model(
            model,
            out,
            plan=plan,
            sequences=sequences,
            recipe=recipe,
            linear_bits=options.linear_bits,
            gradient_norms=calibration.gradient_norms,
            show_progress=False,
        )
        return _evaluate(options, method, bits, out)


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
        result.geometric_mean_perplexity,
        result.mean_kl,
        result.top1_agreement,
    )


def _show(row: Row, header: bool = False) -> None:
    """Print a line of the markdown table at once: a long benchmark's first results are of use before its last."""
    if header:
        print("| method | written expert bits | expert bytes | perplexity | KL | top-1 agreement |")
        print("|---|---|---|---|---|---|")
    distance = "- | -" if row.mean_kl is None else f"{row.mean_kl:.4f} | {row.top1_agreement:.1%}"
    print(
        f"| {row.method} | {row.expert_bits:.3f} | {row.expert_bytes:,} | {row.perplexity:.2f} | {distance} |",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity and KL of every recipe at equal written bytes.")
    parser.add_argument(
        "--bits", type=float, nargs="+", default=[1.55, 2.0, 2.5], help="written bits per expert weight"
    )
    parser.add_argument("--model", type=Path, default=REFERENCE / "tiny-mixtral")
    parser.add_argument("--calibration", type=Path, nargs="+", default=_corpus("calibration"))
    parser.add_argument("--evaluation", type=Path, nargs="+", default=_corpus("evaluation"))
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--evaluation-sequences", type=int, default=10**6, help="default: all of the text")
    parser.add_argument("--length", type=int, default=256, help="the reference model was trained at 256 tokens")
    parser.add_argument("--linear-bits", type=int, choices=(4, 8, 16), default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 is faster on a busy machine")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    return parser.parse_args()


def _corpus(part: str) -> list[Path]:
    return sorted((REFERENCE / "corpus").glob(f"*.{part}.txt"))


if __name__ == "__main__":
    main()
