"""What less work costs in quality, on the reference model.

    python benchmarks/effort.py plans [--rows 64 128]          # two minutes
    python benchmarks/effort.py quantising [--bits 1.94] [--codes scalar]             # five minutes
    python benchmarks/effort.py sweeps [--bits 1.94] [--before 8 4 2]                 # two minutes each

plans: widths measured on some rows of a matrix. Its matrices are too small for `--effort normal` to leave out rows;
here --rows of its 512 units and 256 features are quantised. A plan's cost is the sum of the loss increases that full
measurements give its widths.
quantising: KL on evaluation text of one plan, quantised as always, with operands of products in bfloat16 (on a CPU with
AMX), with Hessians of few tokens, and with fewer sweeps.
sweeps: the same with so many sweeps before those under outputs' Hessians, widths measured with as many, and planned
with what was measured.
All of it with the default's codes, or --codes.
"""

import argparse
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.common.device import bfloat16_products
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.measure.expert_tokens import build_factor, evenly_spaced
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors
from vllm_mcmoe.calibration.measure.statistics import Calibration, measure
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize_model
from vllm_mcmoe.calibration.quantize import layer
from vllm_mcmoe.calibration.recipes import RECIPES, Recipe, find_recipe
from vllm_mcmoe.kernels.packing import KINDS

REFERENCE = Path(__file__).parent / "reference_model"
BUDGETS = (1.4, 1.55, 1.7, 1.85, 2.0, 2.25, 2.5, 2.75, 3.0, 3.3)


def cost(plan: Plan, factors: Factors) -> float:
    return sum(
        factors.layers[layer].loss_increase[part][width][expert]
        for layer, widths in plan.layers.items()
        for part in PROJECTIONS
        for expert, width in enumerate(widths[part])
    )


def compare_plans(model: LayerwiseModel, sequences: Any, default: Recipe, rows: list[int]) -> None:
    full = measure(model, sequences, recipe=default, show_progress=False).factors
    best = {bits: cost(allocate(full, recipe=default, bits=bits), full) for bits in BUDGETS}
    for count in rows:
        some = measure(model, sequences, recipe=replace(default, measured_rows=count), show_progress=False).factors
        costs = {bits: cost(allocate(some, recipe=default, bits=bits), full) for bits in BUDGETS}
        more = [f"{bits}: {costs[bits] / best[bits] - 1:+.2%}" for bits in BUDGETS]
        print(f"{count} rows, cost by bits:", ", ".join(more), flush=True)


def compare_quantising(
    model: LayerwiseModel, sequences: Any, default: Recipe, bits: float, evaluation_sequences: int
) -> None:
    measured = measure(model, sequences, recipe=default, show_progress=False)
    plan = allocate(measured.factors, recipe=default, bits=bits)

    def show(what: str, recipe: Recipe = default, within: AbstractContextManager = nullcontext()) -> None:
        with within:
            kl = _kl(model, sequences, recipe, plan, measured, evaluation_sequences)
        print(f"{what}: KL {kl:.4f}", flush=True)

    show("as always")
    show("bfloat16", within=bfloat16_products(True))
    show("Hessians of 8 tokens per column", within=mock.patch.object(layer, "build_factor", _of_few_tokens))
    for sweeps, output_sweeps in ((0, 8), (2, 6)):
        gptq = replace(default.gptq, refinement_sweeps=sweeps, output_sweeps=output_sweeps)
        show(f"{sweeps} sweeps and {output_sweeps} under outputs' Hessians", replace(default, gptq=gptq))


def compare_sweeps(
    model: LayerwiseModel, sequences: Any, default: Recipe, bits: float, before: list[int], evaluation_sequences: int
) -> None:
    for sweeps in before:
        recipe = replace(default, gptq=replace(default.gptq, refinement_sweeps=sweeps))
        measured = measure(model, sequences, recipe=recipe, show_progress=False)
        plan = allocate(measured.factors, recipe=recipe, bits=bits)
        kl = _kl(model, sequences, recipe, plan, measured, evaluation_sequences)
        print(f"{bits:g} bits, {default.gptq.codes}, {sweeps} sweeps before: KL {kl:.5f}", flush=True)


def _kl(
    model: LayerwiseModel, sequences: Any, recipe: Recipe, plan: Plan, measured: Calibration, evaluation_sequences: int
) -> float:
    """Nats per token, of the plan quantised by the recipe."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        quantize_model(
            model, out, plan=plan, sequences=sequences, recipe=recipe, linear_bits=16,
            output_gradients=measured.output_gradients, show_progress=False,
        )  # fmt: skip
        scores = evaluate(
            out, _corpus("evaluation"), against=model.description.path, sequences=evaluation_sequences, length=256,
            show_progress=False,
        )  # fmt: skip
    return scores.mean_kl


def _of_few_tokens(tokens: Any, weights: torch.Tensor, transform: Any, recipe: Recipe, name: str) -> Any:
    """In the place of build_factor, evenly spaced tokens. The reference model: 256 inputs of gate_up, 512 of down."""
    count = min(len(tokens), 8 * (256 if transform is None else 512))
    return build_factor(tokens.at_most(count), weights[evenly_spaced(len(tokens), count)], transform, recipe, name)


def _corpus(part: str) -> list[Path]:
    return sorted((REFERENCE / "corpus").glob(f"*.{part}.txt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plans", "quantising", "sweeps"))
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128], help="of each matrix, instead of all")
    parser.add_argument("--bits", type=float, default=1.94)
    parser.add_argument("--before", type=int, nargs="+", default=[8, 4, 2], help="sweeps")
    parser.add_argument("--codes", choices=KINDS, default=RECIPES["mcmoe"].gptq.codes)
    parser.add_argument("--evaluation-sequences", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(1)  # this model's matrices are too small to share
    description = describe_model(REFERENCE / "tiny-mixtral")
    model = LayerwiseModel(WeightFiles(description))
    sequences = load_calibration_data(description, _corpus("calibration"), 128, 256, print)
    default = find_recipe("mcmoe", "best", tune=False, codes=options.codes)  # tuning is another matter
    if options.what == "plans":
        compare_plans(model, sequences, default, options.rows)
    elif options.what == "sweeps":
        compare_sweeps(model, sequences, default, options.bits, options.before, options.evaluation_sequences)
    else:
        compare_quantising(model, sequences, default, options.bits, options.evaluation_sequences)


if __name__ == "__main__":
    main()
