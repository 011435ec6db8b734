"""What is tuned after quantisation, and a checkpoint read with other values of it.

    routers   every tensor of theirs
    norms     the scales
    rows      of experts' matrices: a factor for every row, which is folded into the scales of the row's groups

All of it stays in 16 bits whatever the experts get, so that tuning changes no size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call

from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.tunable import norm_parameters, router_parameters
from vllm_mcmoe.calibration.model.weight_files import TensorFiles
from vllm_mcmoe.calibration.recipes import TuningOptions
from vllm_mcmoe.checkpoint import SCALES
from vllm_mcmoe.kernels.packing import PackedMatrix

PARTS = ("gate_up", "down")


@dataclass(frozen=True)
class Tunable:
    """One tensor that is tuned.

    layer      decoder layer it is in
    parameter  its name in transformers' module of that layer; of rows, the part of the experts that they are of
    value      as it is to begin with, float32: of routers and norms as the tensor on disk, of rows [experts, rows] ones
    step       the first step's size at a KL of 1, in units of the value
    """

    layer: int
    parameter: str
    value: torch.Tensor
    step: float


def find_tunables(model: LayerwiseModel, options: TuningOptions) -> dict[str, Tunable]:
    """On-disk name -> what is tuned, in the order of the layers; rows are named "{layer}.gate_up" and "{layer}.down".

    model   of a checkpoint; its layers need not be loaded
    """
    description, found = model.description, {}
    for index in range(model.num_layers):
        layer = model.module.model.layers[index]
        routers, norms = router_parameters(description, index, layer), norm_parameters(layer)
        for name in model.layer_tensors(index):
            parameter = description.module_name(description.split_layer_name(name)[1])
            if parameter in routers:
                value = model.source.read(name).float()
                found[name] = Tunable(index, parameter, value, options.router_step * _size(value))
            elif parameter in norms:
                value = model.source.read(name).float()
                norm = layer.get_submodule(parameter.rpartition(".")[0])
                found[name] = Tunable(index, parameter, value, options.norm_step * _norm_size(norm, value))
        if index in description.moe_layers:
            for part in PARTS:
                value = torch.ones(description.num_experts, description.part_shapes()[part][0])
                found[f"{description.moe_layers[index]}.{part}"] = Tunable(index, part, value, options.row_step)
    return found


def _size(value: torch.Tensor) -> float:
    return float(value.square().mean().sqrt())


def _norm_size(module: nn.Module, scale: torch.Tensor) -> float:
    """Root mean square of what a norm multiplies by, which in some families is 1 + its weight."""
    probe = torch.ones(len(scale))
    probe[::2] = -1  # of mean 0 and variance 1: normalised already, whatever the norm
    parameters = {name: torch.zeros_like(scale) for name, _ in module.named_parameters()} | {"weight": scale}
    return _size(functional_call(module, parameters, (probe,)))


class TunedWeights:
    """The WeightSource of a checkpoint with other values of what is tuned, rounded as they would be written.

    values   by the names of find_tunables; float32, what is read from here changes with them
    """

    def __init__(self, weights: CheckpointWeights, values: Mapping[str, torch.Tensor]):
        self.weights, self.values = weights, values
        self.model = weights.model
        self._rows = {
            (projection, part): rows
            for part in PARTS
            for projection, rows in zip(self.model.projections(part), self.model.projection_rows(part), strict=True)
        }

    @property
    def files(self) -> TensorFiles:
        return self.weights.files

    def names(self) -> list[str]:
        return self.weights.names()

    def numel(self, name: str) -> int:
        return self.weights.numel(name)

    def read(self, name: str) -> torch.Tensor:
        if name in self.values:
            return self.values[name].detach().to(self.weights.read(name).dtype)
        base = name.removesuffix(".weight")
        factors = self._factors(base)
        if factors is None or base == name:
            return self.weights.read(name)
        _, in_features = self.model.projection_shape(base.rpartition(".")[2])
        return scaled_rows(self.weights.read_matrix(base), factors).dequantize(in_features=in_features)

    def _factors(self, base: str) -> torch.Tensor | None:
        """float32 [rows] of an expert's matrix; None for what is none."""
        parts = base.rsplit(".", 2)
        for (projection, part), rows in self._rows.items():
            if len(parts) == 3 and parts[2] == projection and f"{parts[0]}.{part}" in self.values:
                return self.values[f"{parts[0]}.{part}"].detach()[int(parts[1]), rows]
        return None

    def stored(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint's files, under the name it has there, as it is to be written."""
        if name in self.values:
            return self.read(name)
        base, _, suffix = name.rpartition(".")
        factors = self._factors(base) if suffix == SCALES else None
        return self.files.read(name) if factors is None else scaled_rows(self.weights.read_matrix(base), factors).scales


def scaled_rows(matrix: PackedMatrix, factors: torch.Tensor) -> PackedMatrix:
    """The matrix with every row multiplied: weights are scale * (code - zero), so its scales are. factors: float32
    [out]; a scale that fp16 could not hold precisely stays at the smallest or largest that it can."""
    limits = torch.finfo(torch.float16)
    scales = (matrix.scales.float() * factors[:, None]).clamp(limits.smallest_normal, limits.max)
    return replace(matrix, scales=scales.half())
