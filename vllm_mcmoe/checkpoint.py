"""Checkpoint format, versions 1 and 2: what `config.json["quantization_config"]` says and how tensors are called.

A checkpoint is an ordinary Hugging Face directory. Expert tensors keep the model's names with a suffix
(`kernels/packing.py` describes their bytes):

    {layer}.{expert}.{projection}.qweight   uint8 [out, ceil(in/128), 16*bits]
    {layer}.{expert}.{projection}.scales    [out, ceil(in/128)], float16 in version 1, uint8 in version 2
    {layer}.{expert}.{projection}.zeros     float16 [out, ceil(in/128)], in version 1, but not at 1 bit
    {layer}.{expert}.{projection}.exponents int8 [out], in version 2: of the rows' scales
    {layer}.{expert}.{projection}.bias      [out], of models whose experts have biases: as the model has it

where {layer} is the on-disk prefix of a layer's experts, for example `model.layers.0.block_sparse_moe.experts`;
the same string names the layer in the config below, in factors.json and in plan.json. `out` and `in` are the model's
own and need not be multiples of 128: a last group that is not whole has its scale and zero fitted on the columns there
are, and is filled up with codes 0, which readers crop.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import (
    GROUP_SIZE,
    WIDTHS,
    PackedMatrix,
    packed_bytes_per_group,
    scales_from_bytes,
    scales_to_bytes,
)
from vllm_mcmoe.kernels.trellis import TrellisMatrix
from vllm_mcmoe.pruning import PruningConfig

QUANT_METHOD = "mcmoe"
VERSIONS = (1, 2)  # which differ in what is stored of each group of weights beside its codes
FORMAT_VERSION = VERSIONS[-1]

QWEIGHT, SCALES, ZEROS, EXPONENTS, BIAS = "qweight", "scales", "zeros", "exponents", "bias"


def tensor_dtypes(bits: int, version: int) -> dict[str, str]:
    """Suffix -> dtype, in safetensors' words, of the tensors that a matrix of this width has."""
    if version == 1:
        return {QWEIGHT: "U8", SCALES: "F16"} | ({} if bits == 1 else {ZEROS: "F16"})
    return {QWEIGHT: "U8", SCALES: "U8", EXPONENTS: "I8"}


def tensor_shape(suffix: str, bits: int, rows: int, groups: int) -> tuple[int, ...]:
    """Of one of tensor_dtypes' tensors."""
    return {QWEIGHT: (rows, groups, packed_bytes_per_group(bits)), EXPONENTS: (rows,)}.get(suffix, (rows, groups))


def matrix_tensors(matrix: PackedMatrix | TrellisMatrix, version: int) -> dict[str, torch.Tensor]:
    """Suffix -> tensor as this version stores the matrix. Raises ValueError where it cannot."""
    if isinstance(matrix, TrellisMatrix):
        raise ValueError(f"format version {version} has no trellis codes")
    if version == 1:
        tensors = {QWEIGHT: matrix.qweight, SCALES: matrix.scales, ZEROS: matrix.zeros}
    else:
        scales, exponents = scales_to_bytes(matrix.scales)
        tensors = {QWEIGHT: matrix.qweight, SCALES: scales, EXPONENTS: exponents, ZEROS: matrix.zeros}
    tensors = {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}
    if set(tensors) != set(tensor_dtypes(matrix.bits, version)):
        raise ValueError(f"format version {version} stores {', '.join(tensor_dtypes(matrix.bits, version))}")
    return tensors


def matrix_of(bits: int, version: int, read: Callable[[str], torch.Tensor]) -> PackedMatrix:
    """The matrix whose tensors read(suffix) gives, as this version stores them."""
    tensors = {suffix: read(suffix) for suffix in tensor_dtypes(bits, version)}
    scales = tensors[SCALES] if version == 1 else scales_from_bytes(tensors[SCALES], tensors[EXPONENTS])
    return PackedMatrix(bits, tensors[QWEIGHT], scales, tensors.get(ZEROS))


@dataclass(frozen=True)
class ExpertBits:
    """Bit-widths of one layer's experts: gate_up and down, each one of WIDTHS per expert."""

    gate_up: tuple[int, ...]
    down: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return len(self.gate_up)

    @property
    def widths(self) -> frozenset[int]:
        return frozenset(self.gate_up) | frozenset(self.down)


