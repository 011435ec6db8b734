"""One MoE layer in compiled code: group tokens by expert, quantise, gate_up and activation, down and weighted sum.

A (token, expert) pair is a slot; slots are sorted by expert, then by token, and those of one expert form the chunks of
chunks.py. Work is cut into the tasks of team.py, because experts differ in width and tokens, and cores in speed.
"""

from enum import IntEnum

import numpy as np
from numba import njit

from vllm_mcmoe.kernels.cpu.chunks import (
    CHUNK,
    code_address,
    multiply_chunk,
    quantize_group,
    scale_address,
    write_rows,
)
from vllm_mcmoe.kernels.cpu.intrinsics import as_float32, as_int32, as_int64, fetch_add
from vllm_mcmoe.kernels.cpu.layout import ROWS
from vllm_mcmoe.kernels.cpu.team import finish_phase, run_team
from vllm_mcmoe.kernels.cpu.vectors import (
    WITH_PARAMETERS,
    WITHOUT_GATE,
    add_weighted,
    copy64,
    gate_gelu,
    gate_gelu_tanh,
    gate_relu2,
    gate_silu,
    gate_silu_with_parameters,
    gelu,
    gelu_tanh,
    quantize_float32,
    relu2,
    scale_and_add,
    silu,
)
from vllm_mcmoe.kernels.packing import GROUP_SIZE, TRELLIS_NUMBERS

GROUP_ROWS = 128  # rows of one group of the intermediate activations, quantised as soon as they are complete


class Field(IntEnum):
    """Positions in the int64 array a call passes to the compiled code. Addresses unless said otherwise."""

    X = 0  # [tokens, hidden] in the dtype DTYPE names
    OUT = 1  # like X, written
    DTYPE = 2  # value: vectors.FLOAT32, BFLOAT16 or FLOAT16
    TOKENS = 3  # value
    TOP_K = 4  # value
    TOPK_IDS = 5  # [tokens, top_k]
    IDS_ARE_INT64 = 6  # value: 1 for int64 ids, 0 for int32
    TOPK_WEIGHTS = 7  # float32 [tokens, top_k]
    EXPERTS = 8  # value
    HIDDEN = 9  # value
    INTERMEDIATE = 10  # value
    FUNCTION = 11  # value: vectors.function_code
    GATE_UP = 12  # records, see layout.py
    GATE_UP_TABLE = 13  # int64 [experts, 3]: Code.number, offset of the expert's first record, bytes of a record
    DOWN = 14
    DOWN_TABLE = 15
    COUNTERS = 16  # int64 [6, 8], a cache line each: threads seen; tasks taken of 3 phases; tasks done of the first 2
    SLOT_OF = 17  # int32 [tokens, top_k]: slot of the pair, -1 for none
    SLOT_TOKEN = 18  # int32 [slots]
    SLOT_WEIGHT = 19  # float32 [slots]
    SLOT_CHUNK = 20  # int32 [slots, 2]: first slot of the slot's chunk, slots in that chunk
    CHUNKS = 21  # int32 [chunks, 3]: expert, first slot, slots
    CHUNK_COUNT = 22  # value, written
    EXPERT_START = 23  # int32 [experts + 1]
    CODES = 24  # int8, slots * hidden, by chunk
    SCALES = 25  # float32, slots * hidden/128 * 2, by chunk
    MID_CODES = 26  # int8, slots * intermediate, by chunk
    MID_SCALES = 27
    SCRATCH = 28  # one area per thread
    SCRATCH_BYTES = 29  # value
    DOWN_ROWS = 30  # value: output rows of a task of the down projection
    BAD_ID = 31  # value, written: an expert id out of range, else -1
    THREADS = 32  # value
    PARALLEL = 33  # GOMP_parallel
    WORKER = 34  # what every thread of the team runs
    MULTIPLY_ROWS = 35  # int64 [2]: the products of this CPU's instruction set, of scalar and of trellis codes
    PARAMETERS = 36  # float32 [3]: limit, alpha and beta of a function that has them
    GATE_UP_BIAS = 37  # float32 [experts, rows], in the order of the records; 0 for none
    DOWN_BIAS = 38  # float32 [experts, hidden]; 0 for none


