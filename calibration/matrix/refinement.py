"""Refinement of a quantised matrix: exact least-squares grids and coordinate descent over codes, in turn.

Both steps minimise the same loss as GPTQ, which decides each column once and each grid before it has seen any code:
tr(E H E^T), E = Q - W, or with the Hessian of the outputs (two_sided.py) tr(H_out E H E^T). Here nothing is final: a
sweep goes from group to group and
    1. solves the group's scale and zero in every row exactly, given all codes (a 2 x 2 system under the full H),
    2. moves each of its codes to its optimum, given all others (QuantEase, arXiv 2309.01885),
and a row's iterate is kept only if its loss has fallen.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

from vllm_mcmoe.calibration.matrix.grids import DROPPED_BITS, Grid
from vllm_mcmoe.calibration.matrix.row_loops import descend_coupled, descend_rows, over_rows
from vllm_mcmoe.kernels.packing import GROUP_SIZE

# Columns that hear of a group's change at once. A product with all others reads and writes the whole gradient, which is
# what takes the time where that is wide: they hear of so many columns' changes together. These products of a sweep take
# 119 / 87 / 80 / 57 ns a weight of 14,336 columns with all / 512 / 1024 / 2048; with 4096 columns it is all the same.
NEAR_COLUMNS = 2048

# A sweep that improves the total loss by less than this share ends the refinement.
SMALLEST_GAIN = 1e-4


class RowLoops(NamedTuple):
    """A sweep's work on one group, compiled: for rows that are problems of their own, and for rows that H_out couples,
    which is then the first of what they share."""

    separate: Callable[..., None]
    coupled: Callable[..., None]


LOOPS = RowLoops(descend_rows, descend_coupled)


class Outputs(Protocol):
    """How the rows of a matrix share the loss."""

    def losses(self, error: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Of each row, or its share of the loss of those it is coupled to. float32 [out, in] each, E and E H ->
        float32 [out]."""

    def descend(
        self, loops: RowLoops, by_row: tuple[torch.Tensor, ...], *shared: object, written: tuple[torch.Tensor, ...]
    ) -> None:
        """One of the loops on every row, or on every block of coupled rows. by_row, shared: what the loops take, but
        for the coupling; written: those of by_row that the caller wants back."""


