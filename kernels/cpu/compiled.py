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
from vllm_mcmoe.kernels.cpu.layout import TRELLIS
from vllm_mcmoe.kernels.cpu.threads import find_gomp_parallel

LAYER = types.void(types.int64)
ROWS = types.void(*[types.int64] * 11)


class Compiled(NamedTuple):
    """entry(address of the parameters): runs a layer, without the GIL; the others are addresses it needs."""

    entry: Callable[[int], None]
    worker: int
    multiply_rows: int  # of experts that of `kept`
    gomp_parallel: int  # 0 when entry brings its own threads
    kept: ctypes.Array | None = None  # addresses of the products of scalar and of trellis codes, 0 for none


@cache
def compile_layer(isa: str, families: tuple[int, ...]) -> Compiled:
    """Seconds the first time on a machine, then a fraction of one: numba caches on disk, per CPU model.

    families: layout.py's, of the layer's experts. Each reaches the products as a constant: only what a model has is
    compiled.
    """
    source, gomp_parallel = source_digest(), find_gomp_parallel()
    addresses = (ctypes.c_int64 * 2)()
    for family in families:
        addresses[int(family >= TRELLIS)] = _products(isa, source, family).address
    entry, worker = _phases(source, gomp_parallel is not None)
    return Compiled(entry, worker.address, ctypes.addressof(addresses), gomp_parallel or 0, addresses)


@cache
def _products(isa: str, source: str, family: int):
    """Layers differ in which families they have together: each is loaded once."""
    return _PRODUCTS[isa](source, family)


@cache
def _phases(source: str, on_torchs_threads: bool):
    """What all families have in common."""
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


def _products_vnni(source: str, family: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_vnni(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        if family >= TRELLIS:  # a constant: numba leaves the other branch out
            products.multiply_trellis_rows_vnni(
                family, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
            )
        else:
            products.multiply_rows_vnni(
                family, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
            )

    return multiply_rows_vnni


def _products_portable(source: str, family: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_portable(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        if family >= TRELLIS:
            products.multiply_trellis_rows_portable(
                family, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
            )
        else:
            products.multiply_rows_portable(
                family, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
            )

    return multiply_rows_portable


def _products_amx(source: str, family: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_amx(bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals):
        source  # noqa: B018
        amx.multiply_rows_amx(
            family, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_rows_amx


def _products_avx2(source: str, family: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_avx2(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        avx2.multiply_rows_avx2(
            family, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_rows_avx2


def _products_avx_vnni(source: str, family: int):
    @cfunc(ROWS, cache=True)
    def multiply_rows_avx_vnni(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        avx2.multiply_rows_avx_vnni(
            family, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_rows_avx_vnni


_PRODUCTS = {
    "amx": _products_amx,
    "avx512_vnni": _products_vnni,
    "avx_vnni": _products_avx_vnni,
    "avx2": _products_avx2,
    "portable": _products_portable,
}
