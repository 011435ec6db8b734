"""What experts compute between their projections, as device functions, float32 in and out.

The formulas are expert_function.py's. NaN passes through every limit.
"""

import triton
import triton.language as tl


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    if ACTIVATION == "silu":
        if ALPHA == 1.0:
            return x * tl.sigmoid(x)
        else:
            return x * tl.sigmoid(ALPHA * x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive


@triton.jit
def gated(
    gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr
):  # fmt: skip
    """LIMIT is None for none."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if BETA != 0.0:
        up += BETA
    return activated(gate, ACTIVATION, ALPHA) * up
