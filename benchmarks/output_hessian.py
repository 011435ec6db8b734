"""What refining experts under the Hessian of their outputs is worth, what scales of a byte cost, and how the constants
of both were chosen.

    python benchmarks/output_hessian.py                                          # without, and as by default
    python benchmarks/output_hessian.py --sequences 4 16 --damping 0.1 0.5 2     # few tokens of an expert
    python benchmarks/output_hessian.py --rows 128 256 512 1024 --sweeps 4 8 12
    python benchmarks/output_hessian.py --bits 1 2 3 4 --metadata float16 float8 --only-with
    python benchmarks/output_hessian.py --bits 1 2 --metadata float8 --headroom 1.25 2 4 --only-with
    python benchmarks/output_hessian.py --bits 1 2 3 4 --codes scalar trellis    # docs/trellis.md
    python benchmarks/output_hessian.py --before 8 4 2 --sweeps 8 6 --only-with  # how many sweeps of each kind

KL to the 16-bit reference model on its evaluation text, every expert at --bits, attention in 16 bits. The damping asked
for is all of it: what is added for few tokens is left out where --damping is given.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from quality import LENGTH, REFERENCE, corpus

from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.matrix import grids, two_sided
from vllm_mcmoe.calibration.measure import output_gradients
from vllm_mcmoe.calibration.measure.statistics import measure
from vllm_mcmoe.calibration.model.description import MoeModel, describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize_model
from vllm_mcmoe.calibration.recipes import RECIPES


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    description = describe_model(REFERENCE / "tiny-mixtral")
    model = LayerwiseModel(WeightFiles(description))
    default = replace(RECIPES["mcmoe"], tuning=None)  # which is another matter
    for count in options.sequences:
        sequences = load_calibration_data(description, corpus("calibration"), count, LENGTH, print)
        gradients = measure(model, sequences, recipe=default, widths=(), show_progress=False).output_gradients
        choices = list(itertools.product(options.before, options.sweeps, options.rows, options.damping))
        choices = choices if options.only_with else [(options.before[0], 0, 0, None), *choices]
        for bits, metadata, codes, headroom, (before, sweeps, rows, damping) in itertools.product(
            options.bits, options.metadata, options.codes, options.headroom, choices
        ):
            gptq = replace(default.gptq, refinement_sweeps=before, output_sweeps=sweeps, metadata=metadata, codes=codes)
            recipe = replace(default, gptq=gptq)
            plan = _uniform(description, bits)
            with (
                tempfile.TemporaryDirectory() as directory,
                mock.patch.object(output_gradients, "COUPLED_ROWS", rows or two_sided.COUPLED_ROWS),
                mock.patch.object(two_sided, "output_damping", _always(damping)),
                mock.patch.object(grids, "HEADROOM", headroom or grids.HEADROOM),
                mock.patch.object(grids, "ONE_BIT_HEADROOM", headroom or grids.ONE_BIT_HEADROOM),
            ):
                started = time.process_time()
                out = Path(directory) / "out"
                report = quantize_model(
                    model, out, plan=plan, sequences=sequences, recipe=recipe, linear_bits=16,
                    output_gradients=gradients if sweeps else None, show_progress=False,
                )  # fmt: skip
                seconds = time.process_time() - started
                scores = evaluate(
                    out, corpus("evaluation"), against=description.path, sequences=options.evaluation_sequences,
                    length=LENGTH, show_progress=False,
                )  # fmt: skip
            shown = f"{sweeps} sweeps, {rows} rows, damping {damping or 'by tokens'}" if sweeps else "without"
            shown += f", {before} sweeps before" if len(options.before) > 1 else ""
            shown += f", room for {headroom:g} times" if headroom else ""
            stored = report.average_bits["experts"]
            print(
                f"{bits} bits, {codes}, {stored:.3f} with {metadata}, {count} sequences, {shown}: "
                f"KL {scores.mean_kl:.4f}, {seconds:.0f} s of CPU time",
                flush=True,
            )


def _uniform(description: MoeModel, bits: int) -> Plan:
    widths = [bits] * description.num_experts
    return Plan(layers={name: {"gate_up": widths, "down": widths} for name in description.moe_layers.values()})


def _always(damping: float | None) -> Callable[[int, int], float]:
    """In the place of two_sided.output_damping, which stays where damping is None."""
    return two_sided.output_damping if damping is None else lambda rows, tokens: damping


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--metadata", nargs="+", choices=("float16", "float8"), default=[RECIPES["mcmoe"].gptq.metadata],
        help="scales and zeros of 16 bits, or scales of a byte",
    )  # fmt: skip
    parser.add_argument("--codes", nargs="+", choices=("scalar", "trellis"), default=["scalar"])
    parser.add_argument(
        "--headroom", type=float, nargs="+", default=[None], help="for a row's largest scale of a byte to grow"
    )
    parser.add_argument("--only-with", action="store_true", help="leave out what it would be without sweeps")
    parser.add_argument("--sequences", type=int, nargs="+", default=[128], help="of 256 calibration tokens")
    parser.add_argument("--sweeps", type=int, nargs="+", default=[RECIPES["mcmoe"].gptq.output_sweeps])
    parser.add_argument(
        "--before", type=int, nargs="+", default=[RECIPES["mcmoe"].gptq.refinement_sweeps],
        help="sweeps in which all outputs matter alike",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[two_sided.COUPLED_ROWS], help="coupled")
    parser.add_argument("--damping", type=float, nargs="+", default=[None], help="share of the mean diagonal")
    parser.add_argument("--evaluation-sequences", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
