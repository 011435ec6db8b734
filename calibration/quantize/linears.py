"""Attention, dense and shared-expert linears at 4 or 8 bits in compressed-tensors' pack-quantized form.

vLLM serves that form with its own kernels (Marlin on a GPU, W4A16 on a CPU) or, on CPUs where it has none, with ours
(kernels/cpu/linear.py). Weights are symmetric integers in groups
of 128, or of 64 or 32 in a model whose linears have inputs that 128 does not divide, chosen by GPTQ; the bytes are
packed and unpacked by the compressed-tensors library itself.
"""

from collections.abc import Iterable
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)

from vllm_mcmoe.calibration.matrix.gptq import HessianFactor
from vllm_mcmoe.errors import FormatError, UnsupportedModelError
from vllm_mcmoe.kernels.packing import GROUP_SIZE

LINEAR_BITS = (4, 8, 16)
GROUP_SIZES = (GROUP_SIZE, 64, 32)  # that vLLM's kernels for GPUs and CPUs and ours for CPUs all have
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
SUFFIXES = (PACKED, SCALE, SHAPE)

# Share of the group's range a symmetric grid may span; 11 steps lie within 0.2% of a search over 80.
_RANGE_SHARES = tuple(1 - 0.04 * i for i in range(11))


def check_linear_bits(bits: int) -> None:
    if bits not in LINEAR_BITS:
        raise UnsupportedModelError(
            f"linear bits {bits}: expected one of {', '.join(map(str, LINEAR_BITS))} (16 leaves linears as they are)."
        )


def choose_group_size(in_features: Iterable[int]) -> int:
    """The group size of a model's linears, one for all: the largest that divides the inputs of each. Linears whose
    inputs are not even divisible by 32 do not count: they stay in 16 bits."""
    divisible = [inputs for inputs in in_features if inputs % GROUP_SIZES[-1] == 0]
    return next(size for size in GROUP_SIZES if all(inputs % size == 0 for inputs in divisible))


def _scheme(bits: int, group_size: int) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.GROUP,
        group_size=group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def linear_config(bits: int, group_size: int, ignore: list[str]) -> dict[str, Any]:
    """The `linear` entry of quantization_config, as vLLM's CompressedTensorsConfig.from_config reads it.

    ignore: names or "re:" patterns of linear layers that keep 16 bits.
    """
    config = QuantizationConfig(
        config_groups={"group_0": _scheme(bits, group_size)},
        format=CompressionFormat.pack_quantized.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    return config.model_dump(mode="json", exclude_none=True)


def linear_bits(config: dict[str, Any]) -> int:
    """Width of a `linear` config. Raises FormatError for one that linear_config did not write."""
    try:
        (group,) = QuantizationConfig.model_validate(config).config_groups.values()
        bits = group.weights.num_bits
    except (ValueError, AttributeError, TypeError) as error:
        raise FormatError(f"quantization_config: linear is not a compressed-tensors config: {error}") from None
    return bits


def quantize_linear(
    weight: torch.Tensor, factor: HessianFactor, bits: int, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GPTQ to symmetric integers in groups.

    weight       float [out, in], in divisible by group_size
    factor       HessianFactor of the layer's inputs, columns in the file's order
    scale_dtype  what scales are stored as: the model's dtype, since vLLM loads them so

    Returns the weight as it will be served, float32 [out, in], and the tensors to write, suffix -> tensor, which are in
    host memory.
    """
    # Columns as rows of a transposed copy: every step reads and writes contiguous memory.
    remaining = weight.float().t().contiguous()
    quantized = torch.empty_like(remaining)
    importance = factor.hessian.diagonal()
    inverse = factor.inverse_factor
    largest = 1 << (bits - 1)
    scales = []
    for start in range(0, len(remaining), group_size):
        stop = start + group_size
        block = remaining[start:stop]
        scale = _symmetric_scale(block.t(), importance[start:stop], largest, scale_dtype)
        errors = torch.empty_like(block)
        for i, column in enumerate(block):
            code = column.div(scale).round_().clamp_(-largest, largest - 1)
            quantized[start + i] = code.mul_(scale)
            errors[i] = (column - quantized[start + i]) / inverse[start + i, start + i]
            block[i + 1 :].addr_(inverse[start + i, start + i + 1 : stop], errors[i], alpha=-1)
        remaining[stop:].addmm_(inverse[start:stop, stop:].t(), errors, alpha=-1)
        scales.append(scale)
    quantized = quantized.t().contiguous()
    stored = {"weight": quantized.cpu(), SCALE: torch.stack(scales, dim=1).cpu()}
    packed = PackedQuantizationCompressor.compress(stored, _scheme(bits, group_size))
    packed[SCALE] = packed[SCALE].to(scale_dtype)
    return quantized, packed


def _symmetric_scale(group: torch.Tensor, importance: torch.Tensor, largest: int, dtype: torch.dtype) -> torch.Tensor:
    """Scale per row of the least weighted squared error. group: float32 [out, group_size] -> float32 [out],
    storable in dtype; positive also for rows of zeros."""
    full = group.abs().amax(-1) / (largest - 0.5)
    full = torch.where(full > 0, full, torch.ones_like(full))
    best = best_error = None
    for share in _RANGE_SHARES:
        scale = (full * share).to(dtype).float().clamp_min(torch.finfo(dtype).tiny)
        codes = (group / scale[:, None]).round_().clamp_(-largest, largest - 1)
        error = ((codes * scale[:, None] - group).square_() * importance).sum(-1)
        if best is None:
            best, best_error = scale, error
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def dequantize_linear(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """The exact weight of written tensors (suffix -> tensor), float32 [out, in]."""
    scales = tensors[SCALE].float()
    group_size = int(tensors[SHAPE][1]) // scales.shape[1]
    return PackedQuantizationCompressor.decompress({**tensors, SCALE: scales}, _scheme(bits, group_size))["weight"]
