"""Activations as matrix operands, per token and group of 128: stored values times a float32 scale.

| format  | stored              | scale                                             |
|---------|---------------------|---------------------------------------------------|
| int8    | integers up to 127  | max |x| / 127                                     |
| float16 | float16 up to 2**11 | a power of two, so that only float16 itself rounds |

int8 rounds half to even. float16 is exact for float16 and bfloat16 inputs whose group spans less than 2**24, and puts
a group's even elements before its odd ones, as the kernel finds them in the 16-bit words of the codes.

The sum of the stored values multiplies the weights' zero points in the GEMM; of float16 it carries the 2**-24 that the
codes have as float16 (see gemm.py).
"""

import triton
import triton.language as tl

GROUPS_PER_PROGRAM = 8  # 1024 elements: 8 per thread of a 4-warp program, one 16-byte bf16 load each


@triton.jit
def scale_of(absmax, FLOAT: tl.constexpr):
    """A group's scale from its largest magnitude, float32."""
    if FLOAT:
        exponent = absmax.to(tl.int32, bitcast=True) >> 23
        # 2**10 <= absmax / scale < 2**11; the smallest normal number where that would be subnormal
        return (tl.maximum(exponent - 10, 1) << 23).to(tl.float32, bitcast=True)
    else:
        return tl.div_rn(absmax, 127.0)


@triton.jit
def stored_value(x, scale, FLOAT: tl.constexpr):
    """x / scale as it will be stored, still float32; 0 where an int8 scale is 0.

    Adding 1.5 * 2**23 leaves no fraction bits in float32, so the addition itself rounds, half to even.
    """
    if FLOAT:
        return tl.div_rn(x, scale).to(tl.float16).to(tl.float32)
    else:
        return (tl.div_rn(x, tl.where(scale > 0, scale, 1.0)) + 12582912.0) - 12582912.0


@triton.jit
def stored_sum(sum_of_values, FLOAT: tl.constexpr):
    return sum_of_values * 2.0**-24 if FLOAT else sum_of_values


@triton.jit
def stored_position(element, FLOAT: tl.constexpr, RINGS: tl.constexpr):
    """Where in its group an element of [0, 128) is stored. RINGS: in the order of rings.py; where FLOAT, the even of
    these before the odd."""
    if RINGS:
        in_ring = (element & 12) * 8 + (element & 2) * 8 + (element & 1) * 2 + ((element >> 4) & 1)
        element = in_ring + element // 32 * 4
    return (element & 1) * 64 + element // 2 if FLOAT else element


@triton.jit
def quantize_rows(
    token, group, x_ptr, out_ptr, scale_ptr, sum_ptr, K, FLOAT: tl.constexpr, RINGS: tl.constexpr
):  # fmt: skip
    """Some groups of one row of x [tokens, K], any float type -> out int8 or float16 [tokens, K], scale and sum float32
    [tokens, K/128]. token int64, group int32 [groups]; those beyond the row are left out. RINGS: see `stored_position`.
    """
    element = tl.arange(0, 128)
    groups = K // 128
    inside = group < groups
    x_at = x_ptr + token * K + group[:, None] * 128 + element[None, :]
    x = tl.load(x_at, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), axis=1), FLOAT)
    values = stored_value(x, scale[:, None], FLOAT)
    out_at = out_ptr + token * K + group[:, None] * 128 + stored_position(element, FLOAT, RINGS)[None, :]
    tl.store(out_at, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(scale_ptr + token * groups + group, scale, mask=inside)
    tl.store(sum_ptr + token * groups + group, stored_sum(tl.sum(values, axis=1), FLOAT), mask=inside)
