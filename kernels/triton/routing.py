"""Which slots each expert computes, and how the slots of a token become its output.

A slot is one (token, chosen expert) pair, slot = token * top_k + j. Slots whose expert is negative, or not on this
rank, belong to no block and contribute nothing.
"""

import triton
import triton.language as tl

CHUNK = 1024  # ids read at a time by every program: all of them in decode, 8 per thread of a 4-warp program
SMALLEST_HISTOGRAM = 128  # bins; a histogram narrower than a program's threads gains nothing


def block_capacity(slots: int, experts: int, block_tokens: int) -> int:
    """The most blocks that any routing of `slots` over `experts` can need: the grid is fixed, whatever the ids are.

    An expert with n > 0 slots needs ceil(n / block) <= (n + block - 1) / block blocks, and at most min(experts, slots)
    experts have any.
    """
    return (slots + min(experts, slots) * (block_tokens - 1)) // block_tokens


@triton.jit
def local_expert(ids, map_ptr, inside, EXPERTS: tl.constexpr, MAPPED: tl.constexpr):
    """Router ids -> this rank's expert ids, int32; -1 for whatever this rank does not compute."""
    if MAPPED:
        ids = tl.load(map_ptr + tl.maximum(ids, 0), mask=inside & (ids >= 0), other=-1)
    ids = ids.to(tl.int32)
    return tl.where(inside & (ids >= 0) & (ids < EXPERTS), ids, -1)


@triton.jit
def _load_experts(ids_ptr, map_ptr, start, slots, EXPERTS: tl.constexpr, MAPPED: tl.constexpr, CHUNK: tl.constexpr):
    slot = start + tl.arange(0, CHUNK)
    inside = slot < slots
    return slot, local_expert(tl.load(ids_ptr + slot, mask=inside, other=-1), map_ptr, inside, EXPERTS, MAPPED)


@triton.jit(do_not_specialize=["slots", "capacity"])  # a prompt of another length must not compile a kernel
def align_kernel(
    ids_ptr, map_ptr, sorted_slots_ptr, block_expert_ptr, slots, capacity,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, MAPPED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Slots sorted by expert, each expert's padded to whole blocks. Deterministic: within an expert, slots ascend.

    Grid: (EXPERTS + 1,). Program e counts all slots, then places those of expert e; no program waits for another.
    The last program marks the unused blocks.

    ids           int      [slots]                   router ids
    map           int32    [global experts]          local id of each, -1 elsewhere; unused unless MAPPED
    sorted_slots  int32    [capacity*BLOCK_TOKENS]   `slots` where a block is not full; unset in unused blocks
    block_expert  int32    [capacity]                -1 for unused blocks
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, slots, CHUNK):
        _, chosen = _load_experts(ids_ptr, map_ptr, start, slots, EXPERTS, MAPPED, CHUNK)
        counts += tl.histogram(tl.maximum(chosen, 0), BINS, mask=chosen >= 0)
    blocks = tl.cdiv(counts, BLOCK_TOKENS)
    first_block = tl.sum(tl.where(bins < expert, blocks, 0))
    if expert == EXPERTS:
        for start in range(first_block, capacity, CHUNK):
            block = start + tl.arange(0, CHUNK)
            tl.store(block_expert_ptr + block, -1, mask=block < capacity)
    else:
        placed = first_block * BLOCK_TOKENS
        for start in range(0, slots, CHUNK):
            slot, chosen = _load_experts(ids_ptr, map_ptr, start, slots, EXPERTS, MAPPED, CHUNK)
            mine = (chosen == expert).to(tl.int32)
            tl.store(sorted_slots_ptr + placed + tl.cumsum(mine, 0) - 1, slot, mask=mine > 0)
            placed += tl.sum(mine)
        end_block = first_block + tl.sum(tl.where(bins == expert, blocks, 0))
        padding = placed + tl.arange(0, BLOCK_TOKENS)
        tl.store(sorted_slots_ptr + padding, slots, mask=padding < end_block * BLOCK_TOKENS)
        for start in range(first_block, end_block, CHUNK):
            block = start + tl.arange(0, CHUNK)
            tl.store(block_expert_ptr + block, expert, mask=block < end_block)


@triton.jit(do_not_specialize=["slots"])  # a prompt of another length must not compile a kernel
def combine_kernel(
    partial_ptr, ids_ptr, weights_ptr, map_ptr, out_ptr, slots, N,
    TOP_K: tl.constexpr, SPLIT_K: tl.constexpr, EXPERTS: tl.constexpr, MAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j weights[t, j] * sum_s partial[s, t * TOP_K + j], in this order, in float32: deterministic.

    Grid: (tokens, ceil(N / BLOCK)). Slots without an expert are neither read nor added, so nothing needs to clear them.
    partial float32 [SPLIT_K, slots, N], ids int and weights float [tokens, TOP_K], out any float type [tokens, N].
    """
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(TOP_K):
        slot = token * TOP_K + j
        computed = local_expert(tl.load(ids_ptr + slot), map_ptr, slot < slots, EXPERTS, MAPPED) >= 0
        readable = tl.where(computed, N, 0)
        value = tl.zeros((BLOCK,), tl.float32)
        for part in range(SPLIT_K):
            at = partial_ptr + (part * slots + slot) * N + feature
            value += tl.load(at, mask=feature < readable, other=0.0)
        total += tl.load(weights_ptr + slot).to(tl.float32) * value
    tl.store(out_ptr + token * N + feature, total.to(out_ptr.dtype.element_ty), mask=feature < N)
