"""Which slots each expert computes, and how the slots of a token become its output.

A slot is one (token, chosen expert) pair, slot = token * top_k + j. Slots whose expert is negative, or not on this
rank, belong to no block and contribute nothing.

A block is the slots of one expert that a program of the GEMMs computes together.

sorted_slots  int32 [capacity, block_tokens]  of each block; `slots` where it is not full
block_expert  int32 [capacity]                expert of each block, -1 for unused ones, whose slots are not set
"""

import triton
import triton.language as tl

CHUNK = 1024  # ids read at a time by every program: all of them in decode, 8 per thread of a 4-warp program
SMALLEST_HISTOGRAM = 128  # bins; a histogram narrower than a program's threads gains nothing
FEW_SLOTS = 64  # at most; every program then compares each with its own
COMBINE_BLOCK = 512  # features per program: 4 per thread, one 16-byte load per row
COMBINE_ROWS = 8  # loaded at a time, all in flight


def block_capacity(slots: int, experts: int, block_tokens: int) -> int:
    """The most blocks that any routing of `slots` over `experts` can need: the grid is fixed, whatever the ids are.

    An expert with n > 0 slots needs ceil(n / block) <= (n + block - 1) / block blocks, and at most min(experts, slots)
    experts have any.
    """
    return (slots + min(experts, slots) * (block_tokens - 1)) // block_tokens


@triton.jit
def local_expert(ids, map_ptr, inside, experts, MAPPED: tl.constexpr):
    """Router ids -> this rank's expert ids, int32; -1 for whatever this rank does not compute."""
    if MAPPED:
        ids = tl.load(map_ptr + tl.maximum(ids, 0), mask=inside & (ids >= 0), other=-1)
    ids = ids.to(tl.int32)
    return tl.where(inside & (ids >= 0) & (ids < experts), ids, -1)


@triton.jit
def _load_experts(ids_ptr, map_ptr, start, slots, experts, MAPPED: tl.constexpr, CHUNK: tl.constexpr):
    slot = start + tl.arange(0, CHUNK)
    inside = slot < slots
    return slot, local_expert(tl.load(ids_ptr + slot, mask=inside, other=-1), map_ptr, inside, experts, MAPPED)


