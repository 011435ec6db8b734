"""Random linears of symmetric integers, in compressed-tensors' pack-quantized form."""

import torch


def random_linear(
    bits: int, group_size: int, rows: int, inputs: int, *, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform codes, int32 [rows, inputs * bits / 32], and scales of 0.01 to 0.02, [rows, groups]."""
    generator = torch.Generator().manual_seed(seed)
    words = (rows, inputs * bits // 32)
    packed = torch.randint(-(2**31), 2**31, words, generator=generator).to(torch.int32)
    scales = (torch.rand(rows, inputs // group_size, generator=generator) + 1) / 100
    return packed, scales.to(scale_dtype)


def random_inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
