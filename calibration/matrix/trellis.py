"""Quantising to trellis codes (kernels/trellis.py): GPTQ ring by ring, and the refinement of refinement.py with rings
in the place of single codes.

GPTQ goes through rings of 32 columns where it goes through columns otherwise, and passes a ring's errors on to the
rings after it. Within a ring the Viterbi algorithm weighs what every choice means for the weights that follow
(trellis_loops.py). A sweep then goes from group to group, solves the scales given all codes, and each ring given
everything else. Rings close: a sweep keeps the three bits at which it cuts a ring, and every sweep cuts elsewhere.

Padding up to whole groups takes part, as weights of 0 that next to nothing depends on.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_mcmoe.calibration.matrix.grids import DROPPED_BITS, check_scales, scale_ranges, storable_scales
from vllm_mcmoe.calibration.matrix.refinement import GradientUpdates, Outputs, RowLoops, refine
from vllm_mcmoe.calibration.matrix.row_loops import over_rows
from vllm_mcmoe.calibration.matrix.trellis_loops import descend_trellis_coupled, descend_trellis_rows, first_pass
from vllm_mcmoe.kernels.packing import GROUP_SIZE, from_groups, padded, to_groups
from vllm_mcmoe.kernels.trellis import (
    RING,
    TrellisMatrix,
    codes_of_entries,
    level_table,
    middle_level,
    pack_trellis,
    ring_columns,
)

# Levels per standard deviation of a group's weights to begin with. The tables were made for 11.7, 12.9, 21.1 and 19.8;
# from these, experts of the reference model come out 1.5% better at 1 bit and 0.2% at 2.
LEVELS_PER_DEVIATION = {1: 10.0, 2: 12.3, 3: 21.0, 4: 19.8}
PADDING_CURVATURE = 1e-12  # of columns that are not there; real ones have 1 in the mean
# Rings that hear of a ring's errors at once; those after them hear of so many rings' together, in one product that
# reads and writes all their columns, which is what takes the time.
NEAR_RINGS = 16
CUT_STEP = 11  # of a ring, from sweep to sweep: has no divisor in common with 32, and is far from the last cut

LOOPS = RowLoops(descend_trellis_rows, descend_trellis_coupled)


@dataclass(frozen=True)
class QuantizedTrellis:
    """One linear map, quantised but not yet packed: as grids.QuantizedMatrix, with trellis codes.

    bits         1, 2, 3 or 4
    codes        uint8   [out, whole groups], each below 2**bits; those of padding mean nothing
    scales       float16 [out, groups], > 0
    in_features  columns that are no padding
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    in_features: int

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        return self.pack().dequantize(in_features=self.in_features)

    def pack(self) -> TrellisMatrix:
        return TrellisMatrix(self.bits, pack_trellis(self.codes, self.bits), self.scales)

    def part(self, rows: slice) -> "QuantizedTrellis":
        """Some rows, which own their memory."""
        return QuantizedTrellis(self.bits, self.codes[rows], self.scales[rows].clone(), self.in_features)


def ring_order(importance: torch.Tensor) -> torch.Tensor:
    """The columns in the order they are quantised: ring by ring, the most important first. importance: float32 [in], of
    each column; result: int64 [in]."""
    rings = F.pad(importance, (0, -len(importance) % RING)).view(-1, RING)
    first = RING * rings.mean(1).argsort(descending=True, stable=True)
    order = (first[:, None] + ring_columns().to(first.device)).flatten()
    return order[order < len(importance)]


