"""Refinement of a quantised matrix: exact least-squares grids and coordinate descent over codes, in turn.

Both steps minimise the same proxy loss tr(E H E^T), E = Q - W, as GPTQ, which decides each column once and
each grid before it has seen any code. Here nothing is final: each sweep
    1. solves scale and zero of every row and group exactly, given the codes (a 2 x 2 system under the full H),
    2. moves every code to its optimum, given all others (QuantEase, arXiv 2309.01885),
and a row's iterate is kept only if its loss has fallen.
"""

import torch

from vllm_mcmoe.calibration.quantizers import LARGEST_FP16, SMALLEST_SCALE, Grid
from vllm_mcmoe.kernels.packing import GROUP_SIZE

# A sweep that improves the total loss by less than this share ends the refinement.
SMALLEST_GAIN = 1e-4


def refine(weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, sweeps: int) -> torch.Tensor:
    """weight, codes: float32 [out, in]; hessian: float32 [in, in], symmetric, positive diagonal.

    Returns the refined codes and updates grid in place; no row's loss is higher than before.
    """
    state = _State(weight, codes, grid, hessian)
    best_loss, best_codes = state.loss(), codes
    best_scales, best_zeros = grid.scales.clone(), grid.zeros.clone()
    for _ in range(sweeps):
        state.refit_grids()
        state.descend_codes()
        loss = state.loss()
        better = loss < best_loss
        gain = float((best_loss - loss)[better].sum()) if bool(better.any()) else 0.0
        total = float(best_loss.sum())
        best_codes = torch.where(better[:, None], state.codes.t(), best_codes)
        best_scales = torch.where(better[:, None], grid.scales, best_scales)
        best_zeros = torch.where(better[:, None], grid.zeros, best_zeros)
        best_loss = torch.where(better, loss, best_loss)
        if gain <= SMALLEST_GAIN * total:
            break
    grid.scales, grid.zeros = best_scales, best_zeros
    return best_codes.contiguous()


class _State:
    """One iterate. Matrices are transposed, [in, out], so that a column's values for all rows are contiguous.

    error      Q - W
    gradient   H (Q - W): half the gradient of the loss by Q, kept up to date by every step
    """

    def __init__(self, weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor):
        self.weight = weight.t().contiguous()
        self.codes = codes.t().contiguous()
        self.grid = grid
        self.hessian = hessian
        self.groups = [slice(i, i + GROUP_SIZE) for i in range(0, len(self.codes), GROUP_SIZE)]
        self.error = self._decode() - self.weight
        self.gradient = hessian @ self.error

    def _decode(self) -> torch.Tensor:
        groups = self.codes.unflatten(0, (-1, GROUP_SIZE))
        return ((groups - self.grid.zeros.t()[:, None]) * self.grid.scales.t()[:, None]).flatten(0, 1)

    def loss(self) -> torch.Tensor:
        """float32 [out]; also recomputes error and gradient, so that rounding does not accumulate."""
        self.error = self._decode() - self.weight
        self.gradient = self.hessian @ self.error
        return (self.error * self.gradient).sum(0)

    def _move(self, group: slice, new_error: torch.Tensor) -> None:
        self.gradient.addmm_(self.hessian[:, group], new_error - self.error[group])
        self.error[group] = new_error

    def refit_grids(self) -> None:
        """Gauss-Seidel over groups: the loss-minimising scale and zero of each, given everything else."""
        for index, group in enumerate(self.groups):
            codes, scales, zeros = self.codes[group], self.grid.scales[:, index], self.grid.zeros[:, index]
            block = self.hessian[group, group]
            # The part of the gradient that this group's present values do not cause, i.e. for Q_g = 0.
            current = (codes - zeros) * scales
            without = self.gradient[group] - block @ current
            if self.grid.bits == 1:
                new_scales, new_zeros = _fit_scale(codes, without, block, scales, zeros)
            else:
                new_scales, new_zeros = _fit_scale_and_zero(codes, without, block, scales, zeros)
            self.grid.scales[:, index], self.grid.zeros[:, index] = new_scales, new_zeros
            self._move(group, (codes - new_zeros) * new_scales - self.weight[group])

    def descend_codes(self) -> None:
        """One pass: every code to its optimum, given all others as they are by then."""
        largest = float((1 << self.grid.bits) - 1)
        for index, group in enumerate(self.groups):
            scales, zeros = self.grid.scales[:, index], self.grid.zeros[:, index]
            block = self.hessian[group, group]
            step = block.diagonal().reciprocal()
            gradient, codes = self.gradient[group].clone(), self.codes[group]
            for i in range(GROUP_SIZE):
                # With all else fixed the loss is a parabola in this code.
                code = codes[i] - gradient[i] * step[i] / scales
                code = code.round_().clamp_(0, largest)
                gradient.addr_(block[i], (code - codes[i]) * scales)
                codes[i] = code
            self._move(group, (codes - zeros) * scales - self.weight[group])


def _fit_scale(
    codes: torch.Tensor,
    without: torch.Tensor,
    block: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-parameter least squares Q_g = scale * (codes - zero). codes, without: [128, out]; block: [128, 128]."""
    basis = codes - zeros
    curvature = (basis * (block @ basis)).sum(0)
    fitted = -(basis * without).sum(0) / curvature
    usable = (curvature > 0) & (fitted > SMALLEST_SCALE) & (fitted < LARGEST_FP16)
    return torch.where(usable, fitted, scales).half().float(), zeros


def _fit_scale_and_zero(
    codes: torch.Tensor,
    without: torch.Tensor,
    block: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-parameter least squares Q_g = scale * codes + offset, returned as fp16-representable scale and zero."""
    product = block @ codes
    cc, c1, one = (codes * product).sum(0), product.sum(0), block.sum()
    bc, b1 = -(codes * without).sum(0), -without.sum(0)
    determinant = cc * one - c1 * c1
    fitted = (bc * one - b1 * c1) / determinant
    usable = (determinant > 1e-6 * cc * one) & (fitted > SMALLEST_SCALE) & (fitted < LARGEST_FP16)
    stored = torch.where(usable, fitted, scales).half().float()
    # Given the rounded scale, the best offset: cannot be worse than the one solved for jointly.
    offset = (b1 - stored * c1) / one
    new_zeros = (-offset / stored).clamp(-LARGEST_FP16, LARGEST_FP16).half().float()
    usable = usable & (one > 0)
    return torch.where(usable, stored, scales), torch.where(usable, new_zeros, zeros)
