"""The two loops of quantisation that decide one column after another, compiled.

Rows are independent, columns are not: a decision moves what the following columns of the same row must make up for.
As torch operations on one column at a time both loops are bound by call overhead; here a tile of rows stays in the
first-level cache while all columns of a block pass over it. Matrices are transposed, [columns, rows], so that the
inner loops run over contiguous rows and vectorise. Tensors are float32 on the CPU, contiguous, changed in place.
"""

import numba
import numpy as np
import torch

# Rows of a tile: 128 columns of 64 float32 are 32 KiB, most of a first-level cache.
TILE = 64


def gptq_block(
    block: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    inverse: torch.Tensor,
    largest_code: int,
    compensate: bool,
) -> None:
    """GPTQ inside one block of columns: quantise each, spread its error over the block's later columns.

    block          [columns, rows]     weights; left compensated
    codes          [columns, rows]     written
    errors         [columns, rows]     written: (weight - quantised) / inverse[i, i], for the columns after the block
    scales, zeros  [columns, rows]     grid of each column's group
    inverse        [columns, columns]  this block of the inverse Hessian's upper Cholesky factor
    compensate     False leaves the later columns of the block as they are
    """
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    arrays = (tensor.numpy() for tensor in (block, codes, errors, scales, zeros, inverse))
    _gptq_block(*arrays, np.float32(largest_code), compensate)


def descend_block(
    gradient: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, largest_code: int
) -> None:
    """Coordinate descent over one group's codes: each to the optimum of its parabola, given all others.

    gradient  [columns, rows]     half the loss gradient by the quantised weights; kept up to date
    codes     [columns, rows]     replaced
    scales    [rows]
    hessian   [columns, columns]  this group's diagonal block, positive diagonal
    """
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    arrays = (tensor.numpy() for tensor in (gradient, codes, scales, hessian))
    _descend_block(*arrays, np.float32(largest_code))


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _subtract(target, factor, values):
    for n in range(len(target)):
        target[n] -= factor * values[n]


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"})
def _gptq_block(block, codes, errors, scales, zeros, inverse, largest_code, compensate):
    columns, rows = block.shape
    for tile in numba.prange((rows + TILE - 1) // TILE):
        part = slice(tile * TILE, min(rows, (tile + 1) * TILE))
        for i in range(columns):
            pivot = np.float32(1.0) / inverse[i, i]
            weight, code, error = block[i, part], codes[i, part], errors[i, part]
            scale, zero = scales[i, part], zeros[i, part]
            for n in range(len(weight)):
                nearest = np.rint(weight[n] / scale[n] + zero[n])
                code[n] = min(max(nearest, np.float32(0.0)), largest_code)
                error[n] = (weight[n] - (code[n] - zero[n]) * scale[n]) * pivot
            if compensate:
                for j in range(i + 1, columns):
                    _subtract(block[j, part], inverse[i, j], error)


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"})
def _descend_block(gradient, codes, scales, hessian, largest_code):
    columns, rows = gradient.shape
    for tile in numba.prange((rows + TILE - 1) // TILE):
        part = slice(tile * TILE, min(rows, (tile + 1) * TILE))
        scale = scales[part]
        moves = np.empty_like(scale)
        for i in range(columns):
            step = np.float32(1.0) / hessian[i, i]
            slope, code = gradient[i, part], codes[i, part]
            for n in range(len(scale)):
                best = np.rint(code[n] - slope[n] * step / scale[n])
                best = min(max(best, np.float32(0.0)), largest_code)
                moves[n] = (code[n] - best) * scale[n]
                code[n] = best
            for j in range(columns):
                _subtract(gradient[j, part], hessian[i, j], moves)
