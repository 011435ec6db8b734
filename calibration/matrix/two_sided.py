"""Refinement that knows which outputs matter: tr(H_out E H_in E^T), E = Q - W, instead of tr(E H_in E^T).

H_out is the second moment of the loss gradient at the matrix' outputs, H_in that of its inputs; as a Kronecker product
they approximate the loss's curvature (YAQA, arXiv 2505.22988). Rows are then no longer independent of each other: an
error in one may make up for that of another. H_out is kept for blocks of rows, which bounds its memory and the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from vllm_mcmoe.calibration.common.threads import side_by_side
from vllm_mcmoe.calibration.matrix.refinement import RowLoops

# Figures: KL of the reference model, all experts at 2 bits, `python benchmarks/output_hessian.py`.
# Rows whose errors see each other: 0.0343 with none, 0.0279 / 0.0269 / 0.0257 / 0.0262 with 128 / 256 / 512 / 1024.
COUPLED_ROWS = 512
# Added to the diagonal, as a share of its mean, besides rows / tokens: the fewer tokens, the less their couplings are
# true. With 256 tokens of an expert 0.1050 without sweeps, 0.1061 / 0.1016 / 0.0997 damped by 0.1 / 0.5 / 2 and 0.1007
# by the sum; with 1024: 0.0615, 0.0564 / 0.0541 / 0.0553 and 0.0532; with 8192: 0.0343, 0.0255 / 0.0259 / 0.0265 /
# 0.0278 damped by 0.03 / 0.1 / 0.3 / 1 and 0.0257.
OUTPUT_DAMPING = 0.1


def output_damping(rows: int, tokens: int) -> float:
    """What is added to the diagonal of second moments of so many outputs at so many tokens, in units of its mean."""
    return OUTPUT_DAMPING + rows / tokens


@dataclass(frozen=True)
class OutputHessian:
    """Second moments of the loss gradient at a matrix' outputs: refinement.Outputs that couple rows.

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
            block.diagonal().add_(output_damping(len(block), tokens))
        return cls(rows, blocks)

    def losses(self, error: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """A row's even share of tr(H_out E H_in E^T) of its block, so that a block's rows rise and fall together."""
        losses = error.new_empty(len(error))
        for rows, block in zip(self.rows, self.blocks, strict=True):
            losses[rows] = ((block @ error[rows]) * gradient[rows]).sum() / len(rows)
        return losses

    def descend(
        self, loops: RowLoops, by_row: tuple[torch.Tensor, ...], *shared: object, written: tuple[torch.Tensor, ...]
    ) -> None:
        """The blocks side by side, on the CPU."""
        common = [value.cpu().numpy() if isinstance(value, torch.Tensor) else value for value in shared]
        parts = [[tensor[rows].cpu() for tensor in by_row] for rows in self.rows]  # indexing copies

        def descend(number: int) -> None:
            arrays = (part.numpy() for part in parts[number])
            loops.coupled(*arrays, self.blocks[number].cpu().numpy(), *common)

        side_by_side(descend, range(len(parts)))
        for rows, part in zip(self.rows, parts, strict=True):
            for tensor, changed in zip(by_row, part, strict=True):
                if any(tensor is wanted for wanted in written):
                    tensor[rows] = changed.to(tensor.device)
