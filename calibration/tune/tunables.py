"""What is tuned after quantisation, and a checkpoint read with other values of it.

    routers   every tensor of theirs
    norms     the scales, of the decoder layers' and of the final one

All of it stays in 16 bits whatever the experts get, so that tuning changes no size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights
from vllm_mcmoe.calibration.model.description import TEXT_MODULE
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.tunable import norm_parameters, router_parameters
from vllm_mcmoe.calibration.model.weight_files import TensorFiles
from vllm_mcmoe.calibration.recipes import TuningOptions


@dataclass(frozen=True)
class Tunable:
    """One tensor that is tuned.

    layer      decoder layer it is in; None for the final norm
    parameter  its name in transformers' module of that layer, or in the final norm
    value      as it is on disk to begin with, but float32
    step       the first step's size at a KL of 1, in units of the value
    """

    layer: int | None
    parameter: str
    value: torch.Tensor
    step: float


def find_tunables(model: LayerwiseModel, options: TuningOptions) -> dict[str, Tunable]:
    """On-disk name -> what is tuned, in the order of the layers.

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
    name = description.outer_name(f"{TEXT_MODULE}{description.family.final_norm}.weight")
    value = model.source.read(name).float()
    found[name] = Tunable(None, "weight", value, options.norm_step * _norm_size(model.final_norm, value))
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

    @property
    def files(self) -> TensorFiles:
        return self.weights.files

    def names(self) -> list[str]:
        return self.weights.names()

    def numel(self, name: str) -> int:
        return self.weights.numel(name)

    def read(self, name: str) -> torch.Tensor:
        return self.stored(name) if name in self.values else self.weights.read(name)

    def stored(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint's files, under the name it has there, as it is to be written."""
        stored = self.files.read(name)
        return self.values[name].detach().to(stored.dtype) if name in self.values else stored
