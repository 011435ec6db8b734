"""Grouped GEMM over experts of different bit-widths.

`experts_class(name)` gives the module that holds one layer's experts. Every backend has the same three methods:
`prepare(gate_up, down, *, hidden_size, intermediate_size, gate_up_codes, down_codes, function, device)`, which repacks
the checkpoint's matrices one at a time, `set_biases(gate_up, down)`, for experts that have them, and
`forward(x, topk_weights, topk_ids, expert_map=None)`. `function` is expert_function.py's.
"""

import importlib
from collections.abc import Callable

import torch

_EXPERTS_CLASSES = {
    "reference": ("vllm_mcmoe.kernels.reference", "ReferenceExperts"),
    "cpu": ("vllm_mcmoe.kernels.cpu", "CpuExperts"),
    "triton": ("vllm_mcmoe.kernels.triton", "TritonExperts"),
}


def experts_class(backend: str) -> type[torch.nn.Module]:
    """The experts module of a backend, imported when first asked for. Raises ValueError for an unknown name."""
    if backend not in _EXPERTS_CLASSES:
        raise ValueError(f"no kernel backend {backend!r}; there are {', '.join(_EXPERTS_CLASSES)}")
    module, name = _EXPERTS_CLASSES[backend]
    return getattr(importlib.import_module(module), name)


_PRUNING_MODULES = {
    "reference": "vllm_mcmoe.kernels.reference.pruning",
    "cpu": "vllm_mcmoe.kernels.cpu.pruning",
    "triton": "vllm_mcmoe.kernels.triton.pruning",
}


def prune_experts(backend: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A backend's version of kernels.reference.pruning.prune_experts. Raises ValueError for an unknown backend."""
    if backend not in _PRUNING_MODULES:
        raise ValueError(f"no kernel backend {backend!r}; there are {', '.join(_PRUNING_MODULES)}")
    return importlib.import_module(_PRUNING_MODULES[backend]).prune_experts