class Iterate:
    """A matrix while it is refined: refinement.Iterate's counterpart. All matrices are float32 [out, whole groups].

    entries   uint8, of the table of levels, window and uncoded bits of every weight
    levels    of these entries, around 0
    scales    float32 [out, groups]; ranges: float32 [out, 2], smallest and largest
    error     Q - W
    gradient  (Q - W) H
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bits: int,
        hessian: torch.Tensor,
        entries: torch.Tensor,
        scales: torch.Tensor,
        ranges: torch.Tensor,
    ):
        self.weight, self.hessian = weight, hessian
        self.entries, self.scales, self.ranges = entries, scales, ranges
        self.table = centred_table(bits).to(weight.device)
        self.sweeps = 0
        self._evaluate()

    def _evaluate(self) -> None:
        self.levels = self.table.flatten()[self.entries.long()]
        self.error = from_groups(self.scales[..., None] * to_groups(self.levels), self.weight.shape[1]) - self.weight
        self.gradient = self.error @ self.hessian

    def sweep(self, outputs: Outputs) -> None:
        self.sweeps += 1
        updates = GradientUpdates(self.gradient, self.hessian)
        order = ring_columns().roll(CUT_STEP * self.sweeps)
        for index in range(self.scales.shape[1]):
            group = slice(index * GROUP_SIZE, (index + 1) * GROUP_SIZE)
            block = self.hessian[group, group].contiguous()
            entries, levels, gradient = (
                matrix[:, group].clone(memory_format=torch.contiguous_format)
                for matrix in (self.entries, self.levels, self.gradient)
            )
            scales, change = self.scales[:, index].clone(), torch.empty_like(levels)
            outputs.descend(
                LOOPS,
                (entries, levels, levels @ block, gradient, change, scales, self.ranges),
                block,
                *_ring_factors(block, order),
                order,
                self.table,
                DROPPED_BITS["float8"],
                written=(entries, levels, change, scales),
            )
            self.entries[:, group], self.levels[:, group], self.scales[:, index] = entries, levels, scales
            updates.add(group, change)
            self.error[:, group] += change

    def state(self) -> tuple[torch.Tensor, ...]:
        return self.entries, self.scales

    def restore(self, entries: torch.Tensor, scales: torch.Tensor) -> None:
        self.entries, self.scales = entries, scales
        self._evaluate()


def centred_table(bits: int) -> torch.Tensor:
    """Levels around 0: float32 [2**(bits - 1), 16]."""
    return level_table(bits).float().view(-1, 16) - middle_level(bits)


def _upper_factor(hessians: torch.Tensor) -> torch.Tensor:
    """C, upper triangular with C C^T each: float64, so that ill-conditioned ones have one -> float32 [..., n, n]."""
    return torch.linalg.cholesky(hessians.flip(-2, -1)).flip(-2, -1).float().contiguous()


def _ring_factors(block: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the Hessians of a group's rings, in this order: C and the inverse. block: float32 [128, 128]; result: float32
    [4, 32, 32] each."""
    order = order.to(block.device)
    rings = torch.stack([block[first + order][:, first + order] for first in range(0, GROUP_SIZE, RING)]).double()
    return _upper_factor(rings), torch.linalg.inv(rings).float().contiguous()


def quantize_trellis(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    order: torch.Tensor,
    inverse_factor: torch.Tensor,
    bits: int,
    *,
    refinement_sweeps: int,
    output_sweeps: int,
    outputs: Outputs | None,
    name: str,
) -> QuantizedTrellis:
    """quantize_gptq with trellis codes, and its errors.

    weight                          float32 [out, in]
    hessian, order, inverse_factor  those of a HessianFactor that was built for trellis codes
    """
    scales, ranges = _initial_scales(weight, hessian.diagonal(), bits, name)
    entries = _FirstPass(order, inverse_factor, bits, name).entries(weight, scales)
    missing = padded(weight.shape[1]) - weight.shape[1]
    whole = F.pad(hessian, (0, missing, 0, missing))
    whole.diagonal()[weight.shape[1] :] = PADDING_CURVATURE
    iterate = Iterate(F.pad(weight, (0, missing)), bits, whole, entries, scales, ranges)
    refine(iterate, refinement_sweeps)
    if outputs is not None:
        refine(iterate, output_sweeps, outputs)
    return QuantizedTrellis(bits, codes_of_entries(iterate.entries), iterate.scales.half(), weight.shape[1])


