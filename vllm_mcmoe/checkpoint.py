"""Checkpoint format, versions 1 to 3: what `config.json["quantization_config"]` says and how tensors are called.

A checkpoint is an ordinary Hugging Face directory. Expert tensors keep the model's names with a suffix
(`kernels/packing.py` describes their bytes, `kernels/trellis.py` those of trellis codes):

    {layer}.{expert}.{projection}.qweight   uint8 [out, ceil(in/128), 16*bits]
    {layer}.{expert}.{projection}.scales    [out, ceil(in/128)], float16 in version 1, uint8 from version 2 on
    {layer}.{expert}.{projection}.zeros     float16 [out, ceil(in/128)], in version 1, but not at 1 bit
    {layer}.{expert}.{projection}.exponents int8 [out], from version 2 on: of the rows' scales
    {layer}.{expert}.{projection}.bias      [out], of models whose experts have biases: as the model has it

where {layer} is the on-disk prefix of a layer's experts, for example `model.layers.0.block_sparse_moe.experts`;
the same string names the layer in the config below, in factors.json and in plan.json. `out` and `in` are the model's
own and need not be multiples of 128: a last group that is not whole has its scale and zero fitted on the columns there
are, and is filled up with codes that mean nothing, which readers crop.

Version 3 is version 2 in which a matrix of 1 to 4 bits may have trellis codes; the config says which have.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import (
    CODES,
    GROUP_SIZE,
    KINDS,
    WIDTHS,
    Code,
    Kind,
    StoredMatrix,
    packed_bytes_per_group,
    scales_from_bytes,
    scales_to_bytes,
)
from vllm_mcmoe.kernels.trellis import stored_matrix
from vllm_mcmoe.pruning import PruningConfig

QUANT_METHOD = "mcmoe"
# Version 1 stores scales and zeros of 16 bits beside each group's codes, version 2 scales of a byte. Version 3 is 2
# where some matrix has trellis codes: others are written as version 2, which older releases read.
VERSIONS = (1, 2, 3)
FORMAT_VERSION = VERSIONS[-1]
SCALAR_VERSION, TRELLIS_VERSION = 2, 3  # what is written without trellis codes and with them, scales being bytes

QWEIGHT, SCALES, ZEROS, EXPONENTS, BIAS = "qweight", "scales", "zeros", "exponents", "bias"


def tensor_dtypes(code: Code, version: int) -> dict[str, str]:
    """Suffix -> dtype, in safetensors' words, of the tensors that a matrix of this code has."""
    if version == 1:
        return {QWEIGHT: "U8", SCALES: "F16"} | ({ZEROS: "F16"} if code.has_zeros(stored_zeros=True) else {})
    return {QWEIGHT: "U8", SCALES: "U8", EXPONENTS: "I8"}


def tensor_shape(suffix: str, code: Code, rows: int, groups: int) -> tuple[int, ...]:
    """Of one of tensor_dtypes' tensors."""
    return {QWEIGHT: (rows, groups, packed_bytes_per_group(code.bits)), EXPONENTS: (rows,)}.get(suffix, (rows, groups))


def matrix_tensors(matrix: StoredMatrix, version: int) -> dict[str, torch.Tensor]:
    """Suffix -> tensor as this version stores the matrix. Raises ValueError where it cannot."""
    if matrix.code.kind == "trellis" and version <= SCALAR_VERSION:
        raise ValueError(f"format version {version} has no trellis codes")
    if version == 1:
        tensors = {QWEIGHT: matrix.qweight, SCALES: matrix.scales, ZEROS: matrix.zeros}
    else:
        scales, exponents = scales_to_bytes(matrix.scales)
        tensors = {QWEIGHT: matrix.qweight, SCALES: scales, EXPONENTS: exponents, ZEROS: matrix.zeros}
    tensors = {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}
    if set(tensors) != set(tensor_dtypes(matrix.code, version)):
        raise ValueError(f"format version {version} stores {', '.join(tensor_dtypes(matrix.code, version))}")
    return tensors


def matrix_of(code: Code, version: int, read: Callable[[str], torch.Tensor]) -> StoredMatrix:
    """The matrix whose tensors read(suffix) gives, as this version stores them."""
    tensors = {suffix: read(suffix) for suffix in tensor_dtypes(code, version)}
    scales = tensors[SCALES] if version == 1 else scales_from_bytes(tensors[SCALES], tensors[EXPONENTS])
    return stored_matrix(code, tensors[QWEIGHT], scales, tensors.get(ZEROS))


