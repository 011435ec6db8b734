"""What each lever of the default recipe is worth at equal expert bytes: alone, and all together.

    python benchmarks/ablation.py                                # an hour on two busy cores, half of it at rest
    python benchmarks/ablation.py --bits 2.47265625 --levers all --sequences 128 512

KL to the 16-bit reference model on the second half of every evaluation text, with the kernels' int8 activations, and
attention in 16 bits; each row measures, allocates and quantises by its own recipe, within the same bytes.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from quality import LENGTH, REFERENCE, corpus, half_of

from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.evaluate.scores import Evaluation, evaluate
from vllm_mcmoe.calibration.matrix.grids import Metadata
from vllm_mcmoe.calibration.measure.statistics import Calibration, measure
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import TokenSequences, load_calibration_data
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize_model
from vllm_mcmoe.calibration.recipes import RECIPES, Recipe
from vllm_mcmoe.kernels.packing import Kind

BITS = (1.53125, 1.9375, 2.47265625)  # what the authors' recipe uses of 1.55, 2.0 and 2.5: those of quality.py's table
DEFAULT = RECIPES["mcmoe"]
NONE = replace(DEFAULT, gptq=replace(DEFAULT.gptq, output_sweeps=0, metadata="float16", codes="scalar"), tuning=None)
LEVERS = {
    "none": NONE,
    "the outputs' Hessian": replace(NONE, gptq=replace(NONE.gptq, output_sweeps=DEFAULT.gptq.output_sweeps)),
    "scales of a byte": replace(NONE, gptq=replace(NONE.gptq, metadata="float8")),
    "tuned norms": replace(NONE, tuning=DEFAULT.tuning),
    "trellis codes, scales of a byte": replace(NONE, gptq=replace(NONE.gptq, metadata="float8", codes="trellis")),
    "all but trellis codes": replace(DEFAULT, gptq=replace(DEFAULT.gptq, codes="scalar")),
    "all but tuned norms": replace(DEFAULT, tuning=None),
    "all": DEFAULT,
}


class _Table:
    """The benchmark's state: the model, and what was measured of it. Rows are printed as they are made."""

    def __init__(self, work: Path):
        self.work = work
        self.model = LayerwiseModel(WeightFiles(describe_model(REFERENCE / "tiny-mixtral")))
        self.evaluation = half_of(corpus("evaluation"), 2, work / "half")
        self.sequences, self._measured = cache(self._sequences), cache(self._measure)

    def _sequences(self, count: int) -> TokenSequences:
        return load_calibration_data(self.model.description, corpus("calibration"), count, LENGTH, lambda line: None)

    def _measure(self, metadata: Metadata, codes: Kind, count: int) -> Calibration:
        """Widths cost what they do with these scales and codes, whatever comes after them."""
        recipe = replace(DEFAULT, gptq=replace(DEFAULT.gptq, metadata=metadata, codes=codes))
        return measure(self.model, self.sequences(count), recipe=recipe, show_progress=False)

    def row(self, recipe: Recipe, bits: float, count: int) -> Evaluation:
        calibration = self._measured(recipe.gptq.metadata, recipe.gptq.codes, count)
        with tempfile.TemporaryDirectory(dir=self.work) as directory:
            out = Path(directory) / "out"
            quantize_model(
                self.model,
                out,
                plan=allocate(calibration.factors, recipe=recipe, bits=bits),
                sequences=self.sequences(count),
                recipe=recipe,
                linear_bits=16,
                output_gradients=calibration.output_gradients,
                show_progress=False,
            )
            return evaluate(
                out, self.evaluation, against=self.model.description.path, sequences=10**6, length=LENGTH,
                show_progress=False,
            )  # fmt: skip


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    print("| bits | as written | sequences | levers | perplexity | KL | same first choice |")
    print("|---:|---:|---:|---|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        table = _Table(Path(directory))
        for bits in options.bits:
            for count in options.sequences:
                for name in options.levers:
                    found = table.row(LEVERS[name], bits, count)
                    print(
                        f"| {bits:.3f} | {found.average_bits['experts']:.3f} | {count} | {name} | "
                        f"{found.geometric_mean_perplexity:.2f} | {found.mean_kl:.4f} | {found.top1_agreement:.1%} |",
                        flush=True,
                    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What each lever of the default recipe is worth at equal bytes.")
    parser.add_argument("--bits", type=float, nargs="+", default=BITS, help="per expert weight, as written")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--sequences", type=int, nargs="+", default=[128], help="of 256 calibration tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 is faster on a busy machine")
    return parser.parse_args()


if __name__ == "__main__":
    main()
