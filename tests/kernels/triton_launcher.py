"""Triton's own launcher on CPU tensors, for a GPU that is not there: which kernels a run would compile.

The launcher decides by itself what makes a kernel another one: the types of its arguments, constants, whether addresses
and numbers are divisible by 16. Only the driver, the compiler and the launch itself are replaced.

For processes that do not interpret: Triton decides that when a kernel is decorated.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Compiled:
    """One kernel. types: argument -> its type, "*bf16", "i32", "constexpr"; constants: constant -> value."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    num_warps: int


@dataclass
class Recorder:
    """compiled: in order, each once. launches: kernel and grid, in order."""

    compiled: list[Compiled] = field(default_factory=list)
    launches: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)


class PretendedDriver:
    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class _Kernel:
    """Where the compiled kernel would be."""

    function = packed_metadata = None

    def __init__(self, name: str, recorder: Recorder):
        self.name, self.recorder = name, recorder

    def launch_metadata(self, *arguments) -> None:
        return None

    def run(self, width: int, height: int, depth: int, *arguments) -> None:
        self.recorder.launches.append((self.name, (width, height, depth)))


@contextlib.contextmanager
def pretended_gpu(capability: int = 90) -> Iterator[Recorder]:
    """Records what is compiled and launched inside, every kernel anew. capability: 90 for sm90."""
    recorder = Recorder()
    caches: list[dict] = []

    def record(self, key, signature, device, constexprs, options, attrs, warmup):
        names = list(self.arg_names)
        constants = {names[path[0]]: value for path, value in constexprs.items()}
        compiled = Compiled(
            self.fn.__name__, tuple(signature.items()), tuple(constants.items()), num_warps=options.num_warps
        )
        recorder.compiled.append(compiled)
        kernels = self.device_caches[device][0]
        kernels[key] = _Kernel(compiled.kernel, recorder)
        caches.append(kernels)
        return kernels[key]

    before = driver._active  # asking for `active` would look for a GPU
    driver.set_active(PretendedDriver(GPUTarget("cuda", capability, 32)))
    try:
        with mock.patch.object(JITFunction, "_do_compile", record):
            yield recorder
    finally:
        driver._active = before
        for kernels in caches:
            kernels.clear()
