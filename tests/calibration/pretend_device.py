"""A device that a machine without a GPU can have: torch's "privateuse1" under the name "pretend", implemented here.

Its tensors wrap CPU tensors and every operation runs on those, so results are the CPU's, bit for bit. What a real
device refuses is refused: operands on two devices, numpy views. Like CUDA it takes, besides its own, numbers
(0-dimensional tensors) and indices from the host, and copies go where they are told to.

    from tests.calibration.pretend_device import PRETEND
    x = torch.randn(3, 4).to(PRETEND)
"""

from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import parent_process
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)

if parent_process() is None:
    raise RuntimeError("torch keeps the device to the end of the process: import this in child_process.result_of's")
_setup_privateuseone_for_python_backend("pretend")
PRETEND = torch.device("pretend", 0)


class DeviceMismatch(RuntimeError):
    """An operation was given tensors of the device and of the host."""


class PretendTensor(torch.Tensor):
    """host: the CPU tensor with the values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "PretendTensor":
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, host.shape, dtype=host.dtype, device=PRETEND, **layout)

    def __init__(self, host: torch.Tensor):
        self.host = host

    def tolist(self) -> Any:
        """As on any device; torch has none for tensors implemented in Python."""
        return self.host.tolist()

    def __repr__(self) -> str:
        return f"PretendTensor({self.host})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(operation, *args, **(kwargs or {}))


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation on any of the device's tensors, or one that is to make such a tensor."""
    _check_devices(operation, args, kwargs)
    wanted = kwargs.get("device") and torch.device(kwargs["device"])
    if wanted == PRETEND:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = operation(*_mapped(_host, args), **{name: _mapped(_host, value) for name, value in kwargs.items()})
    if operation is aten.copy_.default:
        return args[0]
    return _mapped(_pretend, result) if wanted in (None, PRETEND) else result


def _check_devices(operation: Any, args: tuple, kwargs: dict) -> None:
    if operation in COPIES:
        return
    operands = args[:1] + args[2:] if operation in INDEXING else args
    tensors = [*_tensors(operands), *_tensors(tuple(kwargs.values()))]
    if any(isinstance(tensor, PretendTensor) for tensor in tensors):
        strangers = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.dim() > 0]
    else:  # only the indices are the device's
        strangers = tensors
    if strangers:
        raise DeviceMismatch(f"{operation}: {[list(tensor.shape) for tensor in strangers]} are in host memory")


def _mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """Over lists and tuples of them, too; torch's tree_map takes longer than the operations here."""
    if isinstance(values, list | tuple):
        return type(values)(_mapped(function, value) for value in values)
    return function(values)


def _tensors(values: list | tuple) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, PretendTensor) else value


def _pretend(value: Any) -> Any:
    return PretendTensor(value) if isinstance(value, torch.Tensor) else value


_backend = torch.library.Library("_", "IMPL")
_backend.fallback(run, "PrivateUse1")
_kernels = torch.library.Library("aten", "IMPL")
for _operation in (
    aten.silu_backward.default,  # without a kernel of its own a formula of several operations, which rounds differently
    aten.arange.default,  # without one resizes an empty tensor, which a wrapper cannot follow
    aten.arange.start,
    aten.arange.start_step,
):
    _kernels.impl(_operation, partial(run, _operation), "PrivateUse1")
