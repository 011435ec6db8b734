"""Compiles the layer for one instruction set, or takes it from numba's cache on disk."""

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from numba import cfunc, njit, prange, types

from vllm_mcmoe.kernels.cpu import amx, avx2, moe, products
from vllm_mcmoe.kernels.cpu.intrinsics import as_int64
from vllm_mcmoe.kernels.cpu.threads import find_gomp_parallel

LAYER = types.void(types.int64)
ROWS = types.void(*[types.int64] * 11)


class Compiled(NamedTuple):
    """entry(address of the parameters): runs a layer, without the GIL; the others are addresses it needs."""

    entry: Callable[[int], None]
    worker: int
    multiply_rows: int
    gomp_parallel: int  # 0 when entry brings its own threads


@cache
def compile_layer(isa: str, stored_zeros: bool) -> Compiled:
    """Seconds the first time on a machine, then a fraction of one: numba caches on disk, per CPU model.

    stored_zeros: reaches the products as a constant, as the other records of checkpoints without zeros do.
    """
    source, gomp_parallel = source_digest(), find_gomp_parallel()
    multiply_rows = _PRODUCTS[isa](source, int(stored_zeros))
    entry, worker = _phases(source, gomp_parallel is not None)
    return Compiled(entry, worker.address, multiply_rows.address, gomp_parallel or 0)


@cache
def _phases(source: str, on_torchs_threads: bool):
    """What checkpoints with zeros and without have in common."""
    worker = _worker(source)
    if not on_torchs_threads:
        return _entry_on_numba_threads(source), worker
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(_entry(source).address), worker


def source_digest() -> str:
    """Digest of this package's sources: numba's cache itself looks only at the file of the cached function.

    A closure variable is part of the key it caches under, which is why every function below closes over this.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _entry(source: str):
    @cfunc(LAYER, cache=True)
    def entry(address):
        source  # noqa: B018
        moe.run(as_int64(address), address)

    return entry


def _entry_on_numba_threads(source: str):
    @njit(LAYER, cache=True, nogil=True, parallel=True)
    def entry(address):
        source  # noqa: B018
        p = as_int64(address)
        moe.group_by_expert(p)
        threads = 0 if p[moe.BAD_ID] >= 0 else p[moe.THREADS]
        for _ in prange(threads):
            moe.work(as_int64(address))

    return entry


def _worker(source: str):
    @cfunc(LAYER, cache=True)
    def worker(address):
        source  # noqa: B018
        moe.work(as_int64(address))

    return worker


def _products_vnni(source: str, stored_zeros: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_vnni(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        products.multiply_rows_vnni(
            stored_zeros, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_rows_vnni


def _products_portable(source: str, stored_zeros: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_portable(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        products.multiply_rows_portable(
            stored_zeros, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_rows_portable


def _products_amx(source: str, stored_zeros: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_amx(bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals):
        source  # noqa: B018
        amx.multiply_rows_amx(
            stored_zeros, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_rows_amx


def _products_avx2(source: str, stored_zeros: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_avx2(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        avx2.multiply_rows_avx2(
            stored_zeros, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_rows_avx2


def _products_avx_vnni(source: str, stored_zeros: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_avx_vnni(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        avx2.multiply_rows_avx_vnni(
            stored_zeros, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_rows_avx_vnni


_PRODUCTS = {
    "amx": _products_amx,
    "avx512_vnni": _products_vnni,
    "avx_vnni": _products_avx_vnni,
    "avx2": _products_avx2,
    "portable": _products_portable,
}
