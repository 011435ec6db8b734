"""Activations of up to CHUNK slots, as every matrix product reads them.

A slot is what a matrix multiplies: a (token, expert) pair of an expert, a token of a linear. Slots of one matrix form
chunks of at most CHUNK. Activations are int8 per slot and group, stored chunk by chunk: codes [inputs/tile][slots of
the chunk][tile], scales [groups][slots of the chunk][2] (see vectors.quantize_*). A tile is 64 inputs, 32 where that is
all a group has. A lone slot's codes are then contiguous, and any 16 slots' tiles of 64 are 1 KiB blocks, an AMX tile
each.
"""

from numba import literally, njit

from vllm_mcmoe.kernels.cpu.intrinsics import as_float32, call_rows
from vllm_mcmoe.kernels.cpu.layout import ROWS
from vllm_mcmoe.kernels.cpu.vectors import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    quantize_bfloat16,
    quantize_float16,
    quantize_float32,
    write_bfloat16,
    write_float16,
    write_float32,
)

CHUNK = 256  # most slots a task handles: 16 row blocks of float32 sums for them are 256 KiB of L2
TILE = 64
CACHED_INPUTS = 512 * 1024  # bytes of activations a task goes through before it comes back to them: they stay in L2


def tile_inputs(group_size: int) -> int:
    """Inputs of a tile. Also called by compiled code, as `tile_inputs_compiled`."""
    return min(TILE, group_size)


tile_inputs_compiled = njit(tile_inputs)


@njit
def code_address(base, first, count, i, features, group_size, group):
    """Address of the first tile of a group's codes: of slot i of the chunk of `count` slots from `first`.

    The second tile of a group of 128 is `count` tiles further.
    """
    return base + first * features + group * group_size * count + i * tile_inputs_compiled(group_size)


@njit
def scale_address(base, first, count, i, features, group_size, group):
    return base + (first * (features // group_size) + group * count + i) * 8


@njit
def quantize_group(dtype, group_size, source, low, high, scale):
    """Activations of a dtype known at run time, see vectors.quantize_*; group_size: a constant of the caller."""
    if dtype == BFLOAT16:
        quantize_bfloat16(literally(group_size), source, low, high, scale)
    elif dtype == FLOAT16:
        quantize_float16(literally(group_size), source, low, high, scale)
    else:
        quantize_float32(literally(group_size), source, low, high, scale)


@njit
def multiply_chunk(multiply_rows, bits, records, row_blocks, features, group_size, codes, scales, first, count, totals):
    """totals[block][slot][16 rows] = weights of `row_blocks` row blocks times the chunk's slots, float32.

    Goes through the inputs in portions that stay in L2 while all row blocks use them.
    """
    sums = as_float32(totals)
    for i in range(row_blocks * count * ROWS):
        sums[i] = 0.0
    groups = features // group_size
    portion = min(groups, max(1, CACHED_INPUTS // (count * group_size)))
    for group in range(0, groups, portion):
        call_rows(
            multiply_rows,
            bits,
            records,
            row_blocks,
            groups,
            group,
            min(portion, groups - group),
            codes,
            scales,
            first,
            count,
            totals,
        )


@njit
def write_rows(dtype, source, source_stride, row_blocks, out, first):
    """Elements first, first + 1, ... of `out`, an array of `dtype`, from blocks of 16 float32 at source_stride."""
    item = 4 if dtype == FLOAT32 else 2
    for block in range(row_blocks):
        values, target = source + block * source_stride, out + (first + block * ROWS) * item
        if dtype == BFLOAT16:
            write_bfloat16(values, target)
        elif dtype == FLOAT16:
            write_float16(values, target)
        else:
            write_float32(values, target)