# numba takes plain integers as constants, not members of an enumeration
(
    X, OUT, DTYPE, TOKENS, TOP_K, TOPK_IDS, IDS_ARE_INT64, TOPK_WEIGHTS, EXPERTS, HIDDEN, INTERMEDIATE, FUNCTION,
    GATE_UP, GATE_UP_TABLE, DOWN, DOWN_TABLE, COUNTERS, SLOT_OF, SLOT_TOKEN, SLOT_WEIGHT, SLOT_CHUNK, CHUNKS,
    CHUNK_COUNT, EXPERT_START, CODES, SCALES, MID_CODES, MID_SCALES, SCRATCH, SCRATCH_BYTES, DOWN_ROWS, BAD_ID,
    THREADS, PARALLEL, WORKER, MULTIPLY_ROWS, PARAMETERS, GATE_UP_BIAS, DOWN_BIAS,
) = map(int, Field)  # fmt: skip


@njit
def _expert_of(p, pair):
    if p[IDS_ARE_INT64]:
        return as_int64(p[TOPK_IDS])[pair]
    return int(as_int32(p[TOPK_IDS])[pair])


@njit
def group_by_expert(p):
    """Sort the (token, expert) pairs into slots and the slots into chunks. Ids below 0 get no slot."""
    pairs, experts = p[TOKENS] * p[TOP_K], p[EXPERTS]
    starts, slot_of = as_int32(p[EXPERT_START]), as_int32(p[SLOT_OF])
    counters = as_int64(p[COUNTERS])
    for i in range(6 * 8):
        counters[i] = 0
    for expert in range(experts + 1):
        starts[expert] = 0
    p[BAD_ID] = -1
    for pair in range(pairs):
        expert = _expert_of(p, pair)
        if expert >= experts:
            p[BAD_ID] = expert
            return
        if expert >= 0:
            starts[expert + 1] += 1
    chunks, chunk_count = as_int32(p[CHUNKS]), 0
    for expert in range(experts):
        count = starts[expert + 1]
        for first in range(0, count, CHUNK):
            chunks[3 * chunk_count] = expert
            chunks[3 * chunk_count + 1] = starts[expert] + first
            chunks[3 * chunk_count + 2] = min(CHUNK, count - first)
            chunk_count += 1
        starts[expert + 1] = starts[expert] + count
    p[CHUNK_COUNT] = chunk_count
    _fill_slots(p, pairs, starts, slot_of)


@njit
def _fill_slots(p, pairs, starts, slot_of):
    """Give every pair the next slot of its expert. Afterwards starts[e] is where expert e ends."""
    slot_token, slot_chunk = as_int32(p[SLOT_TOKEN]), as_int32(p[SLOT_CHUNK])
    weights, slot_weight = as_float32(p[TOPK_WEIGHTS]), as_float32(p[SLOT_WEIGHT])
    for pair in range(pairs):
        expert = _expert_of(p, pair)
        slot = -1
        if expert >= 0:
            slot = starts[expert]
            starts[expert] = slot + 1
            slot_token[slot] = pair // p[TOP_K]
            slot_weight[slot] = weights[pair]
        slot_of[pair] = slot
    chunks = as_int32(p[CHUNKS])
    for chunk in range(p[CHUNK_COUNT]):
        first, count = chunks[3 * chunk + 1], chunks[3 * chunk + 2]
        for slot in range(first, first + count):
            slot_chunk[2 * slot] = first
            slot_chunk[2 * slot + 1] = count


