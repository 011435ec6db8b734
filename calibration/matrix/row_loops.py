"""The quantisers' inner loops, compiled by numba: every row of a matrix is its own small problem.

In tensor operations each step over 128 columns is a dozen tiny calls, which cost more in dispatch and thread barriers
than in arithmetic (0.9 s for a 1024 x 256 matrix at 2 bits on a busy two-core machine; 0.03 s here). The products
between blocks of 128 columns stay matrix multiplications in torch.

The loops run on the CPU wherever the matrices are. Rows are shared out over threads of torch's count. All arrays are
C-contiguous float32 unless said otherwise. Where a shape says 128, a last group that is not whole has fewer.
"""

from collections.abc import Callable

import numpy as np
import torch
from numba import njit

from vllm_mcmoe.calibration.common.threads import side_by_side

# Sums may be reordered (vector instructions), but NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}
_LANES = 16  # rows that a vector loop takes at once
_ROWS_PER_TASK = 64  # a task must outlast the handing over of it, about 50 us


def over_rows(
    kernel: Callable[..., None], by_row: tuple[torch.Tensor, ...], *shared: object, written: tuple[torch.Tensor, ...]
) -> None:
    """Call kernel(*rows of by_row, *shared) on chunks of rows.

    written: those of by_row whose new values the caller wants. Kernels write into the memory of tensors on the CPU;
    others are copied to it, and only what is wanted is copied back.
    """
    host = [tensor.cpu() for tensor in by_row]
    _run_on_rows(kernel, [tensor.numpy() for tensor in host], shared)
    for tensor, changed in zip(by_row, host, strict=True):
        if tensor is not changed and any(tensor is wanted for wanted in written):
            tensor.copy_(changed)


