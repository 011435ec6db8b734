"""The grouped GEMM: every expert of a layer in one launch, whatever their bit-widths.

    out[slot, n] = sum_g x_scale[row, g] * scale[n, g] * ( sum_k code[n, k] * x[row, k]  -  zero[n, g] * x_sum[row, g] )

A slot is one (token, chosen expert) pair, slot = token * top_k + j; it reads row slot // SLOTS_PER_ROW of x. One
program computes a tile of 256 features for BLOCK_TOKENS slots of one expert, over all groups or, with split-K, over
a part of them.

The weights are the A operand, out^T = W x^T: the tensor core's 8-wide side then meets the tokens, so that decode wastes
nothing on a tile of 8. Codes enter as `byte & mask` = code * 2**shift (see layout.py). The int32 sums are exact, the
shift is taken out by an exact power of two, and float32 rounds for the first time when the zero point is subtracted.
"""

# ruff: noqa: RUF005, SIM102 - Triton has no starred expressions, and a compile-time `if` must stand alone

import triton
import triton.language as tl

from vllm_mcmoe.kernels.triton.activation import gated_activation
from vllm_mcmoe.kernels.triton.fields import (
    field_count,
    field_shift,
    piece_count,
    piece_factor,
    piece_flip,
    piece_mask,
    piece_plane,
    plane_count,
    tile_rows,
    zero_offset,
)
from vllm_mcmoe.kernels.triton.quantize import scale_of, stored_position, stored_sum, stored_value

DECODE_TOKENS = tl.constexpr(16)  # the largest tile whose fields are interleaved: all fit into registers, latency hides


@triton.constexpr_function
def and_four_bytes(mask):
    return f"and.b32 $0, $1, {mask * 0x01010101};"


@triton.constexpr_function
def and_xor_two_words(mask, flip):
    return f"lop3.b32 $0, $1, {mask * 0x00010001}, {flip * 0x00010001}, 0x6a;"  # 0x6a: (a & b) ^ c


