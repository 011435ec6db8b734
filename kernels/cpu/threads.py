"""Finds torch's own OpenMP threads, which the compiled workers run on.

torch's operators and vLLM's kernels run on one OpenMP team per process, which vLLM binds to cores. Borrowing that team
through `GOMP_parallel`, the entry point compilers call for `#pragma omp parallel` (libgomp's, and libiomp5 and libomp
have it too), leaves no second pool of threads to fight over the cores.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


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
