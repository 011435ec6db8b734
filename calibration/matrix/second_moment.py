"""The second moment of a matrix' inputs, which GPTQ calls its Hessian."""

from collections.abc import Iterable
from typing import Self

import torch

MOMENT_ROWS = 1024  # that one product gives: few enough to leave out the lower half, many enough for speed


class SecondMoment:
    """sum_t w_t x_t x_t^T, added up batch by batch.

    What lies below the diagonal is what lies above it: blocks of rows from their diagonal on are half the work.
    """

    def __init__(self) -> None:
        self._upper: torch.Tensor | None = None

    @classmethod
    def of(cls, batches: Iterable[torch.Tensor]) -> Self:
        """batches: float32 [tokens, in] each, all weights 1."""
        moment = cls()
        for x in batches:
            moment.add(x)
        return moment

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """x: float32 [tokens, in]; weights: float32 [tokens], or None where all are 1."""
        if self._upper is None:
            self._upper = x.new_zeros(x.shape[1], x.shape[1])
        weighted = x if weights is None else x * weights[:, None]
        for first in range(0, len(self._upper), MOMENT_ROWS):
            rows = slice(first, first + MOMENT_ROWS)
            self._upper[rows, first:].addmm_(weighted[:, rows].t(), x[:, first:])

    def matrix(self) -> torch.Tensor:
        """float32 [in, in], exactly symmetric, on the batches' device. Nothing can be added afterwards."""
        moment, self._upper = self._upper, None
        for first in range(0, len(moment), MOMENT_ROWS):
            rows = slice(first, first + MOMENT_ROWS)
            moment[rows, rows] = moment[rows, rows].triu() + moment[rows, rows].triu(1).t()
            moment[first + MOMENT_ROWS :, rows] = moment[rows, first + MOMENT_ROWS :].t()
        return moment
