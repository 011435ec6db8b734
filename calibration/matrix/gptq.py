"""GPTQ (arXiv 2210.17323) in groups of 128, and the refinement that follows it.

The quantity minimised is the proxy loss tr((Q - W) H (Q - W)^T): the squared error of the layer's output over the
calibration tokens, whose (possibly weighted) second moment H = sum_t x_t x_t^T is.

H belongs to the inputs, not to a width: build its factor once, then quantise to as many widths as needed.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from vllm_mcmoe.calibration.matrix.grids import (
    Grid,
    Metadata,
    QuantizedMatrix,
    check_weight,
    quantize_rtn,
    search_grid,
)
from vllm_mcmoe.calibration.matrix.refinement import Iterate, refine
from vllm_mcmoe.calibration.matrix.row_loops import gptq_block, over_rows
from vllm_mcmoe.calibration.matrix.trellis import QuantizedTrellis, quantize_trellis, ring_order
from vllm_mcmoe.calibration.matrix.two_sided import OutputHessian
from vllm_mcmoe.kernels.packing import GROUP_SIZE, TRELLIS_WIDTHS, Kind

BLOCK = GROUP_SIZE  # columns quantised between two updates of all later columns; a block is one group of the grid
DAMPING_ESCALATION = 10.0
MAX_DAMPING = 1e4  # times the mean diagonal; such a matrix is diagonal to fp32, so Cholesky cannot fail
INVERTED_AT_ONCE = 512  # columns of a triangular matrix; larger ones are inverted in halves


@dataclass(frozen=True)
class GPTQOptions:
    """How one matrix is quantised.

    damping                  added to the Hessian's diagonal, as a share of its mean
    act_order                quantise the columns in order of falling Hessian diagonal. The groups stay those of the
                             file: their grids are fixed up front from the original weights
    mse_search               least-squares grids weighted by the Hessian's diagonal; off: grids span the range
    compensate               off: round to nearest, grids from the weights alone; only mse_search counts then
    compensate_within_block  off: a column's error is only passed on to later blocks of 128, as the authors' code
                             does below 4 bits (docs/method.md, section 2)
    refinement_sweeps        rounds of least-squares grids and coordinate descent over the codes after GPTQ; 0 is
                             plain GPTQ
    output_sweeps            rounds of the same under the Hessian of the outputs, too, where one is given
    metadata                 of each group: "float16" scale and zero, or "float8" scale alone
    codes                    of up to 4 bits, those of 8 are scalar; "trellis" is for "float8", and goes through the
                             columns in an order of its own
    """

    damping: float = 0.01
    act_order: bool = False
    mse_search: bool = True
    compensate: bool = True
    compensate_within_block: bool = True
    refinement_sweeps: int = 0
    output_sweeps: int = 0
    metadata: Metadata = "float16"
    codes: Kind = "scalar"

    def __post_init__(self) -> None:
        if self.codes == "trellis" and not (self.metadata == "float8" and self.compensate):
            raise ValueError("trellis codes go with metadata 'float8', which stores no zeros, and with compensate")


@dataclass(frozen=True)
class HessianFactor:
    """What GPTQ needs of one Hessian, computed once and used for every width.

    hessian          float32 [in, in], damped, in the file's column order
    order            int64 [in], the columns in the order they are quantised
    inverse_factor   float32 [in, in] upper triangular U with U^T U = H^-1, in that order
    dead             bool [in], columns whose input was always zero: rounded to nearest, they disturb nothing
    damping          share of the mean diagonal that was added; more than asked for where Cholesky needed it
    """

    hessian: torch.Tensor
    order: torch.Tensor
    inverse_factor: torch.Tensor
    dead: torch.Tensor
    damping: float

    @classmethod
    def build(
        cls, hessian: torch.Tensor, options: GPTQOptions | None = None, *, name: str = "hessian"
    ) -> "HessianFactor":
        """hessian: float [in, in], symmetric positive semidefinite, any scale. It is not modified.

        Raises ValueError naming the matrix for a shape that is not square or entries that are not finite.
        """
        options = options or GPTQOptions()
        if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
            raise ValueError(f"{name}: shape {list(hessian.shape)}, expected [in, in]")
        if not all(math.isfinite(extreme) for extreme in hessian.aminmax()):  # NaN is both minimum and maximum
            raise ValueError(f"{name}: the Hessian has NaN or infinite entries; its inputs overflowed")
        hessian = hessian.to(torch.float32, copy=True)
        diagonal = hessian.diagonal()
        dead = diagonal <= 0
        mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
        hessian /= mean  # from here on the mean diagonal is 1, whatever the inputs' scale
        if dead.any():
            hessian[dead, :] = 0
            hessian[:, dead] = 0
            diagonal[dead] = 1.0
        if options.codes == "trellis":
            order = ring_order(diagonal)
        elif options.act_order:
            order = torch.argsort(diagonal, descending=True, stable=True)
        else:
            order = torch.arange(len(dead), device=hessian.device)
        inverse_factor, damping = _inverse_factor(hessian, order, options.damping)
        diagonal += damping
        return cls(hessian, order, inverse_factor, dead, damping)

    @classmethod
    def identity(cls, in_features: int, device: torch.device | str = "cpu") -> "HessianFactor":
        """For an expert without calibration tokens: every column alike, GPTQ becomes round-to-nearest."""
        return cls.build(torch.eye(in_features, device=device))


def _inverse_factor(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Upper triangular U with U^T U = (H + damping I)^-1, rows and columns in this order, and the damping that made it
    possible."""
    # With J the exchange matrix, J H J = L L^T gives U = J L^-1 J: one factorisation and no explicit inverse.
    backwards = order.flip(0)
    while damping <= MAX_DAMPING:
        flipped = hessian.index_select(0, backwards).index_select(1, backwards)
        flipped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(flipped)
        del flipped  # which is as large as everything else here
        if not int(failed):
            inverse = _triangular_inverse(factor)
            if all(math.isfinite(extreme) for extreme in inverse.aminmax()):
                return inverse.flip(0, 1), damping
        damping = max(damping * DAMPING_ESCALATION, 1e-6)
    raise ValueError("the Hessian is not positive semidefinite: Cholesky fails at any damping")