class SeparateRows:
    """Every output matters alike: the rows are problems of their own."""

    def losses(self, error: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return (error * gradient).sum(1)

    def descend(
        self, loops: RowLoops, by_row: tuple[torch.Tensor, ...], *shared: object, written: tuple[torch.Tensor, ...]
    ) -> None:
        over_rows(loops.separate, by_row, *shared, written=written)


class Refined(Protocol):
    """A matrix while it is refined. error and gradient, float32 [out, in], are Q - W and (Q - W) H."""

    error: torch.Tensor
    gradient: torch.Tensor

    def sweep(self, outputs: Outputs) -> None:
        """One round over all groups."""

    def state(self) -> tuple[torch.Tensor, ...]:
        """What determines Q, [out, ...] each. Sweeps may change these tensors."""

    def restore(self, *state: torch.Tensor) -> None:
        """Go back to what state() once gave."""


class GradientUpdates:
    """What changes of groups, one after another in their order, do to the gradient of all columns. When the last group
    has been told, the gradient is up to date."""

    def __init__(self, gradient: torch.Tensor, hessian: torch.Tensor):
        """gradient: float32 [out, in], changed; hessian: float32 [in, in]."""
        self._gradient, self._hessian = gradient, hessian
        self._waiting = gradient.new_empty(len(gradient), min(NEAR_COLUMNS, gradient.shape[1]))

    def add(self, group: slice, change: torch.Tensor) -> None:
        """change: float32 [out, group's columns], of Q there. Columns from the group's on, up to the next multiple of
        NEAR_COLUMNS, have heard of it then."""
        columns = self._gradient.shape[1]
        first = group.start - group.start % NEAR_COLUMNS
        near = slice(first, min(first + NEAR_COLUMNS, columns))
        group = slice(group.start, min(group.stop, columns))
        self._gradient[:, near].addmm_(change, self._hessian[group, near])
        self._waiting[:, group.start - first : group.stop - first] = change
        if group.stop == near.stop:
            waiting = self._waiting[:, : near.stop - first]
            for others in (slice(0, first), slice(near.stop, columns)):
                if others.stop > others.start:
                    self._gradient[:, others].addmm_(waiting, self._hessian[near, others])


class Iterate:
    """A matrix while it is refined. All matrices are float32 [out, in].

    codes     as they are; grid, in place, as it is
    error     Q - W
    gradient  (Q - W) H: half the gradient of a separate row's loss by Q, kept up to date by every step. Rounding of the
              updates, 1e-6 of it each, is far below what a sweep gains
    """

    def __init__(self, weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor):
        """weight, codes: float32 [out, in]; hessian: float32 [in, in], symmetric, positive diagonal."""
        self.weight, self.codes, self.grid, self.hessian = weight, codes.clone(), grid, hessian
        self.groups = [slice(i, i + GROUP_SIZE) for i in range(0, codes.shape[1], GROUP_SIZE)]
        self.error = grid.decode(codes) - weight
        self.gradient = self.error @ hessian

    def sweep(self, outputs: Outputs) -> None:
        """Group by group, given everything else as it is by then. The other groups hear of a group's new grid and codes
        before it is their turn, in a product with the Hessian's rows; the only other product is that of the codes with
        the block on the diagonal."""
        updates = GradientUpdates(self.gradient, self.hessian)
        largest, dropped = (1 << self.grid.bits) - 1, DROPPED_BITS[self.grid.metadata]
        for index, group in enumerate(self.groups):
            block = self.hessian[group, group].contiguous()
            codes, gradient = (
                matrix[:, group].clone(memory_format=torch.contiguous_format) for matrix in (self.codes, self.gradient)
            )
            scales, zeros = self.grid.scales[:, index].clone(), self.grid.zeros[:, index].clone()
            change = torch.empty_like(codes)
            limits = np.array([largest, dropped, float(block.sum())], dtype=np.float32)
            outputs.descend(
                LOOPS,
                (codes, codes @ block, gradient, change, scales, zeros, self.grid.ranges),
                block,
                block.sum(0),
                block.diagonal().reciprocal(),
                limits,
                not self.grid.has_zeros,
                written=(codes, change, scales, zeros),
            )
            self.codes[:, group] = codes
            self.grid.scales[:, index], self.grid.zeros[:, index] = scales, zeros
            updates.add(group, change)
            self.error[:, group] += change

    def state(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.grid.scales, self.grid.zeros

    def restore(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        """Go back to these in the rows where they are others."""
        differs = (self.codes != codes).any(1) | ((self.grid.scales != scales) | (self.grid.zeros != zeros)).any(1)
        self.codes, self.grid.scales, self.grid.zeros = codes, scales, zeros
        if differs.any():
            self.error[differs] = self.grid.decode(codes)[differs] - self.weight[differs]
            self.gradient[differs] = self.error[differs] @ self.hessian


def refine(iterate: Refined, sweeps: int, outputs: Outputs | None = None) -> None:
    """Up to so many sweeps, which leave no row's loss, or that of no rows coupled to each other, higher than before.

    outputs: how the loss looks at the outputs; all alike if not given
    """
    outputs = outputs or SeparateRows()
    best_loss = outputs.losses(iterate.error, iterate.gradient)
    best = tuple(tensor.clone() for tensor in iterate.state())
    for _ in range(sweeps):
        iterate.sweep(outputs)
        loss = outputs.losses(iterate.error, iterate.gradient)
        better = loss < best_loss
        gain = float((best_loss - loss).clamp_min(0).sum())
        enough = gain > SMALLEST_GAIN * float(best_loss.sum())
        best = tuple(torch.where(better[:, None], new, old) for new, old in zip(iterate.state(), best, strict=True))
        best_loss = torch.where(better, loss, best_loss)
        if not enough:
            break
    iterate.restore(*best)
