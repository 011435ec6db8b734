"""The inner loops of quantising to a trellis code (kernels/trellis.py), compiled by numba as those of row_loops.py are.

A ring's codes are found by the Viterbi algorithm. Its costs are not those of separate weights: under a Hessian an error
is felt by all weights after it, so that every survivor carries the errors of its own path ("per-survivor processing").
With d = Q - target of a ring's weights in the ring's order and its Hessian factored as C C^T, C upper triangular,

    d H d^T = sum_t (C[t, t] d[t] + sum_{u < t} d[u] C[u, t])^2

so that the cost of a weight is known once those before it are. Vectors go along the rows: 16 at a time.

Arrays are C-contiguous float32 unless said otherwise. `order` is the ring's, int64 [32], rotated to begin anywhere;
factors and targets follow it.
"""

import numpy as np
from numba import njit

from vllm_mcmoe.calibration.matrix.row_loops import FAST, to_bits
from vllm_mcmoe.calibration.matrix.trellis_step import STATES, SURVIVOR_ROWS, advance
from vllm_mcmoe.kernels.cpu.vectors import LANES
from vllm_mcmoe.kernels.packing import GROUP_SIZE
from vllm_mcmoe.kernels.trellis import RING

RINGS = GROUP_SIZE // RING
_UNREACHED = np.float32(1e30)


@njit(nogil=True, cache=True)
def _workspace():
    """What _solve_rings works in: survivors before and after a step, and the steps they took."""
    return (
        np.empty((2, SURVIVOR_ROWS, STATES, LANES), dtype=np.float32),
        np.empty((RING, STATES, LANES), dtype=np.int32),
    )


@njit(nogil=True, cache=True, fastmath=FAST)
def _solve_rings(targets, factor, scales, table, states, entries, errors, workspace):
    """One ring in each of 16 rows: the codes of (nearly) least cost.

    targets  [RING, lanes], in the ring's order
    factor   [RING, RING], C
    scales   [lanes]
    table    [uncoded, 16], levels around 0
    states   int32 [lanes], changed: the three bits that the ring begins and ends with; below 0 where any will do, and
             it may end with others than it began with. Then what it begins with is written.
    entries  int32 [RING, lanes], written: of the table, 16 * uncoded + window
    errors   [RING, lanes], written: scale * level - target
    """
    survivors, steps = workspace
    for state in range(STATES):
        for lane in range(LANES):
            reached = states[lane] < 0 or states[lane] == state
            survivors[0, 0, state, lane] = np.float32(0.0)
            survivors[0, 1, state, lane] = np.float32(0.0) if reached else _UNREACHED
    for time in range(RING):
        now = time & 1
        advance(
            len(table), time, factor.ctypes.data, table.ctypes.data, scales.ctypes.data,
            targets[time].ctypes.data, survivors[now].ctypes.data, survivors[1 - now].ctypes.data,
            steps[time].ctypes.data,
        )  # fmt: skip
    for lane in range(LANES):
        state = states[lane]
        if state < 0:
            state = 0
            for other in range(1, STATES):
                if survivors[0, 1, other, lane] < survivors[0, 1, state, lane]:
                    state = other
        for time in range(RING):
            errors[time, lane] = survivors[0, 2 + time, state, lane]
        for time in range(RING - 1, -1, -1):
            step = steps[time, state, lane]
            entries[time, lane] = 2 * STATES * (step >> 1) + 2 * state + (step & 1)
            state = 2 * state & (STATES - 1) | step & 1
        states[lane] = state


@njit(nogil=True, cache=True, fastmath=FAST)
def first_pass(targets, entries, errors, scales, factor, turned, table):
    """The codes of one ring in every row, of which nothing is known before.

    targets  [rows, RING], in the ring's order
    entries  uint8 [rows, RING], written
    errors   [rows, RING], written: Q - target
    scales   [rows]
    factor   [RING, RING]
    turned   [RING, RING], the factor in the order that begins in the middle of the ring
    table    [uncoded, 16]

    The ring is walked once with both ends loose, to see what passes its middle, and once more from there to there.
    """
    rows, half = targets.shape[0], RING // 2
    workspace = _workspace()
    target, error = np.empty((2, RING, LANES), dtype=np.float32)
    entry = np.empty((RING, LANES), dtype=np.int32)
    scale, states = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.int32)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        for lane in range(LANES):  # those beyond the last row repeat it
            row = first + min(lane, count - 1)
            scale[lane], states[lane] = scales[row], -1
            for time in range(RING):
                target[time, lane] = targets[row, time]
        _solve_rings(target, factor, scale, table, states, entry, error, workspace)
        for lane in range(LANES):
            states[lane] = entry[half, lane] & (STATES - 1)
            for time in range(half):
                target[time, lane], target[half + time, lane] = target[half + time, lane], target[time, lane]
        _solve_rings(target, turned, scale, table, states, entry, error, workspace)
        for lane in range(count):
            for time in range(RING):
                row, column = first + lane, time ^ half
                entries[row, column], errors[row, column] = entry[time, lane], error[time, lane]


