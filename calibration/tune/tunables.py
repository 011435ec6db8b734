"""What is tuned after quantisation, the scales of norms, and a checkpoint read with other values of it.

Norms stay in 16 bits whatever the experts get, so that tuning changes no size. The final one is among them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights
from vllm_mcmoe.calibration.model.description import TEXT_MODULE
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
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
        norms = _norms(layer)
        for name in model.layer_tensors(index):
            parameter = description.module_name(description.split_layer_name(name)[1])
            if parameter in norms:
                found[name] = _tunable(model, name, index, parameter, norms[parameter], options)
    name = description.outer_name(f"{TEXT_MODULE}{description.family.final_norm}.weight")
    found[name] = _tunable(model, name, None, "weight", model.final_norm, options)
    return found


def _norms(layer: nn.Module) -> dict[str, nn.Module]:
    """Name of the scale -> norm, of those that normalise their input alone; a gate makes one part of what it is in."""
    return {
        f"{name}.weight": module
        for name, module in layer.named_modules()
        if "Norm" in type(module).__name__
        and "Gated" not in type(module).__name__
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def _tunable(
    model: LayerwiseModel, name: str, layer: int | None, parameter: str, norm: nn.Module, options: TuningOptions
) -> Tunable:
    value = model.source.read(name).float()
    return Tunable(layer, parameter, value, options.step_size * _multiplier(norm, value))


def _multiplier(norm: nn.Module, scale: torch.Tensor) -> float:
    """Root mean square of what a norm multiplies by, which in some families is 1 + its weight."""
    probe = torch.ones(len(scale))
    probe[::2] = -1  # of mean 0 and variance 1: normalised already, whatever the norm
    parameters = {name: torch.zeros_like(scale) for name, _ in norm.named_parameters()} | {"weight": scale}
    return float(functional_call(norm, parameters, (probe,)).square().mean().sqrt())


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