def _initial_scales(
    weight: torch.Tensor, importance: torch.Tensor, bits: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As if a group's weights were Gaussian: float32 [out, groups], and their ranges [out, 2]."""
    share = to_groups(importance) / to_groups(importance).sum(-1, keepdim=True)
    energy = (to_groups(weight).square() * share).sum(-1)
    scales = energy.sqrt() / LEVELS_PER_DEVIATION[bits]
    check_scales(energy, scales, "float8", name)
    ranges = scale_ranges(scales, bits, "float8")
    return storable_scales(scales, "float8", ranges), ranges


class _FirstPass:
    """GPTQ's pass over the rings."""

    def __init__(self, order: torch.Tensor, inverse_factor: torch.Tensor, bits: int, name: str):
        self.order, self.inverse_factor, self.table, self.name = order, inverse_factor, centred_table(bits), name
        self.columns = ring_columns().to(order.device)

    def entries(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """uint8 [out, whole groups]. weight: float32 [out, in]; scales: float32 [out, groups]."""
        remaining = weight[:, self.order]  # indexing copies
        found = torch.zeros(scales.shape[0], scales.shape[1] * GROUP_SIZE, dtype=torch.uint8, device=weight.device)
        rings = list(self._rings(weight.shape[1]))
        for first in range(0, len(rings), NEAR_RINGS):
            near = rings[first : first + NEAR_RINGS]
            begin, end, told = near[0][0].start, near[-1][0].stop, []
            for block, ring, present in near:
                scale = scales[:, RING * ring // GROUP_SIZE].contiguous()
                found[:, RING * ring + self.columns], passed_on = self._ring(remaining[:, block], present, scale, block)
                told.append(passed_on)
                remaining[:, block.stop : end].addmm_(passed_on, self.inverse_factor[block, block.stop : end])
            remaining[:, end:].addmm_(torch.cat(told, 1), self.inverse_factor[begin:end, end:])
        return found

    def _rings(self, in_features: int) -> Iterator[tuple[slice, int, torch.Tensor]]:
        """In their order: where a ring stands in the columns' order, its number, and bool [32], the columns of it that
        there are."""
        start = 0
        while start < len(self.order):
            ring = int(self.order[start]) // RING
            columns = RING * ring + self.columns
            present = columns < in_features
            stop = start + int(present.sum())
            if not torch.equal(self.order[start:stop], columns[present]):
                raise ValueError(f"{self.name}: its HessianFactor was not built for trellis codes")
            yield slice(start, stop), ring, present
            start = stop

    def _ring(
        self, weight: torch.Tensor, present: torch.Tensor, scales: torch.Tensor, block: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One ring's entries, uint8 [out, 32], and the errors that are passed on, float32 [out, columns].

        weight: float32 [out, columns], as the rings before have left it; present: bool [32], the ring's columns that
        there are; block: where they stand in the order.
        """
        triangle = self.inverse_factor[block, block]
        factor = torch.linalg.solve_triangular(triangle, torch.eye(len(triangle), device=triangle.device), upper=True)
        whole = PADDING_CURVATURE**0.5 * torch.eye(RING, device=factor.device)
        whole[present.nonzero(), present.nonzero()[:, 0]] = factor
        hessian = whole.double() @ whole.double().t()
        turned = _upper_factor(hessian.roll((RING // 2, RING // 2), (0, 1)))
        targets = weight.new_zeros(len(weight), RING)
        targets[:, present] = weight
        entries, errors = torch.empty_like(targets, dtype=torch.uint8), torch.empty_like(targets)
        rows, written = (targets, entries, errors, scales), (entries, errors)
        over_rows(first_pass, rows, whole, turned, self.table, written=written)
        return entries, errors[:, present] @ factor