@njit(nogil=True, cache=True, fastmath=FAST)
def _refit_scale(row, lane, felt, levels, product, gradients, change, scales, bounds, dropped):
    """The row's best scale given all its codes, as it can be stored. Returns by how much it changes."""
    curvature, slope = np.float32(0.0), np.float32(0.0)
    for k in range(GROUP_SIZE):
        curvature += levels[row, k] * product[row, k]
        slope += levels[row, k] * felt[lane, k]
    if curvature <= 0:
        return np.float32(0.0)
    fitted = min(max(scales[row] - slope / curvature, bounds[row, 0]), bounds[row, 1])
    stored = to_bits(fitted, dropped)
    difference = stored - scales[row]
    scales[row] = stored
    for k in range(GROUP_SIZE):
        change[row, k] += difference * levels[row, k]
        gradients[row, k] += difference * product[row, k]
    return difference


@njit(nogil=True, cache=True, fastmath=FAST)
def _spread(felt, coupling, lane, count, moved, factor):
    """Rows of felt hear of a change of one of them: moved [128], times a factor, is its change times the Hessian."""
    for other in range(count):
        share = coupling[other, lane] * factor
        if share != 0:
            for k in range(GROUP_SIZE):
                felt[other, k] += share * moved[k]


@njit(nogil=True, cache=True, fastmath=FAST)
def _descend_lanes(
    index, count, felt, coupling, entries, levels, product, gradients, change, scales, bounds,
    hessian, factors, inverses, order, table, dropped, workspace,
):  # fmt: skip
    """New scales, then new codes ring by ring, of up to 16 rows at once: each ring's optimum given all other weights of
    these rows and of all others. Rows are then changed one after another, and only where that lowers the loss.

    index     int64 [lanes], the rows; those beyond count repeat others
    felt      [lanes, 128], changed: the gradient of the loss of all rows by these, divided by their own curvature
    coupling  [lanes, lanes], of these rows to each other, likewise; 1 on the diagonal
    others    as descend_trellis_rows takes them
    """
    target, value, error = np.empty((3, RING, LANES), dtype=np.float32)
    entry = np.empty((RING, LANES), dtype=np.int32)
    scale, states = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.int32)
    moved = np.empty(GROUP_SIZE, dtype=np.float32)
    for lane in range(count):
        row = index[lane]
        difference = _refit_scale(row, lane, felt, levels, product, gradients, change, scales, bounds, dropped)
        if difference != 0:
            _spread(felt, coupling, lane, count, product[row], difference)
    for lane in range(LANES):
        scale[lane] = scales[index[lane]]
    for ring in range(RINGS):
        columns = ring * RING + order
        for lane in range(LANES):
            row, source = index[lane], min(lane, count - 1)
            states[lane] = entries[row, columns[0]] & (STATES - 1)
            for time in range(RING):
                value[time, lane] = scale[lane] * levels[row, columns[time]]
                error[time, lane] = felt[source, columns[time]]
        for time in range(RING):
            for lane in range(LANES):
                target[time, lane] = value[time, lane]
            for other in range(RING):
                share = inverses[ring, time, other]
                for lane in range(LANES):
                    target[time, lane] -= share * error[other, lane]
        _solve_rings(target, factors[ring], scale, table, states, entry, error, workspace)
        for lane in range(count):
            row = index[lane]
            moved[:] = np.float32(0.0)
            for time in range(RING):
                difference = error[time, lane] + target[time, lane] - value[time, lane]
                error[time, lane] = difference
                if entry[time, lane] != entries[row, columns[time]]:
                    for k in range(GROUP_SIZE):
                        moved[k] += difference * hessian[columns[time], k]
            gain = np.float32(0.0)
            for time in range(RING):
                if entry[time, lane] != entries[row, columns[time]]:
                    column = columns[time]
                    gain += error[time, lane] * (np.float32(2.0) * felt[lane, column] + moved[column])
            if gain < 0:
                for time in range(RING):
                    column, found = columns[time], entry[time, lane]
                    if found != entries[row, column]:
                        entries[row, column], levels[row, column] = found, table[found >> 4, found & 15]
                        change[row, column] += error[time, lane]
                for k in range(GROUP_SIZE):
                    gradients[row, k] += moved[k]
                _spread(felt, coupling, lane, count, moved, np.float32(1.0))


