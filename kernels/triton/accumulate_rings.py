"""The main loop of the grouped GEMM for trellis codes, as accumulate.py has it for scalar ones.

A matrix operand has 32 inputs, a ring's quad 16 in the four threads that hold a row: the other half is the quad of
another field, which meets zeros in the activations.

The int32 sums begin at a number which, as float32, is 1.5 * 2**23: as float32 they are then that number plus their
value, exactly, so that a subtraction is their conversion. What zeros take is part of the number where it is whole.
"""

# ruff: noqa: RUF005 - Triton has no starred expressions

import triton
import triton.language as tl

from vllm_mcmoe.kernels.triton.accumulate import load_scales
from vllm_mcmoe.kernels.triton.fields import code_width
from vllm_mcmoe.kernels.triton.ring_decoder import (
    decoder_constraints,
    eight_operands,
    factor,
    mirror_mask,
    operand_zero,
    ring_decoder,
)

MAGIC = tl.constexpr(0x4B400000)
MAGIC_VALUE = tl.constexpr(12582912.0)


@triton.jit
def _rotated(words, AMOUNT: tl.constexpr):
    """uint32 words, rotated to the right by 1 to 31 bits."""
    return (words >> AMOUNT) | (words << (32 - AMOUNT))


@triton.jit
def _decoded_quad(words, QUAD: tl.constexpr, BITS: tl.constexpr):
    """The definition, of half of the table. words: of every operand's ring, rotated by 4 j: uint32 [32, 32]."""
    POSITION: tl.constexpr = QUAD // 2 + QUAD % 2 * 16
    if BITS == 1:
        entry = _rotated(words[0], POSITION) & 15 if POSITION else words[0] & 15
    else:
        entry = _rotated(words[0], POSITION + 1) & 15
        own = entry & 1
        for stream in tl.static_range(1, BITS):
            uncoded = words[stream] >> POSITION if stream == 1 else _rotated(words[stream], POSITION + 3)
            entry |= ((uncoded & 1) ^ own) << (4 + BITS - 1 - stream)
    mirrored = 0 - (entry >> (2 + BITS))  # all bits, where the entry is in the upper half
    entry ^= mirrored
    eight = tl.full(entry.shape, eight_operands(BITS, 0), tl.int64)
    for first in tl.static_range(1, 1 << (BITS - 1)):
        eight = tl.where((entry >> 3) % (1 << (BITS - 1)) == first, eight_operands(BITS, first), eight)
    byte = (eight >> ((entry & 7) * 8).to(tl.int64)).to(tl.uint32) ^ (mirrored & mirror_mask(BITS))
    return (byte & 255).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit
def _load_quads(pair_ptr, BITS: tl.constexpr, INLINE_ASM: tl.constexpr):
    """Two fields' rings of one group -> eight operands, int8 [32, 32]: 16 weights of either field."""
    row, k = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    words = ()
    if INLINE_ASM:
        for stream in tl.static_range(BITS):
            words = words + (tl.load(pair_ptr + stream * 1024 + row * 32 + k),)
        return tl.inline_asm_elementwise(
            ring_decoder(BITS), decoder_constraints(BITS), words, dtype=(tl.int8,) * 8, is_pure=True, pack=4
        )
    else:
        words_ptr = pair_ptr.to(tl.pointer_type(tl.uint32))
        by = (k % 4 * 4).to(tl.uint32)
        for stream in tl.static_range(BITS):
            word = tl.load(words_ptr + stream * 256 + row * 8 + k // 4)
            words = words + ((word >> by) | (word << ((32 - by) % 32)),)
        quads = ()
        for quad in tl.static_range(8):
            quads = quads + (_decoded_quad(words, quad, BITS),)
        return quads


@triton.jit
def _load_inputs(x_ptr, x_row, K, HALF: tl.constexpr, FLOAT: tl.constexpr):
    """One group's activations as eight operands [32, tokens], 16 inputs each: for the weights of the first field of a
    pair, or the second; zeros for the other's."""
    k = tl.arange(0, 32)
    mask = (k // 16 == HALF)[:, None]
    inputs = ()
    for quad in tl.static_range(8):
        at = quad * 8 + k % 16 // 2 + k % 2 * 64 if FLOAT else quad * 16 + k % 16  # float16: even ones, then odd ones
        inputs = inputs + (tl.load(x_ptr + x_row[None, :] * K + at[:, None], mask=mask, other=0),)
    return inputs


@triton.jit
def _first_sums(x_sum, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """What the sums of a group begin with, [32, tokens]."""
    if FLOAT:
        return tl.zeros((32, x_sum.shape[0]), tl.float32)
    elif BITS <= 2:
        start = MAGIC - x_sum.to(tl.int32) * operand_zero(BITS)
        return tl.broadcast_to(start[None, :], (32, x_sum.shape[0]))
    else:
        return tl.full((32, x_sum.shape[0]), MAGIC, tl.int32)


@triton.jit
def _centred(sums, x_sum, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """A group's sums without what zeros take, float32."""
    if FLOAT:
        return sums - (x_sum * (2.0**24 * operand_zero(BITS)))[None, :]
    elif BITS <= 2:
        return sums.to(tl.float32, bitcast=True) - MAGIC_VALUE
    else:
        return (sums.to(tl.float32, bitcast=True) - MAGIC_VALUE) - (x_sum * operand_zero(BITS))[None, :]


@triton.jit
def accumulate_rings(
    x_ptr, x_scale_ptr, x_sum_ptr, x_row, codes_ptr, scales_ptr, K, first_group, end_group,
    NUMBER: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STAGES: tl.constexpr,
    INLINE_ASM: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """The main loop over groups [first_group, end_group) -> tuple of float32 [32, tokens], one per field.

    Arguments are those of accumulate.accumulate.
    """
    BITS: tl.constexpr = code_width(NUMBER)
    x_group = x_row * (K // 128)
    at_scales = tl.arange(0, 32)[:, None] * 8 + tl.arange(0, 8)[None, :]
    sums = ()
    for _ in tl.static_range(8):
        sums = sums + (tl.zeros((32, BLOCK_TOKENS), tl.float32),)
    for group in tl.range(first_group, end_group, num_stages=STAGES):
        first = _load_inputs(x_ptr + group * 128, x_row, K, 0, FLOAT)
        second = _load_inputs(x_ptr + group * 128, x_row, K, 1, FLOAT)
        x_scale = tl.load(x_scale_ptr + x_group + group)
        x_sum = tl.load(x_sum_ptr + x_group + group)
        scales = load_scales(scales_ptr, group * 256 + at_scales, False)
        begin = _first_sums(x_sum, BITS, FLOAT)
        updated = ()
        for pair in tl.static_range(4):
            quads = _load_quads(codes_ptr + group * (BITS * 4096) + pair * (BITS * 1024), BITS, INLINE_ASM)
            dots = (begin, begin)
            for quad in tl.static_range(8):
                operand = quads[quad].to(tl.float16) if FLOAT else quads[quad]
                dots = (
                    tl.dot(operand, first[quad], acc=dots[0], out_dtype=begin.dtype),
                    tl.dot(operand, second[quad], acc=dots[1], out_dtype=begin.dtype),
                )
            for half in tl.static_range(2):
                scale = scales[2 * pair + half].to(tl.float32)
                scaled = _centred(dots[half], x_sum, BITS, FLOAT) * (scale[:, None] * x_scale[None, :])
                updated = updated + (sums[2 * pair + half] + scaled,)
        sums = updated
    levels = ()
    for field in tl.static_range(8):
        levels = levels + (sums[field] * (1.0 / factor(BITS)),)
    return levels
