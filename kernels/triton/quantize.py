"""Activations to int8, per token and group of 128.

    scale = max |x| / 127,   code = round_half_to_even(x / scale),   code_sum = sum of the group's codes

`code_sum` multiplies the weight's zero point in the GEMM. It is an integer below 2**14, kept as float32.
"""

import triton
import triton.language as tl

from vllm_mcmoe.kernels.triton.activation import gated_activation
from vllm_mcmoe.kernels.triton.routing import local_expert

GROUPS_PER_PROGRAM = 8  # 1024 elements: 8 per thread of a 4-warp program, one 16-byte bf16 load each


@triton.jit
def scale_of(absmax):
    """A group's scale from its largest magnitude, float32."""
    return tl.div_rn(absmax, 127.0)


@triton.jit
def to_code(x, scale):
    """x / scale rounded to an integer in [-127, 127], still float32; 0 where the scale is 0.

    Adding 1.5 * 2**23 leaves no fraction bits in float32, so the addition itself rounds, half to even.
    """
    return (tl.div_rn(x, tl.where(scale > 0, scale, 1.0)) + 12582912.0) - 12582912.0


@triton.jit
def quantize_kernel(x_ptr, codes_ptr, scale_ptr, sum_ptr, K, stride_x, GROUPS: tl.constexpr):
    """x [tokens, K] of any float type -> codes int8 [tokens, K], scale and sum float32 [tokens, K/128].

    Grid: (tokens, ceil(K / (128 * GROUPS))).
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    groups = K // 128
    element = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = group < groups
    x = tl.load(x_ptr + token * stride_x + element, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), axis=1))
    codes = to_code(x, scale[:, None])
    tl.store(codes_ptr + token * K + element, codes.to(tl.int8), mask=inside[:, None])
    tl.store(scale_ptr + token * groups + group, scale, mask=inside)
    tl.store(sum_ptr + token * groups + group, tl.sum(codes, axis=1), mask=inside)


@triton.jit
def activate_kernel(
    partial_ptr, ids_ptr, map_ptr, codes_ptr, scale_ptr, sum_ptr, slots, N,
    SPLIT_K: tl.constexpr, ACTIVATION: tl.constexpr, EXPERTS: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """What the fused epilogue does, after split-K: add the parts, activate, quantise.

    Grid: (slots, N/256). partial float32 [SPLIT_K, slots, N], in tiles of 128 gate and 128 up features
    -> codes int8 [slots, N/2], scale and sum float32 [slots, N/256]. Slots without an expert are left alone.
    """
    slot, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if local_expert(tl.load(ids_ptr + slot), map_ptr, slot < slots, EXPERTS, MAPPED) >= 0:
        feature = tl.arange(0, 128)
        gate = tl.zeros((128,), tl.float32)
        up = tl.zeros((128,), tl.float32)
        for part in range(SPLIT_K):
            at = partial_ptr + (part * slots + slot) * N + group * 256 + feature
            gate += tl.load(at)
            up += tl.load(at + 128)
        activated = gated_activation(gate, up, ACTIVATION)
        scale = scale_of(tl.max(tl.abs(activated)))
        codes = to_code(activated, scale)
        tl.store(codes_ptr + slot * (N // 2) + group * 128 + feature, codes.to(tl.int8))
        tl.store(scale_ptr + slot * (N // 256) + group, scale)
        tl.store(sum_ptr + slot * (N // 256) + group, tl.sum(codes))