@triton.jit
def sort_slots(
    expert, ids_ptr, map_ptr, sorted_slots_ptr, block_expert_ptr, slots, capacity, block_tokens, experts,
    BINS: tl.constexpr, MAPPED: tl.constexpr, CHUNK: tl.constexpr, LARGEST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots sorted by expert, each expert's padded to whole blocks. Deterministic: within an expert, slots ascend.

    The program of expert e in [0, experts) counts all slots, then places its own; none waits for another. The program
    of `experts` marks the unused blocks.
    """
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, slots, CHUNK):
        _, chosen = _load_experts(ids_ptr, map_ptr, start, slots, experts, MAPPED, CHUNK)
        counts += tl.histogram(tl.maximum(chosen, 0), BINS, mask=chosen >= 0)
    blocks = (counts + block_tokens - 1) // block_tokens
    first_block = tl.sum(tl.where(bins < expert, blocks, 0))
    if expert == experts:
        for start in range(first_block, capacity, CHUNK):
            block = start + tl.arange(0, CHUNK)
            tl.store(block_expert_ptr + block, -1, mask=block < capacity)
    else:
        placed = first_block * block_tokens
        for start in range(0, slots, CHUNK):
            slot, chosen = _load_experts(ids_ptr, map_ptr, start, slots, experts, MAPPED, CHUNK)
            mine = (chosen == expert).to(tl.int32)
            tl.store(sorted_slots_ptr + placed + tl.cumsum(mine, 0) - 1, slot, mask=mine > 0)
            placed += tl.sum(mine)
        end_block = first_block + tl.sum(tl.where(bins == expert, blocks, 0))
        padding = placed + tl.arange(0, LARGEST_BLOCK)
        tl.store(sorted_slots_ptr + padding, slots, mask=padding < end_block * block_tokens)
        for start in range(first_block, end_block, CHUNK):
            block = start + tl.arange(0, CHUNK)
            tl.store(block_expert_ptr + block, expert, mask=block < end_block)


@triton.jit
def sort_few_slots(
    block, ids_ptr, map_ptr, sorted_slots_ptr, block_expert_ptr, slots, block_tokens, experts,
    MAPPED: tl.constexpr, FEW_SLOTS: tl.constexpr, LARGEST_BLOCK: tl.constexpr,
):  # fmt: skip
    """What `sort_slots` does, for at most FEW_SLOTS, in less time: block b, of as many as slots, begins with slot b.

    It is used if b is the first slot of its expert, or the first after a full block. The others are in an earlier one.
    """
    index, chosen = _load_experts(ids_ptr, map_ptr, 0, slots, experts, MAPPED, FEW_SLOTS)
    expert = tl.sum(tl.where(index == block, chosen, 0))
    same = ((chosen == expert) & (expert >= 0)).to(tl.int32)
    first = tl.sum(tl.where(index < block, same, 0))  # how many slots of the expert come before b
    expert = tl.where(first % block_tokens == 0, expert, -1)
    size = tl.where(expert >= 0, block_tokens, 0)
    place = tl.cumsum(same, 0) - 1 - first
    at = sorted_slots_ptr + block * block_tokens
    tl.store(at + place, index, mask=(same > 0) & (place >= 0) & (place < size))
    column = tl.arange(0, LARGEST_BLOCK)
    tl.store(at + column, slots, mask=(column >= tl.sum(same) - first) & (column < size))
    tl.store(block_expert_ptr + block, expert)


@triton.jit
def routed_sum(
    partial_ptr, ids_ptr, weights_ptr, map_ptr, token, feature, slots, N, top_k, split_k, experts,
    MAPPED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sum_j weights[token, j] * sum_p partial[p, token * top_k + j] -> float32, of the shape of `feature`, a vector.

    Always in the same order, ROWS of the top_k * split_k rows at a time. Slots without an expert are neither read nor
    added, so nothing needs to clear them.
    """
    total = tl.zeros(feature.shape, tl.float32)
    for first in range(0, top_k * split_k, ROWS):
        row = first + tl.arange(0, ROWS)
        slot = token * top_k + row // split_k
        inside = row < top_k * split_k
        ids = tl.load(ids_ptr + slot, mask=inside, other=-1)
        computed = local_expert(ids, map_ptr, inside, experts, MAPPED) >= 0
        weight = tl.load(weights_ptr + slot, mask=computed, other=0.0).to(tl.float32)
        at = partial_ptr + (row % split_k * slots + slot).to(tl.int64)[:, None] * N + feature[None, :]
        value = tl.load(at, mask=computed[:, None] & (feature < N)[None, :], other=0.0)
        total += tl.sum(weight[:, None] * value, axis=0)
    return total


# a prompt of another length, or memory at another address, must not compile a kernel
@triton.jit(
    do_not_specialize=["slots", "top_k", "split_k", "experts"],
    do_not_specialize_on_alignment=["ids_ptr", "weights_ptr", "map_ptr"],
)
def combine_kernel(
    partial_ptr, ids_ptr, weights_ptr, map_ptr, out_ptr, slots, N, top_k, split_k, experts,
    MAPPED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j weights[t, j] * sum_p partial[p, t * top_k + j].

    Grid: (tokens, ceil(N / BLOCK)). partial float32 [split_k, slots, N], ids int and weights float [tokens, top_k],
    out any float type [tokens, N].
    """
    token = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = routed_sum(
        partial_ptr, ids_ptr, weights_ptr, map_ptr, token, feature, slots, N, top_k, split_k, experts, MAPPED, ROWS
    )
    tl.store(out_ptr + token.to(tl.int64) * N + feature, total.to(out_ptr.dtype.element_ty), mask=feature < N)