@njit(nogil=True, cache=True, fastmath=FAST)
def descend_trellis_rows(
    entries, levels, product, gradients, change, scales, bounds, hessian, factors, inverses, order, table, dropped
):  # fmt: skip
    """A new scale for one group of every row, then new codes for its rings, one after another.

    entries      uint8 [rows, 128], changed
    levels       [rows, 128], of these entries, around 0; changed
    product      [rows, 128], levels times the Hessian's block
    gradients    [rows, 128], (Q - W) H of these columns, kept up to date
    change       [rows, 128], written: by how much Q changes
    scales       [rows], changed
    bounds       [rows, 2], smallest and largest scale
    hessian      [128, 128], the block on the diagonal
    factors      [4, RING, RING], C of its rings
    inverses     [4, RING, RING], of the rings' Hessians
    table        [uncoded, 16], levels around 0
    dropped      bits of a float32 mantissa that scales lack
    """
    rows = entries.shape[0]
    workspace = _workspace()
    felt, coupling = np.empty((LANES, GROUP_SIZE), dtype=np.float32), np.eye(LANES, dtype=np.float32)
    index = np.empty(LANES, dtype=np.int64)
    change[:] = np.float32(0.0)
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        for lane in range(LANES):
            index[lane] = first + min(lane, count - 1)
            felt[lane] = gradients[index[lane]]
        _descend_lanes(
            index, count, felt, coupling, entries, levels, product, gradients, change, scales,
            bounds, hessian, factors, inverses, order, table, dropped, workspace,
        )  # fmt: skip


@njit(nogil=True, cache=True, fastmath=FAST)
def _feel(felt, gradients, weights):
    """felt = weights @ gradients: [lanes, 128], [rows, 128], [lanes, rows]; four rows at a time."""
    rows = gradients.shape[0]
    felt[:] = np.float32(0.0)
    whole = rows - rows % 4
    for first in range(0, whole, 4):
        for lane in range(LANES):
            a, b, c, d = weights[lane, first : first + 4]
            for k in range(GROUP_SIZE):
                felt[lane, k] += (
                    a * gradients[first, k] + b * gradients[first + 1, k]
                    + c * gradients[first + 2, k] + d * gradients[first + 3, k]
                )  # fmt: skip
    for row in range(whole, rows):
        for lane in range(LANES):
            for k in range(GROUP_SIZE):
                felt[lane, k] += weights[lane, row] * gradients[row, k]


@njit(nogil=True, cache=True, fastmath=FAST)
def descend_trellis_coupled(
    entries, levels, product, gradients, change, scales, bounds, coupling, hessian, factors, inverses, order, table,
    dropped,
):  # fmt: skip
    """descend_trellis_rows of rows that H_out couples: 16 at a time, far from each other, given all others.

    coupling  [rows, rows], H_out of these rows
    """
    rows = entries.shape[0]
    workspace = _workspace()
    chunks = -(-rows // LANES)
    felt, weights = np.empty((LANES, GROUP_SIZE), dtype=np.float32), np.empty((LANES, rows), dtype=np.float32)
    among = np.empty((LANES, LANES), dtype=np.float32)
    index = np.empty(LANES, dtype=np.int64)
    change[:] = np.float32(0.0)
    for chunk in range(chunks):
        count = -(-(rows - chunk) // chunks)
        for lane in range(LANES):
            index[lane] = chunk + min(lane, count - 1) * chunks
            weights[lane] = coupling[index[lane]] / coupling[index[lane], index[lane]]
        for lane in range(LANES):
            for other in range(LANES):
                among[lane, other] = weights[lane, index[other]]
        _feel(felt, gradients, weights)
        _descend_lanes(
            index, count, felt, among, entries, levels, product, gradients, change, scales,
            bounds, hessian, factors, inverses, order, table, dropped, workspace,
        )  # fmt: skip
