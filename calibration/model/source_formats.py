"""What models are released in: 16 bits, FP8, MXFP4, INT4. Read one tensor at a time, as 16-bit weights.

A format says which weights the tensors of a model's files make up, before any is read, and what one of them is. Nothing
else knows that a source was not in 16 bits: calibration sees what the released weights stand for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from vllm_mcmoe.calibration.model.weight_files import TensorFiles, TensorInfo
from vllm_mcmoe.checkpoint import QUANT_METHOD
from vllm_mcmoe.errors import FormatError, UnsupportedModelError

WEIGHT = ".weight"
READ = (
    "16 bits, FP8 in blocks (fp8 with weight_block_size), MXFP4 (mxfp4, as gpt-oss has it), INT4 in groups "
    "(compressed-tensors, pack-quantized)"
)


class SourceFormat(Protocol):
    """label   what a person calls it"""

    label: str

    def weights(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The weights that these tensors make up, with the shape and dtype they are read in.

        Raises FormatError naming file and tensor for parts that are missing, misshapen or without a weight.
        """

    def read(self, files: TensorFiles, name: str, index: tuple[int, ...] = (), rows: slice = slice(None)):
        """A weight, or weight[index][rows], as TensorFiles.read takes them."""

    def bytes_per_weight(self, expert: bool) -> float:
        """On disk, of an expert's matrix or another linear's."""


