"""Refinement of a quantised matrix: exact least-squares grids and coordinate descent over codes, in turn.

Both steps minimise the same proxy loss tr(E H E^T), E = Q - W, as GPTQ, which decides each column once and
each grid before it has seen any code. Here nothing is final: a sweep goes from group to group and
    1. solves the group's scale and zero in every row exactly, given all codes (a 2 x 2 system under the full H),
    2. moves each of its codes to its optimum, given all others (QuantEase, arXiv 2309.01885),
and a row's iterate is kept only if its loss has fallen.
"""

import numpy as np
import torch

from vllm_mcmoe.calibration.matrix.grids import LARGEST_FP16, SMALLEST_SCALE, Grid
from vllm_mcmoe.calibration.matrix.row_loops import descend_block, over_rows
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
        to its optimum. The other groups hear of both at once, which is the sweep's one product with the Hessian."""
        fit = _fit_scale if self.grid.bits == 1 else _fit_scale_and_zero
        largest = np.float32((1 << self.grid.bits) - 1)
        for index, group in enumerate(self.groups):
            block = self.hessian[group, group].contiguous()
            codes = self.codes[:, group].contiguous()
            scales, zeros = self.grid.scales[:, index, None], self.grid.zeros[:, index, None]
            # The gradient as it would be with this group's Q = 0: what the new values are fitted against.
            without = self.gradient[:, group] - ((codes - zeros) * scales) @ block
            scales, zeros = fit(codes, without, block, scales, zeros)
            gradients = without.addmm_((codes - zeros) * scales, block)
            rows_scales = scales[:, 0].contiguous()
            step, rows = block.diagonal().reciprocal(), (codes, gradients, rows_scales)
            over_rows(descend_block, rows, block, step, largest, written=(codes,))
            self.codes[:, group] = codes
            self.grid.scales[:, index], self.grid.zeros[:, index] = scales[:, 0], zeros[:, 0]
            new_error = (codes - zeros) * scales - self.weight[:, group]
            self.gradient.addmm_(new_error - self.error[:, group], self.hessian[group])
            self.error[:, group] = new_error


# Both fits: codes, without [out, 128]; block [128, 128], smaller in a last group that is not whole; scales, zeros
# [out, 1] and returned so, fp16-representable.


def _fit_scale(
    codes: torch.Tensor, without: torch.Tensor, block: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-parameter least squares of Q = scale * (codes - zero)."""
    basis = codes - zeros
    fitted = -(basis * without).sum(1, keepdim=True) / (basis * (basis @ block)).sum(1, keepdim=True)
    usable = (fitted > SMALLEST_SCALE) & (fitted < LARGEST_FP16)
    return torch.where(usable, fitted, scales).half().float(), zeros


def _fit_scale_and_zero(
    codes: torch.Tensor, without: torch.Tensor, block: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-parameter least squares of Q = scale * codes + offset, offset = -scale * zero."""
    product = codes @ block
    by_code, mixed, by_one = (codes * product).sum(1, keepdim=True), product.sum(1, keepdim=True), block.sum()
    want_code, want_one = -(codes * without).sum(1, keepdim=True), -without.sum(1, keepdim=True)
    determinant = by_code * by_one - mixed.square()
    fitted = (want_code * by_one - want_one * mixed) / determinant
    # Codes that are all alike leave scale and offset undetermined: such a group keeps its grid.
    usable = (determinant > 1e-6 * by_code * by_one) & (fitted > SMALLEST_SCALE) & (fitted < LARGEST_FP16)
    stored = torch.where(usable, fitted, scales).half().float()
    offset = (want_one - stored * mixed) / by_one  # the best one for the scale as it had to be rounded
    new_zeros = (-offset / stored).clamp(-LARGEST_FP16, LARGEST_FP16).half().float()
    return torch.where(usable, stored, scales), torch.where(usable, new_zeros, zeros)
