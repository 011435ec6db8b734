"""What --effort costs in quality: plans made from measurements with few sweeps, judged by those with all of them.

    python benchmarks/effort.py [--rows 32] [--sweeps 0 1 2]       # five minutes

On the reference model, whose matrices are too small to be measured with few sweeps: here all are, and --rows of 512 and
256 are refined. A plan's cost is the sum of the loss increases that full measurements give its widths.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from unittest import mock

from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.measure import expert_errors
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors
from vllm_mcmoe.calibration.measure.statistics import measure
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.recipes import RECIPES

REFERENCE = Path(__file__).parent / "reference_model"
BUDGETS = (1.4, 1.55, 1.7, 1.85, 2.0, 2.25, 2.5, 2.75, 3.0, 3.3)


def cost(plan: Plan, factors: Factors) -> float:
    return sum(
        factors.layers[layer].loss_increase[part][width][expert]
        for layer, widths in plan.layers.items()
        for part in PROJECTIONS
        for expert, width in enumerate(widths[part])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32, help="refined, of each matrix")
    parser.add_argument("--sweeps", type=int, nargs="+", default=[0, 1, 2], help="to measure with")
    options = parser.parse_args()
    description = describe_model(REFERENCE / "tiny-mixtral")
    model = LayerwiseModel(WeightFiles(description))
    corpus = sorted((REFERENCE / "corpus").glob("*.calibration.txt"))
    sequences = load_calibration_data(description, corpus, 128, 256, print)
    full = measure(model, sequences, recipe=RECIPES["mcmoe"]).factors
    best = {bits: cost(allocate(full, bits=bits), full) for bits in BUDGETS}
    for sweeps in options.sweeps:
        with mock.patch.object(expert_errors, "REFINED_ROWS", options.rows):
            few = measure(model, sequences, recipe=replace(RECIPES["mcmoe"], measured_sweeps=sweeps)).factors
        more = [f"{bits}: {cost(allocate(few, bits=bits), full) / best[bits] - 1:+.2%}" for bits in BUDGETS]
        print(f"{sweeps} sweeps, cost by bits:", ", ".join(more), flush=True)


if __name__ == "__main__":
    main()
