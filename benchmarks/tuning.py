"""What tuning norms after quantisation is worth, on the reference model: KL before and after, on text it has not seen.

    python benchmarks/tuning.py
    python benchmarks/tuning.py --bits 1.9375 --scale 0.5 1 2           # steps of other sizes

The default recipe quantises, attention in 16 bits, from 128 x 256 tokens of calibration text. What the steps' sizes
were chosen by is the first of every two sequences of the evaluation text; the second is for reporting. Activations are
floats, as they are while tuning. With --work, what is quantised is kept, and the same command goes on from there.
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.checkpoint.workdir import working_on
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights
from vllm_mcmoe.calibration.measure.statistics import Calibration, measure
from vllm_mcmoe.calibration.model.activations import ActivationStore
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import TokenSequences, load_calibration_data
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize_model
from vllm_mcmoe.calibration.recipes import RECIPES, TuningOptions
from vllm_mcmoe.calibration.tune.streaming import final_states, mean_kl
from vllm_mcmoe.calibration.tune.tuning import tune

REFERENCE = Path(__file__).parent / "reference_model"
BITS = (1.53125, 1.9375, 2.47265625)  # what the authors' recipe uses of 1.55, 2.0 and 2.5: those of quality.py's table
LENGTH = 256  # that the reference model was trained at
DEFAULT = RECIPES["mcmoe"].tuning
UNTUNED = replace(RECIPES["mcmoe"], tuning=None)


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        _Table(options, options.work or Path(temporary)).make()


class _Table:
    """The benchmark's state; lines are printed as they are made."""

    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.work = options, work
        self.model = LayerwiseModel(WeightFiles(describe_model(REFERENCE / "tiny-mixtral")))
        self.sequences = self._text("calibration", options.sequences)
        self.evaluated = self._text("evaluation", 10**6).tokens
        self.expected = final_states(self.model, self.evaluated, ActivationStore(), "original").rows
        self.expected = self.expected.view(*self.evaluated.shape, -1)

    def _text(self, part: str, sequences: int) -> TokenSequences:
        files = sorted((REFERENCE / "corpus").glob(f"*.{part}.txt"))
        return load_calibration_data(self.model.description, files, sequences, LENGTH, print)

    def make(self) -> None:
        print("| bits | steps | first half, before | after | second half, before | after | kept |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for bits in self.options.bits:
            checkpoint = self._quantised(bits)
            before = self._kl(checkpoint)
            for scale in self.options.scale:
                self._show(bits, scale, checkpoint, before)

    def _quantised(self, bits: float) -> Path:
        """The checkpoint without tuning."""
        out = self.work / f"untuned-{bits}"
        if not out.exists():
            plan = allocate(self._measured.factors, recipe=UNTUNED, bits=bits)
            quantize_model(
                self.model, out, plan=plan, sequences=self.sequences, recipe=UNTUNED, linear_bits=16,
                gradient_norms=self._measured.gradient_norms, output_gradients=self._measured.output_gradients,
                show_progress=False,
            )  # fmt: skip
        return out

    @cached_property
    def _measured(self) -> Calibration:
        return measure(self.model, self.sequences, recipe=UNTUNED, show_progress=False)

    def _show(self, bits: float, scale: float, checkpoint: Path, before: list[float]) -> None:
        tuning = replace(DEFAULT, step_size=scale * DEFAULT.step_size, passes=self.options.passes)
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "out"
            kept = self._tune(checkpoint, out, tuning)
            after = self._kl(out)
        halves = " | ".join(f"{a:.5f} | {b:.5f} ({b / a - 1:+.1%})" for a, b in zip(before, after, strict=True))
        print(f"| {bits} | x {scale:g} | {halves} | {kept} |", flush=True)

    def _tune(self, checkpoint: Path, out: Path, options: TuningOptions) -> bool:
        with working_on(out, {}) as work:
            report = tune(
                self.model, checkpoint, work.checkpoint, self.sequences.tokens, options, work, ActivationStore(),
                log=lambda message: None, show_progress=False,
            )  # fmt: skip
            for path in checkpoint.iterdir():
                if path.suffix != ".safetensors":
                    shutil.copy(path, work.checkpoint)
            work.publish()
        return report.kept

    def _kl(self, checkpoint: Path) -> list[float]:
        """On both halves of the evaluation text."""
        model = LayerwiseModel(CheckpointWeights(describe_model(checkpoint)))
        return [
            mean_kl(model, self.model, self.evaluated[half::2], iter(self.expected[half::2]), ActivationStore())
            for half in (0, 1)
        ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="KL before and after tuning norms.")
    parser.add_argument("--bits", type=float, nargs="+", default=BITS, help="per expert weight")
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0], help="of the steps' default sizes")
    parser.add_argument("--passes", type=int, default=DEFAULT.passes, help="over the calibration text")
    parser.add_argument("--sequences", type=int, default=128, help="of calibration")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 is faster on a busy machine")
    parser.add_argument("--work", type=Path, help="keep what is quantised in this directory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