@triton.jit
def _int8_operand(plane, MASK: tl.constexpr, INLINE_ASM: tl.constexpr):
    """uint8 [rows, 128] -> int8 [rows, 128], the field in its place."""
    if MASK == 255:
        return plane.to(tl.int8, bitcast=True)
    elif INLINE_ASM:
        return tl.inline_asm_elementwise(and_four_bytes(MASK), "=r,r", [plane], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return (plane & MASK).to(tl.int8, bitcast=True)


@triton.jit
def _float16_operand(words, MASK: tl.constexpr, FLIP: tl.constexpr, INLINE_ASM: tl.constexpr):
    """uint16 [rows, 64] -> float16 [rows, 64]: the low byte's field as a subnormal, code * 2**(shift - 24), exact."""
    if INLINE_ASM:
        return tl.inline_asm_elementwise(
            and_xor_two_words(MASK, FLIP), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return ((words & MASK) ^ FLIP).to(tl.float16, bitcast=True)


@triton.jit
def _second_bytes(words, INLINE_ASM: tl.constexpr):
    """uint16: the high byte moved to the low one; what stands above it is masked away later."""
    if INLINE_ASM:
        return tl.inline_asm_elementwise("shr.u32 $0, $1, 8;", "=r,r", [words], dtype=tl.uint16, is_pure=True, pack=2)
    else:
        return words >> 8


@triton.jit
def _half_of_planes(planes, HALF: tl.constexpr, INLINE_ASM: tl.constexpr):
    """The planes with the bytes of HALF in place: 0 as loaded, 1 the odd k of float16."""
    if HALF == 0:
        return planes
    else:
        shifted = ()
        for plane in tl.static_range(len(planes)):
            shifted = shifted + (_second_bytes(planes[plane], INLINE_ASM),)
        return shifted


@triton.jit
def _operand(
    planes, BITS: tl.constexpr, FIELD: tl.constexpr, PIECE: tl.constexpr, INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr
):
    """A piece of a field as the matrix unit takes it."""
    words = planes[piece_plane(BITS, FIELD, PIECE)]
    MASK: tl.constexpr = piece_mask(BITS, FIELD, PIECE)
    if FLOAT:
        return _float16_operand(words, MASK, piece_flip(BITS, FIELD, PIECE), INLINE_ASM)
    else:
        return _int8_operand(words, MASK, INLINE_ASM)


@triton.jit
def _piece_dot(
    planes, x, BITS: tl.constexpr, FIELD: tl.constexpr, PIECE: tl.constexpr,
    INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    first = _operand(planes, BITS, FIELD, PIECE, INLINE_ASM, FLOAT)
    if FLOAT:
        odd = _operand(_half_of_planes(planes, 1, INLINE_ASM), BITS, FIELD, PIECE, INLINE_ASM, FLOAT)
        return tl.dot(odd, x[1], tl.dot(first, x[0]))
    else:
        return tl.dot(first, x[0], out_dtype=tl.int32)


@triton.jit
def _field_dot(planes, x, BITS: tl.constexpr, FIELD: tl.constexpr, INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr):
    """sum over the group of (field's code * 2**shift) * x -> float32 [rows, tokens]; exact, below 2**24, for int8."""
    total = _piece_dot(planes, x, BITS, FIELD, 0, INLINE_ASM, FLOAT)
    if piece_count(BITS, FIELD) == 2:
        low = _piece_dot(planes, x, BITS, FIELD, 1, INLINE_ASM, FLOAT)
        total = piece_factor(BITS, FIELD, 0, FLOAT) * total + piece_factor(BITS, FIELD, 1, FLOAT) * low
    return total.to(tl.float32)


@triton.jit
def _add_fields(
    sums, planes, x, x_scale, x_sum, scales,
    BITS: tl.constexpr, INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """sums plus one group's products, with all fields open to the compiler to interleave."""
    updated = ()
    for field in tl.static_range(field_count(BITS)):
        dot = _field_dot(planes, x, BITS, field, INLINE_ASM, FLOAT)
        centred = dot + _shifted_zero(scales[field], x_sum, BITS, field, FLOAT)
        updated = updated + (sums[field] + centred * (_scale(scales[field], BITS)[:, None] * x_scale[None, :]),)
    return updated


@triton.jit
def _add_guarded_product(
    total, planes, x, x_scale, x_sum, scales, features,
    BITS: tl.constexpr, FIELD: tl.constexpr, PIECE: tl.constexpr, HALF: tl.constexpr,
    INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    if FIELD * tile_rows(BITS) < features:
        operand = _operand(planes, BITS, FIELD, PIECE, INLINE_ASM, FLOAT)
        dot = tl.dot(operand, x[HALF], out_dtype=tl.float32 if FLOAT else tl.int32)
        centred = (piece_factor(BITS, FIELD, PIECE, FLOAT) * dot).to(tl.float32)
        if PIECE + HALF == 0:
            centred += _shifted_zero(scales[FIELD], x_sum, BITS, FIELD, FLOAT)
        total += centred * (_scale(scales[FIELD], BITS)[:, None] * x_scale[None, :])
    return total


@triton.jit
def _add_fields_one_by_one(
    sums, planes, x, x_scale, x_sum, scales, features,
    BITS: tl.constexpr, INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """As _add_fields, with every matrix product in a branch of its own, taken where the field is not all padding.

    The branches are there for the compiler. Triton takes products in one block for a chain and gives all warps the same
    tokens, so that 4 of 8 warps would repeat the others' work on 32 rows; and ptxas, which interleaves what stands in
    one block, runs out of registers. A field's products are apart, as branches with one condition would be merged.
    """
    for half in tl.static_range(2 if FLOAT else 1):
        planes = _half_of_planes(planes, half, INLINE_ASM)
        for piece in tl.static_range(2):
            updated = ()
            for field in tl.static_range(field_count(BITS)):
                total = sums[field]
                if piece < piece_count(BITS, field):
                    total = _add_guarded_product(
                        total, planes, x, x_scale, x_sum, scales, features,
                        BITS, field, piece, half, INLINE_ASM, FLOAT,
                    )  # fmt: skip
                updated = updated + (total,)
            sums = updated
    return sums


@triton.jit
def _split_fields(values):
    """[rows, fields] -> tuple of `fields` vectors [rows]."""
    ROWS: tl.constexpr = values.shape[0]
    if values.shape[1] == 2:
        return tl.split(values)
    elif values.shape[1] == 4:
        even, odd = tl.split(tl.reshape(values, (ROWS, 2, 2)))  # the last dimension is the low bit of the field's index
        f0, f2 = tl.split(even)
        f1, f3 = tl.split(odd)
        return f0, f1, f2, f3
    else:
        even, odd = tl.split(tl.reshape(values, (ROWS, 2, 2, 2)))
        f04, f26 = tl.split(even)
        f15, f37 = tl.split(odd)
        f0, f4 = tl.split(f04)
        f1, f5 = tl.split(f15)
        f2, f6 = tl.split(f26)
        f3, f7 = tl.split(f37)
        return f0, f1, f2, f3, f4, f5, f6, f7


@triton.jit
def _load_scales(scales_ptr, at, BITS: tl.constexpr):
    """One group's scales: a tuple of int32 [rows], one per field, scale below zero; float16 without a zero at 1 bit."""
    if BITS == 1:
        return _split_fields(tl.load(scales_ptr.to(tl.pointer_type(tl.float16)) + at))
    else:
        return _split_fields(tl.load(scales_ptr + at))


@triton.jit
def _half(word):
    """float16 bits in an int16 -> float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale(stored, BITS: tl.constexpr):
    return stored.to(tl.float32) if BITS == 1 else _half(stored)


@triton.jit
def _shifted_zero(stored, x_sum, BITS: tl.constexpr, FIELD: tl.constexpr, FLOAT: tl.constexpr):
    """What the zero points take from a field's dot product: float32 [rows, tokens], or [1, tokens] at 1 bit."""
    factor = x_sum * -(1 << field_shift(BITS, FIELD))
    if BITS == 1:
        return (0.5 - zero_offset(1, FIELD, FLOAT)) * factor[None, :]
    else:
        return (_half(stored >> 16) - zero_offset(BITS, FIELD, FLOAT))[:, None] * factor[None, :]


@triton.jit
def _accumulate(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    x_row,
    codes_ptr,
    scales_ptr,
    K,
    first_group,
    end_group,
    features,
    BITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    INLINE_ASM: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """The main loop over groups [first_group, end_group) -> tuple of float32 [rows, tokens], one per field.

    x_row int64 [tokens]; codes_ptr and scales_ptr point at the tile's group 0; features of the tile are not padding.
    """
    FIELD_COUNT: tl.constexpr = field_count(BITS)
    ROWS: tl.constexpr = tile_rows(BITS)
    WORDS: tl.constexpr = 64 if FLOAT else 128  # of a row: 16-bit, or bytes
    if FLOAT:
        codes_ptr = codes_ptr.to(tl.pointer_type(tl.uint16))
    row, word = tl.arange(0, ROWS), tl.arange(0, WORDS)
    tile_words = row[:, None] * WORDS + word[None, :]
    tile_scales = row[:, None] * FIELD_COUNT + tl.arange(0, FIELD_COUNT)[None, :]
    x_at = x_ptr + x_row[None, :] * K + word[:, None]
    x_group = x_row * (K // 128)
    sums = ()
    for _ in tl.static_range(FIELD_COUNT):
        sums = sums + (tl.zeros((ROWS, BLOCK_TOKENS), tl.float32),)
    for group in tl.range(first_group, end_group, num_stages=STAGES):
        tile_at = codes_ptr + group * (ROWS * WORDS * plane_count(BITS)) + tile_words
        planes = ()
        for plane in tl.static_range(plane_count(BITS)):
            planes = planes + (tl.load(tile_at + plane * (ROWS * WORDS)),)
        x = (tl.load(x_at + group * 128),)
        if FLOAT:
            x = x + (tl.load(x_at + group * 128 + 64),)
        x_scale = tl.load(x_scale_ptr + x_group + group)
        x_sum = tl.load(x_sum_ptr + x_group + group)
        scales = _load_scales(scales_ptr, group * 256 + tile_scales, BITS)
        if INLINE_ASM and BLOCK_TOKENS > DECODE_TOKENS:
            sums = _add_fields_one_by_one(sums, planes, x, x_scale, x_sum, scales, features, BITS, INLINE_ASM, FLOAT)
        else:
            sums = _add_fields(sums, planes, x, x_scale, x_sum, scales, BITS, INLINE_ASM, FLOAT)
    unshifted = ()
    for field in tl.static_range(FIELD_COUNT):
        unshifted = unshifted + (sums[field] * ((2.0**24 if FLOAT else 1.0) / (1 << field_shift(BITS, field))),)
    return unshifted


@triton.jit
def _store_sums(sums, out_ptr, slot, inside, tile, N, BITS: tl.constexpr):
    """float32 [slots, N], features in tile order; features beyond N are padding."""
    ROWS: tl.constexpr = tile_rows(BITS)
    out_at = out_ptr + slot.to(tl.int64)[None, :] * N
    for field in tl.static_range(field_count(BITS)):
        feature = (tile * 256 + field * ROWS + tl.arange(0, ROWS))[:, None]
        tl.store(out_at + feature, sums[field], mask=inside[None, :] & (feature < N))


@triton.jit
def _store_activated(
    sums, out_ptr, scale_ptr, sum_ptr, slot, inside, tile, N,
    BITS: tl.constexpr, ACTIVATION: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Activation, then int8 or float16 [slots, N/2] with scale and sum [slots, N/256]: the tile is one group."""
    ROWS: tl.constexpr = tile_rows(BITS)
    PAIRS: tl.constexpr = field_count(BITS) // 2  # the tile's first 128 features are gate, the last 128 up
    activated = ()
    for field in tl.static_range(PAIRS):
        activated = activated + (gated_activation(sums[field], sums[field + PAIRS], ACTIVATION),)
    absmax = tl.max(tl.abs(activated[0]), axis=0)
    for field in tl.static_range(1, PAIRS):
        absmax = tl.maximum(absmax, tl.max(tl.abs(activated[field]), axis=0))
    scale = scale_of(absmax, FLOAT)
    slot = slot.to(tl.int64)
    value_sum = tl.zeros_like(scale)
    for field in tl.static_range(PAIRS):
        values = stored_value(activated[field], scale[None, :], FLOAT)
        value_sum += tl.sum(values, axis=0)
        feature = tile * 128 + stored_position(field * ROWS + tl.arange(0, ROWS), FLOAT)
        out_at = out_ptr + slot[None, :] * (N // 2) + feature[:, None]
        tl.store(out_at, values.to(out_ptr.dtype.element_ty), mask=inside[None, :])
    tl.store(scale_ptr + slot * (N // 256) + tile, scale, mask=inside)
    tl.store(sum_ptr + slot * (N // 256) + tile, stored_sum(value_sum, FLOAT), mask=inside)


@triton.jit
def _tile(
    x_ptr, x_scale_ptr, x_sum_ptr, codes_ptr, scales_ptr, out_ptr, out_scale_ptr, out_sum_ptr,
    slot, slots, N, K,
    SLOTS_PER_ROW: tl.constexpr, BITS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr, ACTIVATION: tl.constexpr, INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """One program's work for an expert of one width; codes_ptr and scales_ptr point at the expert."""
    tile, part = tl.program_id(0), tl.program_id(2)
    groups = K // 128
    inside = slot < slots
    x_row = (tl.where(inside, slot, 0) // SLOTS_PER_ROW).to(tl.int64)  # padding reads row 0 and is never stored
    codes_ptr += tile.to(tl.int64) * groups * (32 * 1024 * BITS // 8)
    # a tile has 256 scales per group: int32 words with their zeros, or halves of words at 1 bit
    scales_ptr += tile.to(tl.int64) * groups * (128 if BITS == 1 else 256)
    share = tl.cdiv(groups, SPLIT_K)
    sums = _accumulate(
        x_ptr, x_scale_ptr, x_sum_ptr, x_row, codes_ptr, scales_ptr, K,
        part * share, tl.minimum(part * share + share, groups), N - tile * 256,
        BITS, BLOCK_TOKENS, STAGES, INLINE_ASM, FLOAT,
    )  # fmt: skip
    if ACTIVATION is None:
        _store_sums(sums, out_ptr + part.to(tl.int64) * slots * N, slot, inside, tile, N, BITS)
    else:
        _store_activated(sums, out_ptr, out_scale_ptr, out_sum_ptr, slot, inside, tile, N, BITS, ACTIVATION, FLOAT)


@triton.jit(do_not_specialize=["slots"])  # a prompt of another length must not compile a kernel
def grouped_gemm_kernel(
    x_ptr, x_scale_ptr, x_sum_ptr,
    codes_ptr, scales_ptr, offsets_ptr, bits_ptr,
    sorted_slots_ptr, block_expert_ptr,
    out_ptr, out_scale_ptr, out_sum_ptr,
    slots, N, K,
    SLOTS_PER_ROW: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr, ACTIVATION: tl.constexpr, INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of 256 features, blocks of slots, SPLIT_K).

    x               int8    [rows, K]              float16 where FLOAT; with x_scale, x_sum float32 [rows, K/128]
    codes, scales, offsets, bits                   an ExpertStack
    sorted_slots    int32   [blocks*BLOCK_TOKENS]  slots by expert; `slots` where a block is not full
    block_expert    int32   [blocks]               expert of each block, -1 for unused blocks
    ACTIVATION None:  out float32 [SPLIT_K, slots, N], partial sums, features in the stack's row order
    else:             out as x, [slots, N/2], out_scale and out_sum float32 [slots, N/256]; SPLIT_K is 1
    WIDTHS          bit b set: some expert of the layer has b bits; the others' code is not even compiled
    """
    expert = tl.load(block_expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(sorted_slots_ptr + tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))
    bits = tl.load(bits_ptr + expert)
    codes_ptr += tl.multiple_of(tl.load(offsets_ptr + 2 * expert), 4096)
    scales_ptr += tl.multiple_of(tl.load(offsets_ptr + 2 * expert + 1), 128)
    for exponent in tl.static_range(0, 9):
        if (WIDTHS >> exponent) & 1:
            if bits == exponent:
                _tile(
                    x_ptr, x_scale_ptr, x_sum_ptr, codes_ptr, scales_ptr, out_ptr, out_scale_ptr, out_sum_ptr,
                    slot, slots, N, K,
                    SLOTS_PER_ROW, exponent, BLOCK_TOKENS, SPLIT_K,
                    2 if exponent == 8 else STAGES,  # 32 KiB a stage: three exceed the 99 KiB of sm86, sm89, sm120
                    ACTIVATION, INLINE_ASM, FLOAT,
                )  # fmt: skip