@dataclass(frozen=True)
class CheckpointConfig:
    """The quantization_config of a checkpoint.

    experts       layer name -> bit-widths of every expert
    linear        a compressed-tensors config for every other linear layer, or None where they stay in 16 bits
    pruning       the rule of online pruning, or None
    average_bits  measured on the written tensors, scales and zeros included: {"experts": ..., "model": ...}
    """

    experts: dict[str, ExpertBits]
    linear: dict[str, Any] | None = None
    pruning: PruningConfig | None = None
    average_bits: dict[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The JSON object written to config.json; absent optional parts are left out."""
        config: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "group_size": GROUP_SIZE,
            "experts": {
                name: {"gate_up": list(bits.gate_up), "down": list(bits.down)} for name, bits in self.experts.items()
            },
            "average_bits": self.average_bits,
        }
        if self.linear is not None:
            config["linear"] = self.linear
        if self.pruning is not None:
            config["pruning"] = self.pruning.to_dict()
        return config

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str = "quantization_config") -> "CheckpointConfig":
        """Parse and check. `source` (a file name) opens every message.

        Raises FormatError: not an mcmoe config, a newer version, another group size, or widths that are not a list
        of {1, 2, 3, 4, 8} of the same length for both projections.
        """
        if not isinstance(config, dict):
            raise FormatError(f"{source}: expected an object, found a {type(config).__name__}.")
        method = config.get("quant_method")
        if method != QUANT_METHOD:
            raise FormatError(
                f"{source}: quant_method is {method!r}, expected {QUANT_METHOD!r}: this checkpoint was not written by "
                "`mcmoe quantize`. Serve it without --quantization mcmoe, or quantise it first."
            )
        version = config.get("format_version")
        if not isinstance(version, int) or version not in VERSIONS:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            advice = "upgrade vllm-mcmoe" if newer else "quantise the model again"
            known = " and ".join(map(str, VERSIONS))
            raise FormatError(
                f"{source}: format_version is {version!r}, this vllm-mcmoe reads versions {known}; {advice}."
            )
        if config.get("group_size") != GROUP_SIZE:
            raise FormatError(f"{source}: group_size is {config.get('group_size')!r}, expected {GROUP_SIZE}.")
        layers = config.get("experts")
        if not isinstance(layers, dict) or not layers:
            raise FormatError(f"{source}: 'experts' must map MoE layer names to bit-widths, found {layers!r}.")
        pruning = config.get("pruning")
        return cls(
            experts={name: _parse_expert_bits(name, bits, source) for name, bits in layers.items()},
            linear=config.get("linear"),
            pruning=None if pruning is None else PruningConfig.from_dict(pruning, f"{source}: pruning"),
            average_bits=config.get("average_bits", {}),
            format_version=version,
        )


def _parse_expert_bits(name: str, bits: Any, source: str) -> ExpertBits:
    if not isinstance(bits, dict):
        raise FormatError(f"{source}: experts of {name}: expected gate_up and down, found {bits!r}.")
    lists = {}
    for projection in ("gate_up", "down"):
        widths = bits.get(projection)
        if not isinstance(widths, list) or not widths:
            raise FormatError(f"{source}: {name}.{projection}: expected a list of bit-widths, found {widths!r}.")
        for expert, width in enumerate(widths):
            if width not in WIDTHS:
                raise FormatError(
                    f"{source}: {name}.{projection}: expert {expert} has bit-width {width!r}; "
                    f"the kernels have {WIDTHS}."
                )
        lists[projection] = tuple(widths)
    if len(lists["gate_up"]) != len(lists["down"]):
        raise FormatError(
            f"{source}: {name}: {len(lists['gate_up'])} widths for gate_up but {len(lists['down'])} for down."
        )
    return ExpertBits(**lists)


def read_checkpoint_config(checkpoint: Path) -> CheckpointConfig:
    """The checked quantization_config of a checkpoint directory. Raises FormatError, naming the file."""
    path = Path(checkpoint) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist: {checkpoint} is not a model directory.") from None
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: expected an object, found a {type(config).__name__}.")
    quantization = config.get("quantization_config")
    if quantization is None:
        raise FormatError(f"{path}: no quantization_config: this model is not quantised; run `mcmoe quantize`.")
    return CheckpointConfig.from_dict(quantization, source=str(path))


def is_mcmoe_checkpoint(model: Path) -> bool:
    """Whether a model directory claims to be in this format (its config may still be invalid)."""
    path = Path(model) / "config.json"
    try:
        quantization = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
        return quantization["quant_method"] == QUANT_METHOD
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False  # no config of ours; whoever reads it says what is wrong with it
