"""Finds torch's own OpenMP threads, which the compiled workers run on, and makes Python threads beside them.

torch's operators and vLLM's kernels run on one OpenMP team per process, which vLLM binds to cores. Borrowing that team
through `GOMP_parallel`, the entry point compilers call for `#pragma omp parallel` (libgomp's, and libiomp5 and libomp
have it too), leaves no second pool of threads to fight over the cores.
"""

import ctypes
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_TEAM_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # what GOMP_parallel runs on every thread


@cache
def find_gomp_parallel() -> int | None:
    """Address of `GOMP_parallel(fn, data, threads, flags)` in the OpenMP runtime torch uses, None where there is none.

    The process's global symbols come first, as they do for torch itself: vLLM preloads libiomp5 there. A torch wheel
    without preload finds its bundled libgomp among libtorch_cpu's dependencies.
    """
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(torch_library)):
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    logger.warning("torch has no OpenMP runtime with GOMP_parallel here: the CPU kernels use numba's own threads")
    return None


def team_cpus() -> set[int]:
    """The CPUs that the threads of torch's team may run on."""
    cpus = set(os.sched_getaffinity(0))
    gomp_parallel = find_gomp_parallel()
    if gomp_parallel is not None:

        @_TEAM_FUNCTION
        def visit(_data: int | None) -> None:
            cpus.update(os.sched_getaffinity(0))

        ctypes.CFUNCTYPE(None, _TEAM_FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(gomp_parallel)(
            visit, None, torch.get_num_threads(), 0
        )
    return cpus


def thread_pool() -> ThreadPoolExecutor:
    """As many threads as torch has, on the CPUs of its team, for work that releases the GIL.

    A thread inherits the CPUs of the one that starts it, and vLLM binds that one, the first of the team, to one core:
    left alone, all threads of a pool would share it.
    """
    if not hasattr(os, "sched_setaffinity"):  # not Linux: nobody binds threads
        return ThreadPoolExecutor(torch.get_num_threads())
    return ThreadPoolExecutor(torch.get_num_threads(), initializer=os.sched_setaffinity, initargs=(0, team_cpus()))