@dataclass(frozen=True)
class SixteenBits:
    label: str = "16 bits"

    def weights(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        return dict(stored)

    def read(
        self, files: TensorFiles, name: str, index: tuple[int, ...] = (), rows: slice = slice(None)
    ) -> torch.Tensor:
        return files.read(name, index, rows)

    def bytes_per_weight(self, expert: bool) -> float:
        return 2


@dataclass(frozen=True)
class Fp8Blocks:
    """E4M3 matrices with a scale per block, of any float dtype: DeepSeek's release format, and that of many since.

    block   rows and columns of a block; those at a matrix' end may be smaller
    """

    block: tuple[int, int]

    SCALE = ".weight_scale_inv"

    @property
    def label(self) -> str:
        return f"FP8 in blocks of {self.block[0]} x {self.block[1]}"

    def weights(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        found = {}
        for name, info in stored.items():
            if name.endswith(self.SCALE):
                _require(stored, name, name.removesuffix(self.SCALE) + WEIGHT)
                continue
            if info.dtype == "F8_E4M3":
                scale = _require(stored, name, name.removesuffix(WEIGHT) + self.SCALE)
                blocks = tuple(math.ceil(size / part) for size, part in zip(info.shape, self.block, strict=False))
                if len(info.shape) != 2 or scale.shape != blocks:
                    raise FormatError(
                        f"{scale.file}: {name.removesuffix(WEIGHT)}{self.SCALE} has shape {list(scale.shape)}; "
                        f"the weight, {list(info.shape)}, has {list(blocks)} blocks of {list(self.block)}."
                    )
                info = replace(info, dtype="BF16")
            found[name] = info
        return found

    def read(
        self, files: TensorFiles, name: str, index: tuple[int, ...] = (), rows: slice = slice(None)
    ) -> torch.Tensor:
        if files.info[name].dtype != "F8_E4M3":
            return files.read(name, index, rows)
        weight, scale = files.read(name), files.read(name.removesuffix(WEIGHT) + self.SCALE).float()
        for dimension, (size, part) in enumerate(zip(weight.shape, self.block, strict=True)):
            scale = scale.repeat_interleave(part, dimension).narrow(dimension, 0, size)
        return (weight.float() * scale).bfloat16()

    def bytes_per_weight(self, expert: bool) -> float:
        return 1 + 4 / math.prod(self.block)


@dataclass(frozen=True)
class PackedIntegers:
    """Integers in groups along a row, packed by compressed-tensors: Kimi-K2's release format from K2-Thinking on.

    scheme  width, group size and the like
    """

    scheme: QuantizationScheme

    PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self | None:
        """None for a config of compressed-tensors that says something else."""
        try:
            parsed = QuantizationConfig.model_validate(dict(config))
            (scheme,) = parsed.config_groups.values()
            weights = scheme.weights
            fits = weights.symmetric and weights.strategy == "group" and weights.type == "int"
        except (ValueError, AttributeError, TypeError):
            return None
        return cls(scheme) if fits and parsed.format == "pack-quantized" else None

    @property
    def label(self) -> str:
        return f"INT{self.scheme.weights.num_bits} in groups of {self.scheme.weights.group_size}"

    def weights(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        found, bits, group = {}, self.scheme.weights.num_bits, self.scheme.weights.group_size
        for name, info in stored.items():
            base, suffix = name.rpartition(".")[0], f".{name.rpartition('.')[2]}"
            if suffix in (self.SCALE, self.SHAPE):
                _require(stored, name, base + self.PACKED)
            elif suffix == self.PACKED:
                scale = _require(stored, name, base + self.SCALE)
                _require(stored, name, base + self.SHAPE)
                rows, words = info.shape if len(info.shape) == 2 else (0, 0)
                columns = words * 32 // bits
                if not rows or scale.shape != (rows, math.ceil(columns / group)):
                    raise FormatError(
                        f"{scale.file}: {base}{self.SCALE} has shape {list(scale.shape)}; {name}, {list(info.shape)}, "
                        f"has {math.ceil(columns / group)} groups of {group} in each of {rows} rows."
                    )
                found[base + WEIGHT] = replace(info, dtype="BF16", shape=(rows, columns))
            else:
                found[name] = info
        return found

    def read(
        self, files: TensorFiles, name: str, index: tuple[int, ...] = (), rows: slice = slice(None)
    ) -> torch.Tensor:
        base = name.removesuffix(WEIGHT)
        if base + self.PACKED not in files.info:
            return files.read(name, index, rows)
        parts = {suffix[1:]: files.read(base + suffix) for suffix in (self.PACKED, self.SCALE, self.SHAPE)}
        dtype = parts[self.SCALE[1:]].dtype
        parts[self.SCALE[1:]] = parts[self.SCALE[1:]].float()
        try:
            weight = PackedQuantizationCompressor.decompress(parts, self.scheme)["weight"]
        except (ValueError, RuntimeError, ArithmeticError) as error:  # of compressed-tensors, or of torch
            raise FormatError(
                f"{files.info[base + self.PACKED].file}: {base}{self.PACKED} cannot be unpacked: {error}"
            ) from error
        return weight.to(dtype)

    def bytes_per_weight(self, expert: bool) -> float:
        weights = self.scheme.weights
        return (weights.num_bits + 16 / weights.group_size) / 8 if expert else 2  # of the rest, those in `ignore`


@dataclass(frozen=True)
class Mxfp4Blocks:
    """FP4 in blocks of 32 with a power of two each, of all experts of a layer in one tensor: gpt-oss's release format.

    Read as its release in 16 bits has them, [experts, in, out].
    """

    label: str = "MXFP4 in blocks of 32"

    BLOCKS, SCALES, BLOCK = "_blocks", "_scales", 32

    def weights(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        found = {}
        for name, info in stored.items():
            if name.endswith(self.SCALES):
                _require(stored, name, name.removesuffix(self.SCALES) + self.BLOCKS)
            elif name.endswith(self.BLOCKS):
                base = name.removesuffix(self.BLOCKS)
                scale = _require(stored, name, base + self.SCALES)
                parts = info.shape[:-1]
                if len(info.shape) != 4 or info.shape[-1] * 2 != self.BLOCK or info.dtype != "U8":
                    raise FormatError(
                        f"{info.file}: {name} is {info.dtype} {list(info.shape)}, expected U8 [experts, rows, blocks, "
                        f"{self.BLOCK // 2}]."
                    )
                if scale.shape != parts or scale.dtype != "U8":
                    raise FormatError(
                        f"{scale.file}: {base}{self.SCALES} is {scale.dtype} {list(scale.shape)}; {name}, "
                        f"{list(info.shape)}, has U8 {list(parts)} blocks."
                    )
                experts, rows, blocks = parts
                found[base] = replace(info, dtype="BF16", shape=(experts, blocks * self.BLOCK, rows))
            else:
                found[name] = info
        return found

    def read(
        self, files: TensorFiles, name: str, index: tuple[int, ...] = (), rows: slice = slice(None)
    ) -> torch.Tensor:
        if name + self.BLOCKS not in files.info:
            return files.read(name, index, rows)
        blocks, scales = (files.read(name + suffix, index) for suffix in (self.BLOCKS, self.SCALES))
        whole = convert_moe_packed_tensors(blocks.view(-1, *blocks.shape[-3:]), scales.view(-1, *scales.shape[-2:]))
        return whole.view(*blocks.shape[:-3], *whole.shape[-2:])[rows]

    def bytes_per_weight(self, expert: bool) -> float:
        return 0.5 + 1 / self.BLOCK if expert else 2


def _require(stored: Mapping[str, TensorInfo], name: str, other: str) -> TensorInfo:
    if other not in stored:
        raise FormatError(f"{stored[name].file}: tensor {other} is missing, which {name} belongs to.")
    return stored[other]


def find_source_format(where: str, quantization: Any) -> SourceFormat:
    """where: what errors begin with. quantization: a config's quantization_config, or nothing.

    A checkpoint of ours is not a source: it counts as 16 bits here, and whoever reads weights looks for itself. Raises
    UnsupportedModelError for a format that is not read.
    """
    if not quantization:
        return SixteenBits()
    method = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else "unnamed"
    if method == QUANT_METHOD:
        return SixteenBits()
    block = quantization.get("weight_block_size") if method == "fp8" else None
    if isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        return Fp8Blocks((block[0], block[1]))
    if method == "mxfp4":
        return Mxfp4Blocks()
    packed = PackedIntegers.of(quantization) if method == "compressed-tensors" else None
    if packed is not None:
        return packed
    raise UnsupportedModelError(
        f"{where}: the model is quantised already ({method}), in a form that is not read. Start from its release in "
        f"{READ}; for 16 bits, config.json has no quantization_config."
    )
