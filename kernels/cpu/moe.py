"""One MoE layer in compiled code: group tokens by expert, quantise, gate_up and gate, down and weighted sum.

A (token, expert) pair is a slot; slots are sorted by expert, then by token. Work is cut into tasks that threads take
from a shared counter, because experts differ in width and tokens, and cores in speed. Every output element is computed
by one thread in an order that depends on neither the number of threads nor the rest of the batch, so results are the
same bits in any setting.

Slots of one expert form chunks of at most CHUNK. Activations are stored chunk by chunk: codes [inputs/64][slots of the
chunk][64], scales [groups][slots of the chunk][2] (see vectors.quantize_*). A lone token's codes are then contiguous,
and any 16 slots' codes are 1 KiB blocks, an AMX tile each.
"""

from enum import IntEnum

from numba import njit

from vllm_mcmoe.kernels.cpu.intrinsics import (
    as_float32,
    as_int32,
    as_int64,
    call_parallel,
    call_rows,
    call_worker,
    fetch_add,
    load_acquire,
    pause,
    yield_core,
)
from vllm_mcmoe.kernels.cpu.layout import ROWS, record_bytes_compiled
from vllm_mcmoe.kernels.cpu.vectors import (
    BFLOAT16,
    FLOAT16,
    add_weighted,
    copy64,
    gate_gelu,
    gate_gelu_tanh,
    gate_silu,
    quantize_bfloat16,
    quantize_float16,
    quantize_float32,
    write_bfloat16,
    write_float16,
    write_float32,
)
from vllm_mcmoe.kernels.packing import GROUP_SIZE

CHUNK = 256  # most slots of one expert a task handles: 16 row blocks of float32 sums for them are 256 KiB of L2
CACHED_INPUTS = 512 * 1024  # bytes of activations a task goes through before it comes back to them: they stay in L2
SPINS = 2000  # about 50 us of waiting awake, longer than a task of decoding; then the core is offered to others
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
    ACTIVATION = 11  # value: index into vectors.GATES
    GATE_UP = 12  # records, see layout.py
    GATE_UP_TABLE = 13  # int64 [experts, 2]: width, offset of the expert's first record
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
    MULTIPLY_ROWS = 35  # the products of this CPU's instruction set


