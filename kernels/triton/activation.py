"""Gated activations as device functions, float32 in and out.

gate, up [.., ..] float32 -> activation(gate) * up, the formulas of vLLM's MoE layers.
"""

import triton
import triton.language as tl

# names as in vLLM's MoEActivation; `swigluoai` with gate and up in halves, as this format stores them
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "swiglustep")


@triton.jit
def gated_activation(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner) * up  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    elif ACTIVATION == "swigluoai":
        clamped = tl.minimum(gate, 7.0)
        return clamped * tl.sigmoid(1.702 * clamped) * (tl.clamp(up, -7.0, 7.0) + 1.0)
    else:
        tl.static_assert(ACTIVATION == "swiglustep")
        return tl.minimum(gate * tl.sigmoid(gate), 7.0) * tl.clamp(up, -7.0, 7.0)