def _run_on_rows(kernel: Callable[..., None], arrays: list[np.ndarray], shared: tuple[object, ...]) -> None:
    common = [value.cpu().numpy() if isinstance(value, torch.Tensor) else value for value in shared]
    rows, threads = len(arrays[0]), torch.get_num_threads()
    chunk = max(_ROWS_PER_TASK, -(-rows // (4 * threads)))
    side_by_side(lambda start: kernel(*(a[start : start + chunk] for a in arrays), *common), range(0, rows, chunk))


@njit(nogil=True, cache=True, fastmath=FAST)
def _nearest(value, largest):
    return min(max(np.rint(value), np.float32(0.0)), largest)


@njit(nogil=True, cache=True, fastmath=FAST)
def gptq_block(weights, codes, errors, scales, zeros, inverse, largest, compensate):
    """GPTQ inside one block: quantise column i, then pass its error on to the columns after it.

    weights          [rows, 128]
    codes, errors    [rows, 128], written; errors are divided by the inverse factor's diagonal
    scales, zeros    [rows, 128], of each column's group
    inverse          [128, 128], the block of the upper triangular factor on the diagonal

    A column's errors change ever fewer columns, of which few vectors are full; so vectors go along the rows.
    """
    rows, columns = weights.shape
    weight, scale, zero, code, error = np.empty((5, columns, _LANES), dtype=np.float32)
    for first in range(0, rows, _LANES):
        count = min(_LANES, rows - first)
        for lane in range(_LANES):  # those beyond the last row repeat it
            row = first + min(lane, count - 1)
            for i in range(columns):
                weight[i, lane], scale[i, lane], zero[i, lane] = weights[row, i], scales[row, i], zeros[row, i]
        for i in range(columns):
            inverse_diagonal = np.float32(1.0) / inverse[i, i]
            for lane in range(_LANES):
                code[i, lane] = _nearest(weight[i, lane] / scale[i, lane] + zero[i, lane], largest)
                quantized = scale[i, lane] * (code[i, lane] - zero[i, lane])
                error[i, lane] = (weight[i, lane] - quantized) * inverse_diagonal
            if compensate:
                for k in range(i + 1, columns):
                    factor = inverse[i, k]
                    for lane in range(_LANES):
                        weight[k, lane] -= error[i, lane] * factor
        for lane in range(count):
            for i in range(columns):
                codes[first + lane, i], errors[first + lane, i] = code[i, lane], error[i, lane]


@njit(nogil=True, cache=True)
def to_bits(value, dropped):
    """The nearest float32 of which the last `dropped` bits are 0, ties to even. On the bits, because compilers fuse the
    multiply-adds that would do it in floating point."""
    dropped = np.int32(dropped)
    bits = np.float32(value).view(np.int32)
    half = np.int32(1) << np.int32(dropped - np.int32(1))
    bits += np.int32(half - np.int32(1)) + np.int32(np.int32(bits >> dropped) & np.int32(1))
    return np.int32(np.int32(bits >> dropped) << dropped).view(np.float32)


@njit(nogil=True, cache=True)
def _to_fp16(value):
    """The nearest number that fp16 has, ties to even. value: float32 of a magnitude up to 65504."""
    if abs(value) < np.float32(2.0**-14):  # subnormal there: multiples of one number
        return np.rint(value * np.float32(2.0**24)) * np.float32(2.0**-24)
    return to_bits(value, 13)


@njit(nogil=True, cache=True, fastmath=FAST)
def _fitted_grid(by_code, mixed, want_code, want_one, scale, zero, bounds, limits, zero_is_fixed):
    """Scale and zero of the least loss, as they can be stored, given one row's codes c; those it has, where none fits.

    With B the block, 1 its column of ones and w the gradient as it were with these columns' Q = 0: by_code is c B c^T,
    mixed c B 1, want_code -w c^T, want_one -w 1. bounds: of this row; they and limits as in descend_rows.
    """
    smallest, largest = bounds
    _, dropped, by_one = limits
    if zero_is_fixed:  # one parameter: Q = scale * (codes - zero)
        curvature = by_code - np.float32(2.0) * zero * mixed + zero * zero * by_one
        fitted = (want_code - zero * want_one) / curvature
        return to_bits(min(max(fitted, smallest), largest), dropped), zero
    # two: Q = scale * codes + offset, offset = -scale * zero
    determinant = by_code * by_one - mixed * mixed
    if determinant <= np.float32(1e-6) * by_code * by_one:
        return scale, zero  # codes that are all alike leave them undetermined
    fitted = (want_code * by_one - want_one * mixed) / determinant
    if not smallest < fitted < largest:
        return scale, zero
    stored = to_bits(fitted, dropped)
    offset = (want_one - stored * mixed) / by_one  # the best one for the scale as it had to be rounded
    return stored, _to_fp16(min(max(-offset / stored, -largest), largest))


@njit(nogil=True, cache=True, fastmath=FAST)
def _descend_row(
    codes, product, gradient, change, scale, zero, bounds, hessian, column_sums, step, limits, zero_is_fixed
):
    """descend_rows of one row; returns its scale and zero. gradient: overwritten."""
    columns = codes.shape[0]
    by_code, mixed, want_code, want_one = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for k in range(columns):
        gradient[k] -= scale * (product[k] - zero * column_sums[k])  # now as it were with these columns' Q = 0
        by_code += codes[k] * product[k]
        mixed += product[k]
        want_code -= codes[k] * gradient[k]
        want_one -= gradient[k]
        change[k] = -scale * (codes[k] - zero)
    scale, zero = _fitted_grid(by_code, mixed, want_code, want_one, scale, zero, bounds, limits, zero_is_fixed)
    for k in range(columns):
        gradient[k] += scale * (product[k] - zero * column_sums[k])
    for i in range(columns):
        moved = _nearest(codes[i] - gradient[i] * step[i] / scale, limits[0])
        if moved != codes[i]:
            difference = (moved - codes[i]) * scale
            codes[i] = moved
            for k in range(columns):
                gradient[k] += difference * hessian[i, k]
    for k in range(columns):
        change[k] += scale * (codes[k] - zero)
    return scale, zero


@njit(nogil=True, cache=True, fastmath=FAST)
def descend_rows(
    codes, product, gradients, change, scales, zeros, bounds, hessian, column_sums, step, limits, zero_is_fixed
):
    """A new grid for one group, then one pass of coordinate descent over its codes: each to its optimum, given all
    others.

    codes          [rows, 128], changed
    product        [rows, 128], codes times the Hessian's block
    gradients      [rows, 128], (Q - W) H of these columns; overwritten
    change         [rows, 128], written: by how much Q changes
    scales, zeros  [rows], changed
    bounds         [rows, 2], smallest and largest scale; with float16, the latter of zeros, too
    hessian        [128, 128], the block on the diagonal
    column_sums    [128], of the block
    step           [128], 1 / its diagonal
    limits         [3]: largest code, bits of a float32 mantissa that scales lack, sum of the block
    zero_is_fixed  zeros stay as they are
    """
    for row in range(codes.shape[0]):
        scales[row], zeros[row] = _descend_row(
            codes[row], product[row], gradients[row], change[row], scales[row], zeros[row], bounds[row],
            hessian, column_sums, step, limits, zero_is_fixed,
        )  # fmt: skip


@njit(nogil=True, cache=True, fastmath=FAST)
def descend_coupled(
    codes,
    product,
    gradients,
    change,
    scales,
    zeros,
    bounds,
    coupling,
    hessian,
    column_sums,
    step,
    limits,
    zero_is_fixed,
):
    """descend_rows of rows that H_out couples, one after another, given all others as they are by then.

    gradients  [rows, 128], (Q - W) H of these columns, kept up to date with what changes in them
    coupling   [rows, rows], H_out of these rows
    """
    rows, columns = codes.shape
    felt = np.empty(columns, dtype=np.float32)
    for row in range(rows):
        # the gradient of all rows' loss, divided by the row's curvature: the loss of a separate row again
        felt[:] = gradients[row]
        inverse = np.float32(1.0) / coupling[row, row]
        for other in range(rows):
            if other != row:
                factor = coupling[row, other] * inverse
                for k in range(columns):
                    felt[k] += factor * gradients[other, k]
        scales[row], zeros[row] = _descend_row(
            codes[row], product[row], felt, change[row], scales[row], zeros[row], bounds[row],
            hessian, column_sums, step, limits, zero_is_fixed,
        )  # fmt: skip
        for i in range(columns):
            difference = change[row, i]
            for k in range(columns):
                gradients[row, k] += difference * hessian[i, k]


@njit(nogil=True, cache=True, fastmath=FAST)
def least_squares_grids(groups, scales, zeros, column_weight, largest, shares, iterations, zero_is_fixed):
    """Best of several shrunken ranges per group, each improved by alternating nearest codes with the best grid.

    groups         [rows, groups, 128]
    scales, zeros  [rows, groups]: in, a grid over the whole range; out, the best found, not yet as it can be stored
    column_weight  [groups, 128], positive sums
    shares         [starts], parts of the range's lower and of its upper half to start from, in all combinations
    zero_is_fixed  zeros stay as they are; the range is around 0
    """
    codes = np.empty(groups.shape[2], dtype=np.float32)
    for row in range(groups.shape[0]):
        for index in range(groups.shape[1]):
            weights, importance = groups[row, index], column_weight[index]
            full_scale, full_zero = scales[row, index], zeros[row, index]
            least = _squared_error(weights, importance, full_scale, full_zero, largest)
            middle = np.float32(0.5) * largest - full_zero  # of the range, in units of the full scale
            for low in shares:
                for high in shares:
                    if zero_is_fixed and low != high:
                        continue  # the range stays around 0
                    span = np.float32(0.5) * (low + high)
                    scale = full_scale * span
                    zero = np.float32(0.5) * largest * low / span - middle / span
                    if zero_is_fixed:  # which this would round
                        zero = full_zero
                    for _ in range(iterations):
                        scale, zero = _fit(weights, importance, scale, zero, largest, codes, zero_is_fixed)
                        error = _squared_error(weights, importance, scale, zero, largest)
                        if error < least:
                            least = error
                            scales[row, index], zeros[row, index] = scale, zero


@njit(nogil=True, cache=True, fastmath=FAST)
def _squared_error(weights, importance, scale, zero, largest):
    inverse, total = np.float32(1.0) / scale, np.float32(0.0)
    for k in range(weights.shape[0]):
        error = weights[k] - scale * (_nearest(weights[k] * inverse + zero, largest) - zero)
        total += importance[k] * error * error
    return total


@njit(nogil=True, cache=True, fastmath=FAST)
def _fit(weights, importance, scale, zero, largest, codes, zero_is_fixed):
    """Weighted least squares of weights ~ scale * codes + offset, codes nearest under the given grid; offset is
    -scale * zero where the zero is fixed."""
    inverse = np.float32(1.0) / scale
    total, mean_code, mean_weight = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for k in range(weights.shape[0]):
        codes[k] = _nearest(weights[k] * inverse + zero, largest)
        total += importance[k]
        mean_code += importance[k] * codes[k]
        mean_weight += importance[k] * weights[k]
    if zero_is_fixed:
        mean_code, mean_weight = zero, np.float32(0.0)
    else:
        mean_code /= total
        mean_weight /= total
    variance, covariance = np.float32(0.0), np.float32(0.0)
    for k in range(weights.shape[0]):
        centred = importance[k] * (codes[k] - mean_code)
        variance += centred * (codes[k] - mean_code)
        covariance += centred * weights[k]
    if variance <= 0 or covariance <= 0:
        return scale, zero
    fitted = covariance / variance
    return fitted, mean_code - mean_weight / fitted  # of a fixed zero, that zero
