"""Which parameters of a decoder layer can be tuned after quantisation: its router's, and the scales of its norms.

A router's correction bias is a buffer: it decides only which experts are selected, so nothing has a gradient there.
"""

from torch import nn

from vllm_mcmoe.calibration.model.description import MoeModel


def router_parameters(model: MoeModel, index: int, layer: nn.Module) -> list[str]:
    """Names in transformers' module of decoder layer `index`, whose weights need not be loaded."""
    if index not in model.moe_layers:
        return []
    path = ".".join(part for part in (model.family.moe_module, model.family.router) if part)
    return [f"{path}.{name}" for name, _ in layer.get_submodule(path).named_parameters()]


def norm_parameters(layer: nn.Module) -> list[str]:
    """Likewise, of norms that normalise their input alone: those with a gate are part of what they are in."""
    return [
        f"{name}.weight"
        for name, module in layer.named_modules()
        if "Norm" in type(module).__name__
        and "Gated" not in type(module).__name__
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
