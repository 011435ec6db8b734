"""Attention, dense and shared-expert linears at 4 or 8 bits in compressed-tensors' pack-quantized form.

vLLM serves that form with its own kernels (Marlin on a GPU, W4A16 on a CPU) or, on CPUs where it has none, with ours
(kernels/cpu/linear.py). Weights are symmetric integers, chosen by GPTQ, in groups of 128, or of 64 or 32 in a model
whose linears have inputs that 128 does not divide, as a whole or among tensor parallel ranks; the bytes are packed and
unpacked by the compressed-tensors library itself.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
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
PACKED_BITS = LINEAR_BITS[:-1]
GROUP_SIZES = (GROUP_SIZE, 64, 32)  # that vLLM's kernels for GPUs and CPUs and ours for CPUs all have
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
SUFFIXES = (PACKED, SCALE, SHAPE)
ALL_LINEARS = "Linear"  # compressed-tensors' target that every linear matches which no other names

SCALE_BITS = 16
SHAPE_BYTES = 16  # two int64
# names' ends: tensor parallel ranks share their inputs, of others the outputs
ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", ".w2")
TENSOR_PARALLEL = (2, 4, 8)
THINNEST_SLICE = 128  # inputs of a rank; thinner ones are of models that nobody shares out

ROWS_AT_ONCE = 32768

# Share of the group's range a symmetric grid may span; 11 steps lie within 0.2% of a search over 80.
_RANGE_SHARES = tuple(1 - 0.04 * i for i in range(11))


def check_linear_bits(bits: int) -> None:
    if bits not in LINEAR_BITS:
        raise UnsupportedModelError(
            f"linear bits {bits}: expected one of {', '.join(map(str, LINEAR_BITS))} (16 leaves linears as they are)."
        )


@dataclass(frozen=True)
class LinearShape:
    """One linear: its name relative to the decoder layer, [out_features, in_features] of its weight, and among how many
    tensor parallel ranks its model can be shared."""

    name: str
    out_features: int
    in_features: int
    ranks: tuple[int, ...] = TENSOR_PARALLEL

    def holds(self, group_size: int, tensor_parallel: int) -> bool:
        """Whether so many ranks get whole groups. Those of row parallel linears share its inputs."""
        if not self.name.endswith(ROW_PARALLEL):
            return self.in_features % group_size == 0
        return self.in_features % (group_size * tensor_parallel) == 0

    def can_be_packed(self, group_size: int) -> bool:
        """Whether one rank, and every number of them that would be used, gets whole groups: others vLLM refuses."""
        sizes = [ranks for ranks in self.ranks if self.in_features >= ranks * THINNEST_SLICE]
        return all(self.holds(group_size, ranks) for ranks in (1, *sizes))


def count_by_width(linears: Mapping[str, int]) -> str:
    """For people. linears: name -> width."""
    return ", ".join(f"{count} at {bits} bits" for bits, count in sorted(Counter(linears.values()).items()))


def tensor_parallel_sizes(attention_heads: int) -> tuple[int, ...]:
    """Those of a node that vLLM allows: ranks get whole heads."""
    return tuple(ranks for ranks in TENSOR_PARALLEL if attention_heads % ranks == 0)


def choose_group_size(linears: Collection[LinearShape], bits: int) -> int:
    """The group size of a model's linears, one for all: what makes the fewest bytes, where those that cannot be packed
    with it stay in 16 bits."""

    def nbytes(group_size: int) -> float:
        packed = bits + SCALE_BITS / group_size
        return sum(
            linear.out_features * linear.in_features * (packed if linear.can_be_packed(group_size) else 16)
            for linear in linears
        )

    return min(GROUP_SIZES, key=nbytes)  # the largest of equal ones


def linear_bytes(out_features: int, in_features: int, bits: int, group_size: int, element_bytes: int) -> int:
    """Of one linear in the checkpoint, its bias left out. element_bytes: of the dtype of the model, and of scales."""
    weights = out_features * in_features
    if bits not in PACKED_BITS:
        return weights * element_bytes
    return weights * bits // 8 + weights // group_size * element_bytes + SHAPE_BYTES


def _scheme(bits: int, group_size: int, targets: Collection[str] = (ALL_LINEARS,)) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.GROUP,
        group_size=group_size,
    )
    return QuantizationScheme(targets=list(targets), weights=weights)


def linear_config(bits: int, group_size: int, ignore: list[str]) -> dict[str, Any]:
    """The `linear` entry of quantization_config, as vLLM's CompressedTensorsConfig.from_config reads it, where all have
    one width.

    ignore: names or "re:" patterns of linear layers that keep 16 bits.
    """
    return _config([_scheme(bits, group_size)], ignore)


def mixed_linear_config(
    widths: Mapping[str, int], group_size: int, ignore: Collection[str], head: str
) -> dict[str, Any]:
    """The same where every packed linear has a width of its own: a group of the config per width, which names its
    linears.

    widths: on-disk name -> width, of the packed ones alone. head: on-disk name of the output head, which vLLM calls
    otherwise in a wrapper, so that its target is a pattern.
    """
    targets: dict[int, list[str]] = {}
    for name, bits in widths.items():
        target = rf"re:(.*\.)?{re.escape(name.rpartition('.')[2])}$" if name == head else name
        targets.setdefault(bits, []).append(target)
    schemes = [_scheme(bits, group_size, targets[bits]) for bits in sorted(targets)]
    left_out = {head, head.rpartition(".")[2]} if head in widths else set()
    return _config(schemes, [name for name in ignore if name not in left_out])


def _config(schemes: list[QuantizationScheme], ignore: list[str]) -> dict[str, Any]:
    config = QuantizationConfig(
        config_groups={f"group_{number}": scheme for number, scheme in enumerate(schemes)},
        format=CompressionFormat.pack_quantized.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    return config.model_dump(mode="json", exclude_none=True)


def linear_widths(config: dict[str, Any]) -> Callable[[str], int]:
    """On-disk name of a packed linear -> its width, of a `linear` config; a name that no group has is a FormatError.

    Raises FormatError for one that neither linear_config nor mixed_linear_config wrote.
    """
    try:
        groups = QuantizationConfig.model_validate(config).config_groups.values()
        by_target = {target: group.weights.num_bits for group in groups for target in group.targets}
        patterns = {re.compile(t.removeprefix("re:")): by_target[t] for t in by_target if t.startswith("re:")}
    except (ValueError, AttributeError, TypeError, re.error) as error:
        raise FormatError(f"quantization_config: linear is not a compressed-tensors config: {error}") from None
    if not by_target:
        raise FormatError("quantization_config: linear is not a compressed-tensors config: it has no groups.")

    def width(name: str) -> int:
        matched = [bits for pattern, bits in patterns.items() if pattern.match(name)]
        bits = by_target.get(name, matched[0] if matched else by_target.get(ALL_LINEARS))
        if bits is None:
            raise FormatError(f"quantization_config: no group of linear names {name}, which is packed.")
        return bits

    return width


def quantize_linear(
    weight: torch.Tensor, factor: HessianFactor, bits: int, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GPTQ to symmetric integers in groups.

    weight       float [out, in], in divisible by group_size
    factor       HessianFactor of the layer's inputs, columns in the file's order
    scale_dtype  what scales are stored as: the model's dtype, since vLLM loads them so

    Returns the weight as it will be served, float32 [out, in], and the tensors to write, suffix -> tensor, which are in
    host memory. Rows do not depend on each other, and no more than ROWS_AT_ONCE are worked on at once: an output head
    has a hundred thousand.
    """
    parts = [_quantize_rows(rows, factor, bits, group_size, scale_dtype) for rows in weight.split(ROWS_AT_ONCE)]
    tensors = {name: torch.cat([packed[name] for _, packed in parts]) for name in (SCALE, PACKED)}
    tensors[SHAPE] = torch.tensor(weight.shape).to(parts[0][1][SHAPE])
    return torch.cat([rows for rows, _ in parts]), tensors


def _quantize_rows(
    weight: torch.Tensor, factor: HessianFactor, bits: int, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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
