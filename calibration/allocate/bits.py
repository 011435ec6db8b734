"""How many bits a weight takes in the checkpoint, scales and zeros included."""

from collections.abc import Mapping, Sequence

from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import GROUP_SIZE, WIDTHS

# Written bits are counted in whole eighths, so that sizes are integers and budgets can be compared exactly.
EIGHTHS = 8


SCALE_BITS = 16  # one fp16 scale per row and group, and one fp16 zero except at 1 bit


def written_bits(width: int) -> float:
    """Bits per weight in the checkpoint: codes, plus scale and zero of every 128 weights. 2 -> 2.25, 1 -> 1.125."""
    return written_eighths(width) / EIGHTHS


def written_eighths(width: int) -> int:
    if width not in WIDTHS:
        raise PlanError(f"bit-width {width} is not one of {WIDTHS}")
    stored = SCALE_BITS if width == 1 else 2 * SCALE_BITS
    return EIGHTHS * width + EIGHTHS * stored // GROUP_SIZE


def average_bits(plan_layers: Mapping[str, Mapping[str, Sequence[int]]], factors: Factors) -> float:
    """Average bits per expert weight as written, scales and zeros included, weighted by the matrices' sizes."""
    eighths = numel = 0
    for name, widths in plan_layers.items():
        layer = factors.layers[name]
        for projection in PROJECTIONS:
            eighths += layer.written_numel(projection) * sum(written_eighths(w) for w in widths[projection])
            numel += layer.numel(projection) * len(widths[projection])
    return eighths / numel / EIGHTHS
