"""Refinement that knows which outputs matter: tr(H_out E H_in E^T), E = Q - W, instead of tr(E H_in E^T).

H_out is the second moment of the loss gradient at the matrix' outputs, H_in that of its inputs; as a Kronecker product
they approximate the loss's curvature (YAQA, arXiv 2505.22988). Rows are then no longer independent of each other: an
error in one may make up for that of another. H_out is kept for blocks of rows, which bounds its memory and the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from vllm_mcmoe.calibration.matrix.grids import LARGEST_FP16, SMALLEST_SCALE, Grid
from vllm_mcmoe.calibration.matrix.refinement import SMALLEST_GAIN
from vllm_mcmoe.calibration.matrix.row_loops import descend_coupled, side_by_side
from vllm_mcmoe.kernels.packing import GROUP_SIZE

# Rows whose errors see each other. KL of the reference model at 2.0 bits: 0.0256 with all 1024 and 256 rows of its
# matrices in one, 0.0262 with 256 each, 0.0274 with 128; 0.0343 with none.
COUPLED_ROWS = 512
# Share of the mean diagonal that is added, besides rows / tokens: the fewer tokens, the less their couplings are true.
# KL of the reference model, uniform 2 bits, with 256 tokens of an expert: 0.1067 without, 0.1081 / 0.1027 / 0.1016
# damped by 0.1 / 0.5 / 2; with 1024: 0.0611, 0.0558 / 0.0552 / 0.0570; with 8192, at 2.0 bits: 0.0343, and
# 0.0259 / 0.0266 / 0.0261 / 0.0279 damped by 0.03 / 0.1 / 0.3 / 1.
OUTPUT_DAMPING = 0.1


@dataclass(frozen=True)
class OutputHessian:
    """Second moments of the loss gradient at a matrix' outputs.

    rows    int64 [n] each, which together are all of the matrix' rows
    blocks  float32 [n, n] each, damped; the mean diagonal of all is 1 before that
    """

    rows: list[torch.Tensor]
    blocks: list[torch.Tensor]

    @classmethod
    def build(
        cls, rows: list[torch.Tensor], moments: Sequence[torch.Tensor], tokens: int, *, name: str = "output hessian"
    ) -> Self:
        """moments: float32 [n, n] each, positive semidefinite, any scale; tokens: they are sums over so many.

        Raises ValueError naming the matrix for entries that are not finite.
        """
        if not all(torch.isfinite(moment).all() for moment in moments):
            raise ValueError(f"{name}: the loss gradients at its outputs have NaN or infinite entries")
        mean = float(torch.cat([moment.diagonal() for moment in moments]).mean())
        blocks = [moment / mean if mean > 0 else torch.zeros_like(moment) for moment in moments]
        for block in blocks:
            block.diagonal().add_(OUTPUT_DAMPING + len(block) / tokens)
        return cls(rows, blocks)


def refine_two_sided(
    weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, outputs: OutputHessian, sweeps: int
) -> torch.Tensor:
    """weight, codes: float32 [out, in]; hessian: float32 [in, in], symmetric, positive diagonal.

    Returns the refined codes and updates grid in place; the loss of no block of rows is higher than before.
    """
    order = torch.cat(outputs.rows).to(weight.device)
    ordered = Grid(grid.bits, grid.scales[order], grid.zeros[order])
    state = _State(weight[order], codes[order], ordered, hessian, outputs.blocks)
    losses = state.losses()
    best_codes, best_scales, best_zeros = state.codes.clone(), ordered.scales.clone(), ordered.zeros.clone()
    for _ in range(sweeps):
        state.sweep()
        found = state.losses()
        for rows, loss, least in zip(state.rows, found, losses, strict=True):
            if loss < least:
                best_codes[rows] = state.codes[rows]
                best_scales[rows], best_zeros[rows] = ordered.scales[rows], ordered.zeros[rows]
        gain = sum(max(least - loss, 0.0) for loss, least in zip(found, losses, strict=True))
        enough = gain > SMALLEST_GAIN * sum(losses)
        losses = [min(pair) for pair in zip(found, losses, strict=True)]
        if not enough:
            break
    result = torch.empty_like(codes)
    result[order], grid.scales[order], grid.zeros[order] = best_codes, best_scales, best_zeros
    return result


class _State:
    """One iterate, blocks of rows one after another. All matrices are [out, in].

    rows      of each block
    error     Q - W
    gradient  (Q - W) H_in, kept up to date by every step
    """

    def __init__(
        self,
        weight: torch.Tensor,
        codes: torch.Tensor,
        grid: Grid,
        hessian: torch.Tensor,
        blocks: Sequence[torch.Tensor],
    ):
        self.codes, self.grid, self.hessian, self.blocks = codes, grid, hessian, blocks
        self.error = grid.decode(codes) - weight
        self.gradient = self.error @ hessian
        self.rows, first = [], 0
        for block in blocks:
            self.rows.append(slice(first, first := first + len(block)))
        self._couplings = [block.cpu().contiguous().numpy() for block in blocks]

    def losses(self) -> list[float]:
        """tr(H_out E H_in E^T) of every block."""
        return [
            float(((block @ self.error[rows]) * self.gradient[rows]).sum(dtype=torch.float64))
            for block, rows in zip(self.blocks, self.rows, strict=True)
        ]

    def sweep(self) -> None:
        """Group by group of columns, as in refinement.py; the other groups hear of a group's changes at once."""
        for index, start in enumerate(range(0, self.codes.shape[1], GROUP_SIZE)):
            group = slice(start, start + GROUP_SIZE)
            change = self._sweep_group(index, group)
            self.gradient.addmm_(change, self.hessian[group])
            self.error[:, group] += change

    def _sweep_group(self, index: int, group: slice) -> torch.Tensor:
        """Returns by how much Q changes, float32 [out, 128]."""
        block = self.hessian[group, group].cpu().contiguous()
        codes, own = (
            m[:, group].cpu().clone(memory_format=torch.contiguous_format) for m in (self.codes, self.gradient)
        )
        scales, zeros = (values[:, index].cpu().clone() for values in (self.grid.scales, self.grid.zeros))
        change, product = torch.empty_like(codes), codes @ block
        by_row = [tensor.numpy() for tensor in (codes, product, own, change, scales, zeros)]
        shared = [tensor.numpy() for tensor in (block, block.sum(0), block.diagonal().reciprocal())]
        limits = ((1 << self.grid.bits) - 1, SMALLEST_SCALE, LARGEST_FP16, float(block.sum()))

        def descend(number: int) -> None:
            arrays = (array[self.rows[number]] for array in by_row)
            descend_coupled(
                *arrays, self._couplings[number], *shared, np.array(limits, dtype=np.float32), self.grid.bits == 1
            )

        side_by_side(descend, range(len(self.rows)))
        self.codes[:, group] = codes.to(self.codes.device)
        self.grid.scales[:, index] = scales.to(self.codes.device)
        self.grid.zeros[:, index] = zeros.half().float().to(self.codes.device)  # fp16 has small ones in coarser steps
        return change.to(self.codes.device)
