"""A quantised checkpoint read as if it were the 16-bit model: every matrix dequantised, exactly, under its old name.

model = load_dequantized("mixtral-2.5bit")     # a transformers model in float32
"""

import math
from pathlib import Path

import torch
from transformers import PreTrainedModel

from vllm_mcmoe.calibration.matrix.linears import PACKED, SUFFIXES, dequantize_linear, linear_widths
from vllm_mcmoe.calibration.model.description import FLOAT_DTYPES, MoeModel, describe_model
from vllm_mcmoe.calibration.model.folder import ModelFolder
from vllm_mcmoe.calibration.model.layerwise import load_full_model
from vllm_mcmoe.calibration.model.weight_files import TensorFiles
from vllm_mcmoe.calibration.model.weights import WeightFiles, WeightSource
from vllm_mcmoe.checkpoint import (
    BIAS,
    EXPONENTS,
    QWEIGHT,
    SCALES,
    ZEROS,
    CheckpointConfig,
    is_mcmoe_checkpoint,
    matrix_of,
    read_checkpoint_config,
    tensor_dtypes,
    tensor_shape,
)
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import Code, StoredMatrix, group_count


class CheckpointWeights:
    """The WeightSource of a quantised checkpoint.

    config   its quantization_config
    """

    def __init__(self, model: MoeModel):
        """Raises FormatError: a config that is invalid or newer, tensors that are missing or misshapen; HubError for
        files that cannot be had."""
        self.model = model
        self.config: CheckpointConfig = read_checkpoint_config(model.path)
        self.files = TensorFiles(model.folder)
        self._linear_bits = linear_widths(self.config.linear) if self.config.linear else _none_is_packed
        _check_layers(model, self.config)
        for layer_name in model.moe_layers.values():
            for expert in range(model.num_experts):
                for projection in model.all_projections:
                    self._check_matrix(layer_name, expert, projection)
                    if model.has_biases:
                        self._check_bias(model.expert_tensor(layer_name, expert, projection))

    def _code(self, layer_name: str, expert: int, projection: str) -> Code:
        layer = self.config.experts[layer_name]
        return (layer.down_codes if projection == self.model.family.down else layer.gate_up_codes)[expert]

    def _check_matrix(self, layer_name: str, expert: int, projection: str) -> None:
        base = self.model.expert_tensor(layer_name, expert, projection)
        code = self._code(layer_name, expert, projection)
        rows, columns = self.model.projection_shape(projection)
        groups = group_count(columns)
        for suffix, dtype in tensor_dtypes(code, self.config.format_version).items():
            name, shape = f"{base}.{suffix}", tensor_shape(suffix, code, rows, groups)
            info = self.files.info.get(name)
            if info is None:
                raise FormatError(f"{self.model.path}: tensor {name} is missing; the checkpoint is incomplete.")
            if (info.dtype, info.shape) != (dtype, shape):
                raise FormatError(
                    f"{info.file}: {name} is {info.dtype} {list(info.shape)}; "
                    f"a {projection} of {code} needs {dtype} {list(shape)}."
                )

    def _check_bias(self, base: str) -> None:
        name = f"{base}.{BIAS}"
        info = self.files.info.get(name)
        if info is None:
            raise FormatError(f"{self.model.path}: tensor {name} is missing; the checkpoint is incomplete.")
        if info.dtype not in FLOAT_DTYPES or info.shape != self.model.tensor_shape(name):
            raise FormatError(
                f"{info.file}: {name} is {info.dtype} {list(info.shape)}; expected a float of "
                f"{list(self.model.tensor_shape(name))}."
            )

    def names(self) -> list[str]:
        names = []
        for name in self.files.info:
            base, _, suffix = name.rpartition(".")
            if suffix in (QWEIGHT, PACKED):
                names.append(f"{base}.weight")
            elif suffix not in (SCALES, ZEROS, EXPONENTS, *SUFFIXES):
                names.append(name)
        return names

    def read(self, name: str) -> torch.Tensor:
        """The tensor dequantised to float32, or as stored where it is not quantised."""
        base = name.removesuffix(".weight")
        if f"{base}.{QWEIGHT}" in self.files.info:
            _, in_features = self.model.projection_shape(base.rpartition(".")[2])
            return self.read_matrix(base).dequantize(in_features=in_features)
        if f"{base}.{PACKED}" in self.files.info:
            tensors = {suffix: self.files.read(f"{base}.{suffix}") for suffix in SUFFIXES}
            try:
                return dequantize_linear(tensors, self._linear_bits(base))
            except (ValueError, RuntimeError, ArithmeticError) as error:  # of compressed-tensors, or of torch
                file = self.files.info[f"{base}.{PACKED}"].file
                raise FormatError(f"{file}: {base}.{PACKED} cannot be unpacked: {error}") from error
        return self.files.read(name)

    def read_matrix(self, base: str) -> StoredMatrix:
        """A matrix of an expert as stored; base: "{layer}.{expert}.{projection}"."""
        layer_name, expert, projection = base.rsplit(".", 2)
        code = self._code(layer_name, int(expert), projection)
        return matrix_of(code, self.config.format_version, lambda suffix: self.files.read(f"{base}.{suffix}"))

    def numel(self, name: str) -> int:
        base = name.removesuffix(".weight")
        if self.model.is_expert_tensor(name):
            return math.prod(self.model.tensor_shape(name))
        packed = self.files.info.get(f"{base}.{PACKED}")
        return self.files.info[name].numel if packed is None else packed.numel * 32 // self._linear_bits(base)


def _none_is_packed(name: str) -> int:
    raise FormatError(f"{name} is packed, but quantization_config has no entry linear that says how.")


def _check_layers(model: MoeModel, config: CheckpointConfig) -> None:
    where = model.path / "config.json"
    layers = list(model.moe_layers.values())
    if sorted(config.experts) != sorted(layers):
        differing = sorted(set(config.experts) ^ set(layers))
        raise FormatError(f"{where}: quantization_config.experts and the model's MoE layers differ in {differing[0]}.")
    for name, bits in config.experts.items():
        if bits.num_experts != model.num_experts:
            raise FormatError(
                f"{where}: {name} has widths for {bits.num_experts} experts, the model has {model.num_experts}."
            )


def open_weights(model: str | Path | ModelFolder) -> WeightSource:
    """The weights of a 16-bit model or of a quantised checkpoint, as find_model takes its name.

    Raises UnsupportedModelError, FormatError or HubError as describe_model and the two classes do.
    """
    description = describe_model(model)
    return CheckpointWeights(description) if is_mcmoe_checkpoint(description.path) else WeightFiles(description)


def load_dequantized(checkpoint: str | Path) -> PreTrainedModel:
    """A checkpoint (or a 16-bit model) as a transformers model in float32, all of it in memory."""
    return load_full_model(open_weights(checkpoint))
