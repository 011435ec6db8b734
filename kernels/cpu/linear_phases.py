"""One linear in compiled code: quantise the tokens, then multiply, add the bias and round to x's dtype.

Tokens form the chunks of chunks.py in their order, and both phases are cut into the tasks of team.py.
"""

from numba import njit

from vllm_mcmoe.kernels.cpu.chunks import (
    CHUNK,
    code_address,
    multiply_chunk,
    quantize_group,
    scale_address,
    tile_inputs_compiled,
    write_rows,
)
from vllm_mcmoe.kernels.cpu.intrinsics import as_float32, as_int64, fetch_add
from vllm_mcmoe.kernels.cpu.layout import ROWS, linear_record_bytes_compiled
from vllm_mcmoe.kernels.cpu.team import finish_phase, run_team
from vllm_mcmoe.kernels.cpu.vectors import FLOAT32, scale_and_add

# The int64 array a call passes to the compiled code, in this order: plain integers, as a call fills it in microseconds.
# Addresses unless said otherwise.
(
    X,  # [tokens, inputs] in the dtype DTYPE names
    OUT,  # [tokens, 16 * row blocks] of the same dtype, written
    BIAS,  # float32 [16 * row blocks], or 0 for none
    DTYPE,  # value: vectors.FLOAT32, BFLOAT16 or FLOAT16
    TOKENS,  # value
    INPUTS,  # value
    ROW_BLOCKS,  # value
    RECORDS,  # see layout.py
    BITS,  # value
    FACTOR,  # float32 [1], of the output: undoes the power of two that stored scales were multiplied by
    COUNTERS,  # int64 [5, 8], a cache line each: threads seen; tasks taken of 2 phases; tasks done of the first; zeros
    CODES,  # int8, tokens * inputs, by chunk
    SCALES,  # float32, tokens * groups * 2, by chunk
    SCRATCH,  # one area per thread: float32 [TASK_BLOCKS][slots of a chunk][16]
    SCRATCH_BYTES,  # value
    TASK_BLOCKS,  # value: row blocks of a task of the second phase
    THREADS,  # value
    PARALLEL,  # GOMP_parallel
    WORKER,  # what every thread of the team runs
    MULTIPLY_ROWS,  # the products of this CPU's instruction set for BITS and the group size
) = range(20)
PARAMETERS = 20
COUNTER_BYTES = 5 * 64


@njit
def reset(p):
    """Before the team starts."""
    counters = as_int64(p[COUNTERS])
    for i in range(COUNTER_BYTES // 8):
        counters[i] = 0


@njit
def _chunk_at(p, token):
    """First token and number of tokens of a token's chunk."""
    first = token // CHUNK * CHUNK
    return first, min(CHUNK, p[TOKENS] - first)


@njit
def _quantize_tokens(p, group_size):
    """Tasks: tokens. Returns the tasks done."""
    inputs, dtype = p[INPUTS], p[DTYPE]
    item = 4 if dtype == FLOAT32 else 2
    done = 0
    while True:
        token = fetch_add(p[COUNTERS] + 64, 1)
        if token >= p[TOKENS]:
            return done
        done += 1
        first, count = _chunk_at(p, token)
        for group in range(inputs // group_size):
            source = p[X] + (token * inputs + group * group_size) * item
            low = code_address(p[CODES], first, count, token - first, inputs, group_size, group)
            high = low + count * tile_inputs_compiled(group_size)
            scale = scale_address(p[SCALES], first, count, token - first, inputs, group_size, group)
            quantize_group(dtype, group_size, source, low, high, scale)


@njit
def _multiply(p, group_size, scratch):
    """Tasks: TASK_BLOCKS row blocks x a chunk. The same rows follow for the next chunk, which finds them cached."""
    chunks = (p[TOKENS] + CHUNK - 1) // CHUNK
    while True:
        task = fetch_add(p[COUNTERS] + 128, 1)
        block = task // chunks * p[TASK_BLOCKS]
        if block >= p[ROW_BLOCKS]:
            return
        blocks = min(p[TASK_BLOCKS], p[ROW_BLOCKS] - block)
        first, count = _chunk_at(p, task % chunks * CHUNK)
        groups = p[INPUTS] // group_size
        records = p[RECORDS] + block * groups * linear_record_bytes_compiled(p[BITS], group_size)
        multiply_chunk(
            p[MULTIPLY_ROWS], p[BITS], records, blocks, p[INPUTS], group_size,
            p[CODES], p[SCALES], first, count, scratch,
        )  # fmt: skip
        _finish_rows(p, scratch, first, count, block, blocks)


@njit
def _finish_rows(p, totals, first, count, first_block, blocks):
    factor = as_float32(p[FACTOR])[0]
    zeros = p[COUNTERS] + 4 * 64
    for block in range(blocks):
        bias = p[BIAS] + (first_block + block) * ROWS * 4 if p[BIAS] else zeros
        for i in range(count):
            scale_and_add(totals + (block * count + i) * ROWS * 4, factor, bias)
    for i in range(count):
        element = ((first + i) * p[ROW_BLOCKS] + first_block) * ROWS
        write_rows(p[DTYPE], totals + i * ROWS * 4, count * ROWS * 4, blocks, p[OUT], element)


@njit
def work(p, group_size):
    """What one thread of the team does; group_size: a constant of the caller."""
    scratch = p[SCRATCH] + fetch_add(p[COUNTERS], 1) * p[SCRATCH_BYTES]
    finish_phase(p[COUNTERS] + 3 * 64, _quantize_tokens(p, group_size), p[TOKENS])
    _multiply(p, group_size, scratch)


@njit
def run(p, data):
    """The whole linear on torch's OpenMP team. `data` is p's address."""
    reset(p)
    run_team(p[PARALLEL], p[WORKER], data, p[THREADS])
