"""A linear of symmetric integers on int8 activations, in plain torch.

    y[t, n] = bias[n] + sum_g a_scale[t, g] * w_scale[n, g] * sum_k (code[n, k] - zero) * a_code[t, k]

The weight has compressed-tensors' pack-quantized form: code = value + 2^(bits-1), zero = 2^(bits-1), code k of a row at
bit bits*k of the row's bytes. Activations have the weight's groups. As in experts, the sums over the k of a group are
exact integers, and only scaling rounds.
"""

import torch

from vllm_mcmoe.kernels.reference import quantize_activations


def unpack_symmetric(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of a pack-quantized weight: int32 [out, in * bits / 32] -> uint8 [out, in]. bits: 4 or 8."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2).to(torch.uint8)


def symmetric_linear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bits: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x: float [..., in]; packed: int32 [out, in * bits / 32]; scales: float [out, groups]; bias: float [out] or None.

    Returns [..., out] in x.dtype; the bias is added in float32.
    """
    codes = unpack_symmetric(packed, bits)
    rows, groups = scales.shape
    group_size = codes.shape[1] // groups
    a_codes, a_scales = quantize_activations(x.reshape(-1, x.shape[-1]), group_size)
    grouped = (-1, groups, group_size)
    a, w = a_codes.reshape(grouped).double(), codes.reshape(grouped).double()  # exact, see linear_int8
    products = torch.einsum("tgk,ngk->tng", a, w).float()  # [T, N, G]
    centred = products - float(1 << (bits - 1)) * a.sum(dim=-1).float().unsqueeze(1)
    y = torch.einsum("tng,ng,tg->tn", centred, scales.float(), a_scales)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], rows)
