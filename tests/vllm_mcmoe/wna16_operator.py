"""vLLM's operator for linears of 4 bits in plain torch, for CPUs whose build of vLLM lacks it.

What the plugin delegates to vLLM's kernel class, and what that class does before it calls the operator, then runs on
any machine; a machine that has the operator runs the real one.
"""

import torch

_KEPT = []  # a library's operators go with it


def provide_where_missing() -> None:
    """Define torch.ops._C.cpu_gemm_wna16, unless vLLM's build for this CPU has it."""
    from vllm import _custom_ops  # noqa: F401 -- loads the operators

    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
        "SymInt pack_factor, str isa_hint) -> ()"
    )
    library.impl("cpu_gemm_wna16", _cpu_gemm_wna16, "CPU")
    _KEPT.append(library)


def _cpu_gemm_wna16(x, q_weight, output, scales, zeros, bias, pack_factor, isa_hint) -> None:
    """x [tokens, in]; q_weight int32 [out/16, in * 2], 8 codes a word: blocks of 16 outputs; scales [groups, out]."""
    assert zeros is None and pack_factor == 8
    inputs, outputs = x.shape[1], scales.shape[1]
    words = q_weight.view(outputs // 16, inputs, 2).permute(1, 0, 2).reshape(inputs, outputs // 8)
    codes = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    groups = (codes.reshape(scales.shape[0], -1, outputs) - 8) * scales.float().unsqueeze(1)
    result = x.float() @ groups.reshape(inputs, outputs)
    output.copy_(result if bias is None else result + bias)
