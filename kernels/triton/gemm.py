"""The grouped GEMM: every expert of a layer in one launch, whatever their bit-widths.

    out[slot, n] = sum_g x_scale[row, g] * scale[n, g] * ( sum_k code[n, k] * x[row, k]  -  zero[n, g] * x_sum[row, g] )

and the expert's bias[n], where it has one. A slot is one (token, chosen expert) pair, slot = token * top_k + j; it
reads row slot // slots_per_row of x. One program computes a tile of 256 features for BLOCK_TOKENS slots of one expert,
over all groups or, with split-K, over a part of them. The last of the parts to arrive adds them up, always in the same
order.

The weights are the A operand, out^T = W x^T: the tensor core's 8-wide side then meets the tokens, so that decode wastes
nothing on a tile of 8. The sums over a group are exact, see accumulate.py.
"""

# ruff: noqa: RUF005, SIM102 - Triton has no starred expressions, and a compile-time `if` must stand alone

import triton
import triton.language as tl

from vllm_mcmoe.kernels.triton.accumulate import accumulate
from vllm_mcmoe.kernels.triton.accumulate_rings import accumulate_rings
from vllm_mcmoe.kernels.triton.activation import activated, gated
from vllm_mcmoe.kernels.triton.fields import code_width, field_count, has_trellis, is_trellis, tile_rows
from vllm_mcmoe.kernels.triton.quantize import scale_of, stored_position, stored_sum, stored_value
from vllm_mcmoe.kernels.triton.routing import routed_sum

BLOCKS_PER_GROUP = 16  # blocks whose programs follow each other, tile by tile
SUMMED_ROWS = 8  # rows of partial sums that a program of 2 warps loads at a time, 32 floats a thread