@dataclass(frozen=True)
class ExpertBits:
    """What one layer's experts are written in: bit-widths of gate_up and down, one of WIDTHS per expert each, and the
    kinds of codes; no kinds where all are scalar."""

    gate_up: tuple[int, ...]
    down: tuple[int, ...]
    gate_up_kinds: tuple[Kind, ...] = ()
    down_kinds: tuple[Kind, ...] = ()

    @classmethod
    def of_codes(cls, gate_up: Sequence[Code], down: Sequence[Code]) -> "ExpertBits":
        widths = [tuple(code.bits for code in codes) for codes in (gate_up, down)]
        if all(code.kind == "scalar" for code in (*gate_up, *down)):
            return cls(*widths)
        return cls(*widths, *(tuple(code.kind for code in codes) for codes in (gate_up, down)))

    @property
    def num_experts(self) -> int:
        return len(self.gate_up)

    @property
    def gate_up_codes(self) -> tuple[Code, ...]:
        return _codes(self.gate_up, self.gate_up_kinds)

    @property
    def down_codes(self) -> tuple[Code, ...]:
        return _codes(self.down, self.down_kinds)

    @property
    def has_trellis(self) -> bool:
        return "trellis" in (*self.gate_up_kinds, *self.down_kinds)

    @property
    def used_codes(self) -> frozenset[Code]:
        return frozenset(self.gate_up_codes + self.down_codes)

    def to_dict(self) -> dict[str, list]:
        """For JSON; without kinds where all codes are scalar."""
        return {name: list(values) for name, values in asdict(self).items() if values}


def describe_kinds(codes: Iterable[Code]) -> str:
    """ "trellis", "scalar", or where there are both "scalar 12%, trellis 88%", of the matrices."""
    counts = Counter(code.kind for code in codes)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{kind} {count / counts.total():.0%}" for kind, count in sorted(counts.items()))


def _codes(widths: tuple[int, ...], kinds: tuple[Kind, ...]) -> tuple[Code, ...]:
    return tuple(map(Code, widths, kinds)) if kinds else tuple(map(Code, widths))


@dataclass(frozen=True)
class CheckpointConfig:
    """The quantization_config of a checkpoint.

    experts       layer name -> bit-widths and kinds of codes of every expert
    linear        a compressed-tensors config for every other linear layer, or None where they stay in 16 bits
    pruning       the rule of online pruning, or None
    average_bits  measured on the written tensors, scales and zeros included: {"experts": ..., "model": ...}
    """

    experts: dict[str, ExpertBits]
    linear: dict[str, Any] | None = None
    pruning: PruningConfig | None = None
    average_bits: dict[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def codes(self) -> list[Code]:
        """Of all matrices, gate_up counted as one."""
        return [code for layer in self.experts.values() for code in (*layer.gate_up_codes, *layer.down_codes)]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object written to config.json; absent optional parts are left out."""
        config: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "group_size": GROUP_SIZE,
            "experts": {name: bits.to_dict() for name, bits in self.experts.items()},
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

        Raises FormatError: not an mcmoe config, a newer version, another group size, widths that are not a list of
        {1, 2, 3, 4, 8} of the same length for both projections, or kinds of codes that do not go with them.
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
            raise FormatError(
                f"{source}: format_version is {version!r}, this vllm-mcmoe reads versions {VERSIONS[0]} to "
                f"{FORMAT_VERSION}; {advice}."
            )
        if config.get("group_size") != GROUP_SIZE:
            raise FormatError(f"{source}: group_size is {config.get('group_size')!r}, expected {GROUP_SIZE}.")
        layers = config.get("experts")
        if not isinstance(layers, dict) or not layers:
            raise FormatError(f"{source}: 'experts' must map MoE layer names to bit-widths, found {layers!r}.")
        pruning = config.get("pruning")
        return cls(
            experts={name: _parse_expert_bits(name, bits, version, source) for name, bits in layers.items()},
            linear=config.get("linear"),
            pruning=None if pruning is None else PruningConfig.from_dict(pruning, f"{source}: pruning"),
            average_bits=config.get("average_bits", {}),
            format_version=version,
        )


def _parse_expert_bits(name: str, bits: Any, version: int, source: str) -> ExpertBits:
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
    for projection, widths in list(lists.items()):
        key = f"{projection}_kinds"
        lists[key] = _parse_kinds(f"{name}.{key}", bits.get(key), widths, version, source)
    return ExpertBits(**lists)


def _parse_kinds(where: str, kinds: Any, widths: tuple[int, ...], version: int, source: str) -> tuple[Kind, ...]:
    """Empty where the config has no kinds."""
    if kinds is None:
        return ()
    if version <= SCALAR_VERSION:
        raise FormatError(f"{source}: {where}: format version {version} has scalar codes alone.")
    if not isinstance(kinds, list) or len(kinds) != len(widths):
        raise FormatError(f"{source}: {where}: expected a list of {len(widths)} kinds of codes, found {kinds!r}.")
    for expert, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
        if kind not in KINDS:
            raise FormatError(
                f"{source}: {where}: expert {expert} has codes of kind {kind!r}; known are {', '.join(KINDS)}."
            )
        if Code(width, kind) not in CODES:
            raise FormatError(f"{source}: {where}: expert {expert} has {width} bits, for which no {kind} code exists.")
    return tuple(kinds)


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
