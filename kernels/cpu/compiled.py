"""Compiles the layer for one instruction set, or takes it from numba's cache on disk."""

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from numba import cfunc, types

from vllm_mcmoe.kernels.cpu import moe
from vllm_mcmoe.kernels.cpu.intrinsics import as_int64

_SIGNATURE = types.void(types.int64)


class Compiled(NamedTuple):
    """entry(address of the parameters) runs a layer without the GIL; worker: address of what each thread runs."""

    entry: Callable[[int], None]
    worker: int


@cache
def compile_layer(isa: str) -> Compiled:
    """Seconds the first time on a machine, then a fraction of one: numba caches on disk, per CPU model."""
    source = _source_digest()
    entry, worker = _entry(source), _WORKERS[isa](source)
    return Compiled(ctypes.CFUNCTYPE(None, ctypes.c_int64)(entry.address), worker.address)


def _source_digest() -> str:
    """Digest of this package's sources: numba's cache itself looks only at the file of the cached function.

    A closure variable is part of the key it caches under, which is why every function below closes over this.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _entry(source: str):
    @cfunc(_SIGNATURE, cache=True)
    def entry(address):
        source  # noqa: B018
        moe.run(as_int64(address), address)

    return entry


def _worker_vnni(source: str):
    @cfunc(_SIGNATURE, cache=True)
    def worker_vnni(address):
        source  # noqa: B018
        moe.work(as_int64(address), moe.rows_vnni)

    return worker_vnni


def _worker_portable(source: str):
    @cfunc(_SIGNATURE, cache=True)
    def worker_portable(address):
        source  # noqa: B018
        moe.work(as_int64(address), moe.rows_portable)

    return worker_portable


_WORKERS = {"avx512_vnni": _worker_vnni, "portable": _worker_portable}
