"""Runs compiled workers on torch's own OpenMP threads.

torch's operators and vLLM's kernels run on one OpenMP team per process, which vLLM binds to cores. Borrowing that team
through `GOMP_parallel`, the entry point compilers call for `#pragma omp parallel` (libgomp's, and libiomp5 and libomp
have it too), leaves no second pool of threads to fight over the cores.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class OpenMP(NamedTuple):
    """Addresses of `GOMP_parallel(fn, data, threads, flags)` and `GOMP_barrier()`."""

    parallel: int
    barrier: int


@cache
def find_openmp() -> OpenMP | None:
    """The OpenMP runtime torch uses, or None where torch has none with these entry points (macOS, Windows).

    The process's global symbols come first, as they do for torch itself: vLLM preloads libiomp5 there. A torch wheel
    without preload finds its bundled libgomp among libtorch_cpu's dependencies.
    """
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(torch_library)):
        try:
            library = ctypes.CDLL(name)
            functions = (library.GOMP_parallel, library.GOMP_barrier)
        except (OSError, AttributeError):
            continue
        return OpenMP(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))
    return None
