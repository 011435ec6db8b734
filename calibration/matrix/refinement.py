"""Refinement of a quantised matrix: exact least-squares grids and coordinate descent over codes, in turn.

Both steps minimise the same proxy loss tr(E H E^T), E = Q - W, as GPTQ, which decides each column once and
each grid before it has seen any code. Here nothing is final: a sweep goes from group to group and
    1. solves the group's scale and zero in every row exactly, given all codes (a 2 x 2 system under the full H),
    2. moves each of its codes to its optimum, given all others (QuantEase, arXiv 2309.01885),
and a row's iterate is kept only if its loss has fallen.
"""

from typing import NamedTuple

import numpy as np
import torch

from vllm_mcmoe.calibration.matrix.grids import LARGEST_FP16, SMALLEST_SCALE, Grid
from vllm_mcmoe.calibration.matrix.row_loops import descend_block, over_rows, sum_group
from vllm_mcmoe.kernels.packing import GROUP_SIZE

# A sweep that improves the total loss by less than this share ends the refinement.
SMALLEST_GAIN = 1e-4


def refine(weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, sweeps: int) -> torch.Tensor:
    """weight, codes: float32 [out, in]; hessian: float32 [in, in], symmetric, positive diagonal.

    Returns the refined codes and updates grid in place; no row's loss is higher than before.
    """
    state = _State(weight, codes.clone(), grid, hessian)
    best_loss, best_codes = state.loss(), codes
    best_scales, best_zeros = grid.scales.clone(), grid.zeros.clone()
    for _ in range(sweeps):
        state.sweep()
        loss = state.loss()
        better = loss < best_loss
        gain = float((best_loss - loss).clamp_min(0).sum())
        enough = gain > SMALLEST_GAIN * float(best_loss.sum())
        best_codes = torch.where(better[:, None], state.codes, best_codes)
        best_scales = torch.where(better[:, None], grid.scales, best_scales)
        best_zeros = torch.where(better[:, None], grid.zeros, best_zeros)
        best_loss = torch.where(better, loss, best_loss)
        if not enough:
            break
    grid.scales, grid.zeros = best_scales, best_zeros
    return best_codes


class _State:
    """One iterate. All matrices are [out, in].

    error     Q - W
    gradient  (Q - W) H: half the gradient of the loss by Q, kept up to date by every step
    """

    def __init__(self, weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor):
        self.weight, self.codes, self.grid, self.hessian = weight, codes, grid, hessian
        self.groups = [slice(i, i + GROUP_SIZE) for i in range(0, codes.shape[1], GROUP_SIZE)]
        self.error = grid.decode(codes) - weight
        self.gradient = self.error @ hessian

    def loss(self) -> torch.Tensor:
        """float32 [out]. Rounding of the gradient's updates, 1e-6 of it each, is far below what a sweep gains."""
        return (self.error * self.gradient).sum(1)

    def sweep(self) -> None:
        """Group by group, given everything else as it is by then: the loss-minimising scale and zero, then every code
        to its optimum. The other groups hear of both at once, in a product with the Hessian's rows; the only other
        product is that of the codes with the block on the diagonal."""
        largest = np.float32((1 << self.grid.bits) - 1)
        for index, group in enumerate(self.groups):
            block = self.hessian[group, group].contiguous()
            column_sums, step = block.sum(0), block.diagonal().reciprocal()
            codes = self.codes[:, group].contiguous()
            product = codes @ block
            # Becomes the gradient as it would be with this group's Q = 0: what the new values are fitted against.
            gradients = self.gradient[:, group].clone(memory_format=torch.contiguous_format)
            scales, zeros = self.grid.scales[:, index].contiguous(), self.grid.zeros[:, index].contiguous()
            sums, change = gradients.new_empty(len(codes), len(GroupSums._fields)), torch.empty_like(codes)
            rows = (codes, product, gradients, scales, zeros, sums)
            over_rows(sum_group, rows, column_sums, written=(gradients, sums))
            fit = _fit_scale if self.grid.bits == 1 else _fit_scale_and_zero
            fitted = fit(GroupSums(*sums.unbind(1)), block.sum(), scales, zeros)
            rows = (codes, product, gradients, change, scales, zeros, *fitted)
            over_rows(descend_block, rows, block, column_sums, step, largest, written=(codes, change))
            self.codes[:, group] = codes
            self.grid.scales[:, index], self.grid.zeros[:, index] = fitted
            self.gradient.addmm_(change, self.hessian[group])
            self.error[:, group] += change


class GroupSums(NamedTuple):
    """What the fits need of one group's codes c, float32 [out] each. B is the Hessian's block, w the gradient as it
    would be with the group's Q = 0."""

    by_code: torch.Tensor  # c B c^T
    mixed: torch.Tensor  # c B 1
    want_code: torch.Tensor  # -w c^T
    want_one: torch.Tensor  # -w 1


# Both fits: by_one is 1 B 1; scales, zeros [out] as they are, and returned as they should be, fp16-representable.


def _fit_scale(
    sums: GroupSums, by_one: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-parameter least squares of Q = scale * (codes - zero)."""
    curvature = sums.by_code - 2 * zeros * sums.mixed + zeros.square() * by_one
    fitted = (sums.want_code - zeros * sums.want_one) / curvature
    usable = (fitted > SMALLEST_SCALE) & (fitted < LARGEST_FP16)
    return torch.where(usable, fitted, scales).half().float(), zeros


def _fit_scale_and_zero(
    sums: GroupSums, by_one: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-parameter least squares of Q = scale * codes + offset, offset = -scale * zero."""
    determinant = sums.by_code * by_one - sums.mixed.square()
    fitted = (sums.want_code * by_one - sums.want_one * sums.mixed) / determinant
    # Codes that are all alike leave scale and offset undetermined: such a group keeps its grid.
    usable = (determinant > 1e-6 * sums.by_code * by_one) & (fitted > SMALLEST_SCALE) & (fitted < LARGEST_FP16)
    stored = torch.where(usable, fitted, scales).half().float()
    offset = (sums.want_one - stored * sums.mixed) / by_one  # the best one for the scale as it had to be rounded
    new_zeros = (-offset / stored).clamp(-LARGEST_FP16, LARGEST_FP16).half().float()
    return torch.where(usable, stored, scales), torch.where(usable, new_zeros, zeros)