@triton.jit
def _partial_at(partial_ptr, part, slot, slots, tile, N, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Where one part's sums of a field are, [rows, tokens]: partial is float32 [split_k, slots, N] in tile order."""
    ROWS: tl.constexpr = tile_rows(BITS)
    feature = tile * 256 + FIELD * ROWS + tl.arange(0, ROWS)
    return partial_ptr + (part * slots + slot).to(tl.int64)[None, :] * N + feature[:, None]


@triton.jit
def _store_sums(sums, partial_ptr, part, slot, slots, tile, N, BITS: tl.constexpr):
    """Features beyond N are padding."""
    ROWS: tl.constexpr = tile_rows(BITS)
    for field in tl.static_range(field_count(BITS)):
        feature = (tile * 256 + field * ROWS + tl.arange(0, ROWS))[:, None]
        at = _partial_at(partial_ptr, part, slot, slots, tile, N, field, BITS)
        tl.store(at, sums[field], mask=(slot < slots)[None, :] & (feature < N))


@triton.jit
def _add_bias(sums, bias_ptr, tile, part, BITS: tl.constexpr):
    """Added by the first part. bias: the expert's, float32, whole tiles."""
    ROWS: tl.constexpr = tile_rows(BITS)
    biased = ()
    for field in tl.static_range(field_count(BITS)):
        bias = tl.load(bias_ptr + tile * 256 + field * ROWS + tl.arange(0, ROWS))
        biased = biased + (sums[field] + tl.where(part == 0, bias, 0.0)[:, None],)
    return biased


@triton.jit
def _load_sums(
    partial_ptr, split_k, slot, slots, tile, N, BLOCK_TOKENS: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr
):
    """What `_store_sums` stored, added in the order of the parts. WHOLE: N is whole tiles."""
    ROWS: tl.constexpr = tile_rows(BITS)
    sums = ()
    for _ in tl.static_range(field_count(BITS)):
        sums = sums + (tl.zeros((ROWS, BLOCK_TOKENS), tl.float32),)
    for part in range(split_k):
        added = ()
        for field in tl.static_range(field_count(BITS)):
            at = _partial_at(partial_ptr, part, slot, slots, tile, N, field, BITS)
            inside = (slot < slots)[None, :]
            if not WHOLE:
                inside &= (tile * 256 + field * ROWS + tl.arange(0, ROWS) < N)[:, None]
            added = added + (sums[field] + tl.load(at, mask=inside, other=0.0),)
        sums = added
    return sums


@triton.jit
def _arrive(counter_ptr, AMD: tl.constexpr):
    """How many programs were here before. The last one may read what all of them stored: the barrier brings the stores
    of every thread before the count, which releases them and acquires those of the programs before.
    """
    if AMD:  # the barrier there does not wait for a wavefront's stores
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v", [tl.arange(0, 64)], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _store_group(
    values, first_field, group, features, out_ptr, scale_ptr, sum_ptr, slot, slots,
    FIELDS: tl.constexpr, ROWS: tl.constexpr, FLOAT: tl.constexpr, RINGS: tl.constexpr,
):  # fmt: skip
    """128 intermediate features, values[first_field] and the fields after it, as int8 or float16 of `features` a slot,
    with scale and sum. Groups beyond `features` are padding.
    """
    absmax = tl.max(tl.abs(values[first_field]), axis=0)
    for field in tl.static_range(1, FIELDS):
        absmax = tl.maximum(absmax, tl.max(tl.abs(values[first_field + field]), axis=0))
    scale = scale_of(absmax, FLOAT)
    inside = slot < slots
    slot = slot.to(tl.int64)
    value_sum = tl.zeros_like(scale)
    for field in tl.static_range(FIELDS):
        stored = stored_value(values[first_field + field], scale[None, :], FLOAT)
        value_sum += tl.sum(stored, axis=0)
        feature = group * 128 + stored_position(field * ROWS + tl.arange(0, ROWS), FLOAT, RINGS)
        out_at = out_ptr + slot[None, :] * features + feature[:, None]
        tl.store(out_at, stored.to(out_ptr.dtype.element_ty), mask=inside[None, :])
    tl.store(scale_ptr + slot * (features // 128) + group, scale, mask=inside)
    tl.store(sum_ptr + slot * (features // 128) + group, stored_sum(value_sum, FLOAT), mask=inside)


@triton.jit
def _store_activated(
    sums, out_ptr, scale_ptr, sum_ptr, slot, slots, tile, N,
    BITS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, FLOAT: tl.constexpr, RINGS: tl.constexpr,
):  # fmt: skip
    """The experts' function. With a gate a tile's first 128 features are gate, the last 128 up: one group. Without,
    they are two groups, the second of which may lie beyond N.
    """
    ROWS: tl.constexpr = tile_rows(BITS)
    PAIRS: tl.constexpr = field_count(BITS) // 2
    values = ()
    if GATED:
        for field in tl.static_range(PAIRS):
            values = values + (gated(sums[field], sums[field + PAIRS], ACTIVATION, LIMIT, ALPHA, BETA),)
        _store_group(values, 0, tile, N // 2, out_ptr, scale_ptr, sum_ptr, slot, slots, PAIRS, ROWS, FLOAT, RINGS)
    else:
        for field in tl.static_range(2 * PAIRS):
            values = values + (activated(sums[field], ACTIVATION, ALPHA),)
        for half in tl.static_range(2):
            group = 2 * tile + half
            if group < N // 128:
                _store_group(
                    values, half * PAIRS, group, N, out_ptr, scale_ptr, sum_ptr, slot, slots, PAIRS, ROWS, FLOAT, RINGS
                )


@triton.jit
def _tile(
    x_ptr, x_scale_ptr, x_sum_ptr, codes_ptr, scales_ptr, bias_ptr,
    partial_ptr, counter_ptr, out_ptr, out_scale_ptr, out_sum_ptr,
    slot, slots, slots_per_row, tile, part, split_k, N, K,
    BITS: tl.constexpr, ZEROS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STAGES: tl.constexpr, BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    INLINE_ASM: tl.constexpr, AMD: tl.constexpr, FLOAT: tl.constexpr, RINGS: tl.constexpr,
):  # fmt: skip
    """One program's work for an expert of one code; codes_ptr, scales_ptr and bias_ptr point at the expert."""
    groups = K // 128
    x_row = (tl.where(slot < slots, slot, 0) // slots_per_row).to(tl.int64)  # padding reads row 0, is never stored
    codes_ptr += tile.to(tl.int64) * groups * (4096 * code_width(BITS))
    # a tile has 256 scales per group: int32 words with their zeros, or halves of words without
    scales_ptr += tile.to(tl.int64) * groups * (256 if ZEROS else 128)
    share = tl.cdiv(groups, split_k)
    begin, end = part * share, tl.minimum(part * share + share, groups)
    if is_trellis(BITS):
        sums = accumulate_rings(
            x_ptr, x_scale_ptr, x_sum_ptr, x_row, codes_ptr, scales_ptr, K, begin, end,
            BITS, BLOCK_TOKENS, STAGES, INLINE_ASM, FLOAT,
        )  # fmt: skip
    else:
        sums = accumulate(
            x_ptr, x_scale_ptr, x_sum_ptr, x_row, codes_ptr, scales_ptr, K, begin, end,
            BITS, ZEROS, BLOCK_TOKENS, STAGES, INLINE_ASM, FLOAT,
        )  # fmt: skip
    if BIASED:
        sums = _add_bias(sums, bias_ptr, tile, part, BITS)
    if ACTIVATION is None:
        _store_sums(sums, partial_ptr, part, slot, slots, tile, N, BITS)
    else:
        complete = split_k == 1
        if split_k > 1:
            _store_sums(sums, partial_ptr, part, slot, slots, tile, N, BITS)
            complete = _arrive(counter_ptr, AMD) == split_k - 1
            if complete:
                sums = _load_sums(partial_ptr, split_k, slot, slots, tile, N, BLOCK_TOKENS, BITS, GATED)
        if complete:
            _store_activated(
                sums, out_ptr, out_scale_ptr, out_sum_ptr, slot, slots, tile, N,
                BITS, ACTIVATION, GATED, LIMIT, ALPHA, BETA, FLOAT, RINGS,
            )  # fmt: skip


@triton.jit
def _place(program, blocks, tiles, GROUP: tl.constexpr):
    """(block, tile) of a program: GROUP blocks at a time go through the tiles together, so that a tile that several
    blocks of one expert read comes from memory once, and their rows of x stay in the second level cache.
    """
    first = program // (GROUP * tiles) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    within = program % (GROUP * tiles)
    return first + within % size, within // size


# a prompt of another length, or memory at another address, must not compile a kernel
@triton.jit(
    do_not_specialize=["slots", "blocks", "tiles", "slots_per_row", "top_k", "split_k", "experts"],
    do_not_specialize_on_alignment=["ids_ptr", "weights_ptr", "map_ptr"],
)
def grouped_gemm_kernel(
    x_ptr, x_scale_ptr, x_sum_ptr,
    codes_ptr, scales_ptr, offsets_ptr, bits_ptr, bias_ptr,
    ids_ptr, map_ptr, weights_ptr, sorted_slots_ptr, block_expert_ptr,
    partial_ptr, counters_ptr, out_ptr, out_scale_ptr, out_sum_ptr,
    slots, blocks, tiles, slots_per_row, top_k, split_k, experts, N, K,
    WIDTHS: tl.constexpr, STORED_ZEROS: tl.constexpr, MAPPED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, STAGES: tl.constexpr,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    INLINE_ASM: tl.constexpr, AMD: tl.constexpr, FLOAT: tl.constexpr,
    COMBINE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles * blocks, split_k), tiles of 256 features.

    x               int8    [rows, K]              float16 where FLOAT; with x_scale, x_sum float32 [rows, K/128]
    codes, scales, offsets, bits                   an ExpertStack
    bias            float32 [experts, 256 * tiles] where BIASED, features in the stack's row order
    ids, map, weights, sorted_slots, block_expert  the routing, see routing.py
    partial         float32 [split_k, slots, N]    partial sums, features in the stack's row order
    counters        int32                          zeros: [blocks, tiles], or [tiles] to COMBINE; see `_arrive`
    ACTIVATION      out as x, [slots, N/2], with out_scale and out_sum float32 [slots, N/256]; None: partial alone.
                    Not GATED: [slots, N] and [slots, N/128]. LIMIT, ALPHA, BETA: of expert_function.py
    COMBINE         the last program of a tile adds up what all of them stored: out [tokens, N], the routed sum
    WIDTHS          bit n set: some expert has the code of number n (packing.Code); the others' are not even compiled.
                    Where one is a trellis code, x and out have their inputs in the order of rings.py
    STORED_ZEROS    experts with scalar codes of more than 1 bit have zeros
    """
    block, tile = _place(tl.program_id(0), blocks, tiles, GROUP)
    part = tl.program_id(1)
    expert = tl.load(block_expert_ptr + block)
    slot = tl.load(sorted_slots_ptr + block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))
    if expert >= 0:
        bits = tl.load(bits_ptr + expert)
        codes_ptr += tl.multiple_of(tl.load(offsets_ptr + 2 * expert), 4096)
        scales_ptr += tl.multiple_of(tl.load(offsets_ptr + 2 * expert + 1), 128)
        for exponent in tl.static_range(0, 21):
            if (WIDTHS >> exponent) & 1:
                if bits == exponent:
                    _tile(
                        x_ptr, x_scale_ptr, x_sum_ptr, codes_ptr, scales_ptr, bias_ptr + expert * tiles * 256,
                        partial_ptr, counters_ptr + block * tiles + tile, out_ptr, out_scale_ptr, out_sum_ptr,
                        slot, slots, slots_per_row, tile, part, split_k, N, K,
                        exponent, STORED_ZEROS and exponent > 1 and not is_trellis(exponent), BLOCK_TOKENS,
                        2 if exponent == 8 else STAGES,  # 32 KiB a stage: three exceed the 99 KiB of sm86, sm89, sm120
                        BIASED, ACTIVATION, GATED, LIMIT, ALPHA, BETA, INLINE_ASM, AMD, FLOAT, has_trellis(WIDTHS),
                    )  # fmt: skip
    if COMBINE:
        if _arrive(counters_ptr + tile, AMD) == blocks * split_k - 1:
            feature = tile * 256 + tl.arange(0, 256)
            for token in range(slots // top_k):
                total = routed_sum(
                    partial_ptr, ids_ptr, weights_ptr, map_ptr, token, feature,
                    slots, N, top_k, split_k, experts, MAPPED, ROWS,
                )  # fmt: skip
                tl.store(out_ptr + token * N + feature, total.to(out_ptr.dtype.element_ty), mask=feature < N)