def _triangular_inverse(lower: torch.Tensor) -> torch.Tensor:
    """Of a lower triangular matrix [n, n]. solve_triangular against the identity multiplies by its zeros, too: n^3 / 2
    multiply-adds, where halves, themselves inverted, leave n^3 / 6."""
    size = len(lower)
    if size <= INVERTED_AT_ONCE:
        return torch.linalg.solve_triangular(lower, torch.eye(size, device=lower.device), upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _triangular_inverse(lower[:half, :half])
    inverse[half:, half:] = _triangular_inverse(lower[half:, half:])
    # [[A, 0], [B, C]] has the inverse [[A^-1, 0], [-C^-1 B A^-1, C^-1]]
    below = torch.linalg.solve_triangular(lower[half:, half:], lower[half:, :half], upper=False)
    inverse[half:, :half] = torch.linalg.solve_triangular(lower[:half, :half], below, upper=False, left=False).neg_()
    return inverse


def proxy_loss(
    weight: torch.Tensor, quantized: QuantizedMatrix | QuantizedTrellis, factor: HessianFactor
) -> torch.Tensor:
    """diag((Q - W) H (Q - W)^T): float32 [out], one loss per row; H is damped and of mean diagonal 1."""
    error = quantized.dequantize() - weight.float()
    return ((error @ factor.hessian) * error).sum(-1)


def quantize_gptq(
    weight: torch.Tensor,
    factor: HessianFactor,
    bits: int,
    options: GPTQOptions | None = None,
    *,
    outputs: OutputHessian | None = None,
    name: str = "weight",
) -> QuantizedMatrix | QuantizedTrellis:
    """Quantise so that the layer's output changes least; with `outputs`, so that the loss does.

    weight   [out, in], any float dtype
    factor   HessianFactor of the matrix' inputs
    options  should be those the factor was built with
    outputs  of the matrix' outputs; options.output_sweeps says for how many sweeps
    name     what errors call the matrix

    Raises ValueError naming the matrix for NaN or infinite weights, shapes that do not fit, an unknown width, or
    magnitudes that stored scales cannot express.
    """
    options = options or GPTQOptions()
    check_weight(weight, bits, name)
    if weight.shape[1] != len(factor.order):
        raise ValueError(f"{name}: {weight.shape[1]} inputs, but its Hessian has {len(factor.order)}")
    if not options.compensate:
        search = "mse" if options.mse_search else "minmax"
        return quantize_rtn(weight, bits, search=search, metadata=options.metadata, name=name)
    weight = weight.float()
    if options.codes == "trellis" and bits in TRELLIS_WIDTHS:
        return quantize_trellis(
            weight, factor.hessian, factor.order, factor.inverse_factor, bits,
            refinement_sweeps=options.refinement_sweeps, output_sweeps=options.output_sweeps, outputs=outputs,
            name=name,
        )  # fmt: skip
    static = options.act_order  # act order visits a group's columns far apart, so its grid must exist beforehand
    grid = _search(weight, bits, factor, options, name)
    codes = _gptq_codes(weight, grid, factor, options, static, name)
    output_sweeps = 0 if outputs is None else options.output_sweeps
    if options.refinement_sweeps or output_sweeps:
        iterate = Iterate(weight, codes, grid, factor.hessian)
        refine(iterate, options.refinement_sweeps)
        refine(iterate, output_sweeps, outputs)
        codes = iterate.codes
    return grid.matrix(codes)


def _search(weight: torch.Tensor, bits: int, factor: HessianFactor, options: GPTQOptions, name: str) -> Grid:
    search = "mse" if options.mse_search else "minmax"
    return search_grid(weight, bits, options.metadata, search, factor.hessian.diagonal(), name=name)


def _gptq_codes(
    weight: torch.Tensor,
    grid: Grid,
    factor: HessianFactor,
    options: GPTQOptions,
    static: bool,
    name: str,
) -> torch.Tensor:
    """GPTQ's pass over the columns. Returns codes, float32 [out, in]; unless static, refits grid block by block."""
    remaining = weight[:, factor.order]  # indexing copies: the caller's weight stays as it is
    codes = torch.empty_like(remaining)
    inverse = factor.inverse_factor
    largest = np.float32((1 << grid.bits) - 1)
    for start in range(0, remaining.shape[1], BLOCK):
        stop = start + BLOCK
        block = remaining[:, start:stop].contiguous()
        if not static:
            _refit_group(grid, start // GROUP_SIZE, block, factor, options, name)
        group_of = factor.order[start:stop] // GROUP_SIZE
        scales, zeros = grid.scales[:, group_of], grid.zeros[:, group_of]
        block_codes, errors = torch.empty_like(block), torch.empty_like(block)
        triangle = inverse[start:stop, start:stop].contiguous()
        rows, written = (block, block_codes, errors, scales, zeros), (block_codes, errors)
        over_rows(gptq_block, rows, triangle, largest, options.compensate_within_block, written=written)
        codes[:, factor.order[start:stop]] = block_codes
        remaining[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)
    return codes


def _refit_group(
    grid: Grid, group: int, block: torch.Tensor, factor: HessianFactor, options: GPTQOptions, name: str
) -> None:
    """Search a group's grid anew on its weights as compensation has left them. block: [out, 128], fewer columns in
    a last group that is not whole."""
    columns = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
    search = "mse" if options.mse_search else "minmax"
    importance = factor.hessian.diagonal()[columns]
    fresh = search_grid(block, grid.bits, grid.metadata, search, importance, grid.ranges, name)
    grid.scales[:, group], grid.zeros[:, group] = fresh.scales[:, 0], fresh.zeros[:, 0]