@njit
def quantize_inputs(p):
    """Quantise x, token by token, and copy the codes to the token's slots. Returns the tasks done."""
    hidden, top_k, dtype = p[HIDDEN], p[TOP_K], p[DTYPE]
    slot_of, slot_chunk = as_int32(p[SLOT_OF]), as_int32(p[SLOT_CHUNK])
    item = 4 if dtype == 0 else 2
    done = 0
    while True:
        token = fetch_add(p[COUNTERS] + 64, 1)
        if token >= p[TOKENS]:
            return done
        done += 1
        for group in range(hidden // GROUP_SIZE):
            source = p[X] + (token * hidden + group * GROUP_SIZE) * item
            first_low = first_high = first_scale = 0
            for j in range(top_k):
                slot = slot_of[token * top_k + j]
                if slot < 0:
                    continue
                first, count = int(slot_chunk[2 * slot]), int(slot_chunk[2 * slot + 1])
                low = code_address(p[CODES], first, count, slot - first, hidden, GROUP_SIZE, group)
                high = low + count * 64
                scale = scale_address(p[SCALES], first, count, slot - first, hidden, GROUP_SIZE, group)
                if first_low:
                    copy64(first_low, low)
                    copy64(first_high, high)
                    as_int64(scale)[0] = as_int64(first_scale)[0]  # both floats at once
                else:
                    first_low, first_high, first_scale = low, high, scale
                    quantize_group(dtype, GROUP_SIZE, source, low, high, scale)


@njit
def _products(p, number):
    """What multiplies matrices of a Code.number."""
    return as_int64(p[MULTIPLY_ROWS])[1 if number > TRELLIS_NUMBERS else 0]


@njit
def _width(number):
    """The bits of a Code.number."""
    return number - TRELLIS_NUMBERS if number > TRELLIS_NUMBERS else number


@njit
def _is_gated(p):
    return p[FUNCTION] & WITHOUT_GATE == 0


@njit
def _add_bias(totals, bias, blocks, count):
    """Add float32 [16 * blocks] at `bias` to every slot's totals."""
    for block in range(blocks):
        for i in range(count):
            scale_and_add(totals + (block * count + i) * ROWS * 4, np.float32(1.0), bias + block * ROWS * 4)


@njit
def gate_up_phase(p, scratch):
    """Tasks: (chunk of an expert's slots) x (128 intermediate rows: 8 row blocks of gate, if there is one, 8 of up).

    Returns the tasks done.
    """
    hidden, columns = p[HIDDEN], p[INTERMEDIATE] // GROUP_ROWS
    chunks, table = as_int32(p[CHUNKS]), as_int64(p[GATE_UP_TABLE])
    blocks = (2 if _is_gated(p) else 1) * GROUP_ROWS // ROWS
    done = 0
    while True:
        task = fetch_add(p[COUNTERS] + 128, 1)
        if task >= p[CHUNK_COUNT] * columns:
            return done
        done += 1
        chunk, column = task // columns, task % columns
        expert, first, count = int(chunks[3 * chunk]), int(chunks[3 * chunk + 1]), int(chunks[3 * chunk + 2])
        number = table[3 * expert]
        records = p[GATE_UP] + table[3 * expert + 1]
        records += column * blocks * (hidden // GROUP_SIZE) * table[3 * expert + 2]
        multiply_chunk(
            _products(p, number), _width(number), records, blocks, hidden, GROUP_SIZE,
            p[CODES], p[SCALES], first, count, scratch,
        )  # fmt: skip
        if p[GATE_UP_BIAS]:
            first_row = (expert * columns + column) * blocks * ROWS
            _add_bias(scratch, p[GATE_UP_BIAS] + first_row * 4, blocks, count)
        _activate_and_quantize(p, scratch, first, count, column, blocks)


@njit
def _activate(p, first, up, out):
    """The experts' function on 16 float32. first: address of gate, or of up where there is no gate."""
    code = p[FUNCTION]
    if code == 0:
        gate_silu(first, up, out)
    elif code == WITH_PARAMETERS:
        gate_silu_with_parameters(first, up, out, p[PARAMETERS])
    elif code == 1:
        gate_gelu(first, up, out)
    elif code == 2:
        gate_gelu_tanh(first, up, out)
    elif code == 3:
        gate_relu2(first, up, out)
    elif code == WITHOUT_GATE:
        silu(first, out)
    elif code == WITHOUT_GATE + 1:
        gelu(first, out)
    elif code == WITHOUT_GATE + 2:
        gelu_tanh(first, out)
    else:
        relu2(first, out)


@njit
def _activate_and_quantize(p, totals, first, count, column, blocks):
    """One group of 128 intermediate rows, quantised into the slots' tiles."""
    intermediate, group_blocks = p[INTERMEDIATE], GROUP_ROWS // ROWS
    row_bytes = ROWS * 4
    group = totals + blocks * count * row_bytes  # float32 [128], behind the totals
    for i in range(count):
        for block in range(group_blocks):
            gate = totals + (block * count + i) * row_bytes
            up = totals + ((block + group_blocks) * count + i) * row_bytes
            _activate(p, gate, up, group + block * row_bytes)
        low = code_address(p[MID_CODES], first, count, i, intermediate, GROUP_SIZE, column)
        scale = scale_address(p[MID_SCALES], first, count, i, intermediate, GROUP_SIZE, column)
        quantize_float32(GROUP_SIZE, group, low, low + count * 64, scale)


@njit
def down_phase(p, scratch):
    """Tasks: DOWN_ROWS output rows of all tokens; experts are added in ascending order."""
    hidden, intermediate, rows = p[HIDDEN], p[INTERMEDIATE], p[DOWN_ROWS]
    chunks, table = as_int32(p[CHUNKS]), as_int64(p[DOWN_TABLE])
    tokens, out = p[TOKENS], scratch
    totals = out + tokens * rows * 4
    while True:
        first_row = fetch_add(p[COUNTERS] + 192, 1) * rows
        if first_row >= hidden:
            return
        blocks = min(rows, hidden - first_row) // ROWS
        sums = as_float32(out)
        for i in range(tokens * rows):
            sums[i] = 0.0
        for chunk in range(p[CHUNK_COUNT]):
            expert, first, count = int(chunks[3 * chunk]), int(chunks[3 * chunk + 1]), int(chunks[3 * chunk + 2])
            number = table[3 * expert]
            records = p[DOWN] + table[3 * expert + 1]
            records += first_row // ROWS * (intermediate // GROUP_SIZE) * table[3 * expert + 2]
            multiply_chunk(
                _products(p, number), _width(number), records, blocks, intermediate, GROUP_SIZE,
                p[MID_CODES], p[MID_SCALES], first, count, totals,
            )  # fmt: skip
            if p[DOWN_BIAS]:
                _add_bias(totals, p[DOWN_BIAS] + (expert * hidden + first_row) * 4, blocks, count)
            _add_to_tokens(p, totals, first, count, blocks, out)
        for token in range(tokens):
            source = out + token * rows * 4
            write_rows(p[DTYPE], source, ROWS * 4, blocks, p[OUT], token * hidden + first_row)


@njit
def _add_to_tokens(p, totals, first, count, blocks, out):
    slot_token, slot_weight = as_int32(p[SLOT_TOKEN]), as_float32(p[SLOT_WEIGHT])
    for i in range(count):
        row = out + slot_token[first + i] * p[DOWN_ROWS] * 4
        for block in range(blocks):
            add_weighted(row + block * ROWS * 4, slot_weight[first + i], totals + (block * count + i) * ROWS * 4)


@njit
def work(p):
    """What one thread of the team does."""
    scratch = p[SCRATCH] + fetch_add(p[COUNTERS], 1) * p[SCRATCH_BYTES]
    finish_phase(p[COUNTERS] + 4 * 64, quantize_inputs(p), p[TOKENS])
    all_columns = p[CHUNK_COUNT] * (p[INTERMEDIATE] // GROUP_ROWS)
    finish_phase(p[COUNTERS] + 5 * 64, gate_up_phase(p, scratch), all_columns)
    down_phase(p, scratch)


@njit
def run(p, data):
    """The whole layer on torch's OpenMP team: group, then work. `data` is p's address."""
    group_by_expert(p)
    if p[BAD_ID] < 0:
        run_team(p[PARALLEL], p[WORKER], data, p[THREADS])
