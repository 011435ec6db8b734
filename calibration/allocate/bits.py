"""How many bits a weight takes in the checkpoint, scales and zeros included."""

from collections import Counter
from collections.abc import Mapping, Sequence

from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors, LayerFactors
from vllm_mcmoe.checkpoint import FORMAT_VERSION
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import GROUP_SIZE, WIDTHS

# Written bits are counted in whole sixteenths, so that sizes are integers and budgets can be compared exactly.
SIXTEENTHS = 16

ROW_BITS = 8  # exponent of a row's scales, in version 2


def group_bits(width: int, version: int) -> int:
    """Bits of a group besides its codes: in version 1 a scale in fp16 and, except at 1 bit, a zero; then one byte."""
    if width not in WIDTHS:
        raise PlanError(f"bit-width {width} is not one of {WIDTHS}")
    return (16 if width == 1 else 32) if version == 1 else 8


def written_bits(width: int, version: int = FORMAT_VERSION) -> float:
    """Bits per weight of long rows: codes and what comes with every 128 of them. Version 2: 2 -> 2.0625, 1 -> 1.0625.

    Rows' exponents come on top: 0.002 at 4096 inputs, 0.03 at 256.
    """
    return width + group_bits(width, version) / GROUP_SIZE


def written_sixteenths(layer: LayerFactors, projection: str, width: int, version: int) -> int:
    """Of one projection of one expert, in sixteenths of a bit."""
    per_weight = SIXTEENTHS * width + SIXTEENTHS * group_bits(width, version) // GROUP_SIZE
    rows = 0 if layer.shapes is None or version == 1 else layer.shapes[projection][0]
    return layer.written_numel(projection) * per_weight + SIXTEENTHS * ROW_BITS * rows


def average_bits(plan_layers: Mapping[str, Mapping[str, Sequence[int]]], factors: Factors, version: int) -> float:
    """Average bits per expert weight as written, scales and zeros included, weighted by the matrices' sizes."""
    numel = sum(factors.layers[name].expert_numel * len(widths["down"]) for name, widths in plan_layers.items())
    return _sixteenths(plan_layers, factors, version) / numel / SIXTEENTHS


def expert_bytes(plan_layers: Mapping[str, Mapping[str, Sequence[int]]], factors: Factors, version: int) -> int:
    """Bytes of all experts as written. The factors must have shapes."""
    return -(-_sixteenths(plan_layers, factors, version) // (8 * SIXTEENTHS))


def _sixteenths(plan_layers: Mapping[str, Mapping[str, Sequence[int]]], factors: Factors, version: int) -> int:
    """Of a bit, of all experts as written."""
    return sum(
        count * written_sixteenths(factors.layers[name], projection, width, version)
        for name, widths in plan_layers.items()
        for projection in PROJECTIONS
        for width, count in Counter(widths[projection]).items()
    )
