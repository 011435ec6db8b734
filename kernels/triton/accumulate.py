"""The main loop of the grouped GEMM: one tile's weights times the rows of a block, over groups of inputs.

Codes enter as `byte & mask` = code * 2**shift (see layout.py). The int32 sums are exact, the shift is taken out by an
exact power of two, and float32 rounds for the first time when the zero point is subtracted.
"""

# ruff: noqa: RUF005 - Triton has no starred expressions, and a compile-time `if` must stand alone

import triton
import triton.language as tl

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
    BITS: tl.constexpr, ZEROS: tl.constexpr, INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """sums plus one group's products, with all fields open to the compiler to interleave."""
    updated = ()
    for field in tl.static_range(field_count(BITS)):
        dot = _field_dot(planes, x, BITS, field, INLINE_ASM, FLOAT)
        centred = dot + _shifted_zero(scales[field], x_sum, BITS, field, ZEROS, FLOAT)
        updated = updated + (sums[field] + centred * (_scale(scales[field], ZEROS)[:, None] * x_scale[None, :]),)
    return updated


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
def load_scales(scales_ptr, at, ZEROS: tl.constexpr):
    """One group's scales: a tuple of int32 [rows], one per field, scale below zero; float16 without stored zeros."""
    if ZEROS:
        return _split_fields(tl.load(scales_ptr + at))
    else:
        return _split_fields(tl.load(scales_ptr.to(tl.pointer_type(tl.float16)) + at))


@triton.jit
def _half(word):
    """float16 bits in an int16 -> float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale(stored, ZEROS: tl.constexpr):
    return _half(stored) if ZEROS else stored.to(tl.float32)


@triton.jit
def _shifted_zero(stored, x_sum, BITS: tl.constexpr, FIELD: tl.constexpr, ZEROS: tl.constexpr, FLOAT: tl.constexpr):
    """What the zero points take from a field's dot product: float32 [rows, tokens], or [1, tokens] where all are the
    middle of the codes."""
    factor = x_sum * -(1 << field_shift(BITS, FIELD))
    if ZEROS:
        return (_half(stored >> 16) - zero_offset(BITS, FIELD, FLOAT))[:, None] * factor[None, :]
    else:
        return (((1 << BITS) - 1) / 2 - zero_offset(BITS, FIELD, FLOAT)) * factor[None, :]


@triton.jit
def accumulate(
    x_ptr,
    x_scale_ptr,
    x_sum_ptr,
    x_row,
    codes_ptr,
    scales_ptr,
    K,
    first_group,
    end_group,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    INLINE_ASM: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """The main loop over groups [first_group, end_group) -> tuple of float32 [rows, tokens], one per field.

    x_row int64 [tokens]; codes_ptr and scales_ptr point at the tile's group 0; ZEROS: whether zeros are stored.
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
        scales = load_scales(scales_ptr, group * 256 + tile_scales, ZEROS)
        sums = _add_fields(sums, planes, x, x_scale, x_sum, scales, BITS, ZEROS, INLINE_ASM, FLOAT)
    unshifted = ()
    for field in tl.static_range(FIELD_COUNT):
        unshifted = unshifted + (sums[field] * ((2.0**24 if FLOAT else 1.0) / (1 << field_shift(BITS, field))),)
    return unshifted