# numba takes plain integers as constants, not members of an enumeration
(
    X, OUT, DTYPE, TOKENS, TOP_K, TOPK_IDS, IDS_ARE_INT64, TOPK_WEIGHTS, EXPERTS, HIDDEN, INTERMEDIATE, ACTIVATION,
    GATE_UP, GATE_UP_TABLE, DOWN, DOWN_TABLE, COUNTERS, SLOT_OF, SLOT_TOKEN, SLOT_WEIGHT, SLOT_CHUNK, CHUNKS,
    CHUNK_COUNT, EXPERT_START, CODES, SCALES, MID_CODES, MID_SCALES, SCRATCH, SCRATCH_BYTES, DOWN_ROWS, BAD_ID,
    THREADS, PARALLEL, WORKER, MULTIPLY_ROWS,
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
def _code_address(base, first, count, i, features, half):
    """Address of 64 codes: the `half`-th 64 inputs of slot i of the chunk of `count` slots from `first`."""
    return base + first * features + (half * count + i) * 64


@njit
def _scale_address(base, first, count, i, features, group):
    return base + (first * (features // GROUP_SIZE) + group * count + i) * 8


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
                low = _code_address(p[CODES], first, count, slot - first, hidden, 2 * group)
                high = low + count * 64
                scale = _scale_address(p[SCALES], first, count, slot - first, hidden, group)
                if first_low:
                    copy64(first_low, low)
                    copy64(first_high, high)
                    as_int64(scale)[0] = as_int64(first_scale)[0]  # both floats at once
                else:
                    first_low, first_high, first_scale = low, high, scale
                    if dtype == BFLOAT16:
                        quantize_bfloat16(source, low, high, scale)
                    elif dtype == FLOAT16:
                        quantize_float16(source, low, high, scale)
                    else:
                        quantize_float32(source, low, high, scale)


@njit
def multiply_chunk(multiply_rows, bits, records, row_blocks, features, codes, scales, first, count, totals):
    """totals[block][slot][16 rows] = weights of `row_blocks` row blocks times the chunk's slots, float32.

    Goes through the inputs in portions that stay in L2 while all row blocks use them.
    """
    sums = as_float32(totals)
    for i in range(row_blocks * count * ROWS):
        sums[i] = 0.0
    groups = features // GROUP_SIZE
    portion = min(groups, max(1, CACHED_INPUTS // (count * GROUP_SIZE)))
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
def gate_up_phase(p, scratch):
    """Tasks: (chunk of an expert's slots) x (128 intermediate rows: 8 row blocks of gate, 8 of up).

    Returns the tasks done.
    """
    hidden, columns = p[HIDDEN], p[INTERMEDIATE] // GROUP_ROWS
    chunks, table = as_int32(p[CHUNKS]), as_int64(p[GATE_UP_TABLE])
    blocks = 2 * GROUP_ROWS // ROWS
    done = 0
    while True:
        task = fetch_add(p[COUNTERS] + 128, 1)
        if task >= p[CHUNK_COUNT] * columns:
            return done
        done += 1
        chunk, column = task // columns, task % columns
        expert, first, count = int(chunks[3 * chunk]), int(chunks[3 * chunk + 1]), int(chunks[3 * chunk + 2])
        bits = table[2 * expert]
        records = p[GATE_UP] + table[2 * expert + 1]
        records += column * blocks * (hidden // GROUP_SIZE) * record_bytes_compiled(bits)
        multiply_chunk(p[MULTIPLY_ROWS], bits, records, blocks, hidden, p[CODES], p[SCALES], first, count, scratch)
        _gate_and_quantize(p, scratch, first, count, column)


@njit
def _gate_and_quantize(p, totals, first, count, column):
    """act(gate) * up of one group of 128 intermediate rows, quantised into the slots' tiles."""
    intermediate, half = p[INTERMEDIATE], GROUP_ROWS // ROWS
    row_bytes = ROWS * 4
    group = totals + 2 * half * count * row_bytes  # float32 [128], behind the totals
    for i in range(count):
        for block in range(half):
            gate = totals + (block * count + i) * row_bytes
            up = totals + ((block + half) * count + i) * row_bytes
            if p[ACTIVATION] == 0:
                gate_silu(gate, up, group + block * row_bytes)
            elif p[ACTIVATION] == 1:
                gate_gelu(gate, up, group + block * row_bytes)
            else:
                gate_gelu_tanh(gate, up, group + block * row_bytes)
        low = _code_address(p[MID_CODES], first, count, i, intermediate, 2 * column)
        scale = _scale_address(p[MID_SCALES], first, count, i, intermediate, column)
        quantize_float32(group, low, low + count * 64, scale)


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
            bits = table[2 * expert]
            records = p[DOWN] + table[2 * expert + 1]
            records += first_row // ROWS * (intermediate // GROUP_SIZE) * record_bytes_compiled(bits)
            multiply_chunk(
                p[MULTIPLY_ROWS], bits, records, blocks, intermediate, p[MID_CODES], p[MID_SCALES], first, count, totals
            )
            _add_to_tokens(p, totals, first, count, blocks, out)
        _write_rows(p, out, first_row, blocks)


@njit
def _add_to_tokens(p, totals, first, count, blocks, out):
    slot_token, slot_weight = as_int32(p[SLOT_TOKEN]), as_float32(p[SLOT_WEIGHT])
    for i in range(count):
        row = out + slot_token[first + i] * p[DOWN_ROWS] * 4
        for block in range(blocks):
            add_weighted(row + block * ROWS * 4, slot_weight[first + i], totals + (block * count + i) * ROWS * 4)


@njit
def _write_rows(p, out, first_row, blocks):
    item = 4 if p[DTYPE] == 0 else 2
    for token in range(p[TOKENS]):
        for block in range(blocks):
            source = out + (token * p[DOWN_ROWS] + block * ROWS) * 4
            target = p[OUT] + (token * p[HIDDEN] + first_row + block * ROWS) * item
            if p[DTYPE] == BFLOAT16:
                write_bfloat16(source, target)
            elif p[DTYPE] == FLOAT16:
                write_float16(source, target)
            else:
                write_float32(source, target)


@njit
def work(p):
    """What one thread of the team does."""
    scratch = p[SCRATCH] + fetch_add(p[COUNTERS], 1) * p[SCRATCH_BYTES]
    _finish_phase(p, 0, quantize_inputs(p), p[TOKENS])
    _finish_phase(p, 1, gate_up_phase(p, scratch), p[CHUNK_COUNT] * (p[INTERMEDIATE] // GROUP_ROWS))
    down_phase(p, scratch)


@njit
def _finish_phase(p, phase, own_tasks, all_tasks):
    """Report this thread's tasks, then wait until all are done.

    Waiting for tasks rather than for threads lets a team go on while a thread of it has not been given a core yet.
    """
    finished = p[COUNTERS] + (4 + phase) * 64
    fetch_add(finished, own_tasks)
    spins = 0
    while load_acquire(finished) < all_tasks:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            yield_core()


@njit
def run(p, data):
    """The whole layer on torch's OpenMP team: group, then work. `data` is p's address."""
    group_by_expert(p)
    if p[BAD_ID] >= 0:
        return
    if p[THREADS] == 1:
        call_worker(p[WORKER], data)
    else:
        call_parallel(p[PARALLEL], p[WORKER], data, p[THREADS])
