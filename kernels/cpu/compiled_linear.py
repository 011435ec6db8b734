"""Compiles linears of one width and group size for one instruction set, or takes them from numba's cache on disk.

Only what a model has is compiled, when it is loaded. Width and group size are part of the key numba caches under, as
the sources' digest is, and reach the phases and products as constants.
"""

import ctypes
from collections.abc import Callable
from functools import cache

from numba import cfunc, njit, prange

from vllm_mcmoe.kernels.cpu import amx, avx2, linear_phases, products
from vllm_mcmoe.kernels.cpu.chunks import TILE
from vllm_mcmoe.kernels.cpu.compiled import LAYER, ROWS, Compiled, source_digest
from vllm_mcmoe.kernels.cpu.intrinsics import as_int64
from vllm_mcmoe.kernels.cpu.threads import find_gomp_parallel


@cache
def compile_linear(isa: str, bits: int, group_size: int) -> Compiled:
    """Seconds the first time on a machine, then a fraction of one: numba caches on disk, per CPU model."""
    source, gomp_parallel = source_digest(), find_gomp_parallel()
    multiply_rows = _PRODUCTS[isa](source, bits, group_size)
    entry, worker = _phases(source, group_size, gomp_parallel is not None)
    return Compiled(entry, worker.address, multiply_rows.address, gomp_parallel or 0)


@cache
def _phases(source: str, group_size: int, on_torchs_threads: bool):
    """What widths have in common."""
    worker = _worker(source, group_size)
    if not on_torchs_threads:
        return _entry_on_numba_threads(source, group_size), worker
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(_entry(source).address), worker


def _entry(source: str):
    @cfunc(LAYER, cache=True)
    def linear_entry(address):
        source  # noqa: B018
        linear_phases.run(as_int64(address), address)

    return linear_entry


def _entry_on_numba_threads(source: str, group_size: int):
    @njit(LAYER, cache=True, nogil=True, parallel=True)
    def linear_entry(address):
        source  # noqa: B018
        p = as_int64(address)
        linear_phases.reset(p)
        for _ in prange(p[linear_phases.THREADS]):
            linear_phases.work(as_int64(address), group_size)

    return linear_entry


def _worker(source: str, group_size: int):
    @cfunc(LAYER, cache=True)
    def linear_worker(address):
        source  # noqa: B018
        linear_phases.work(as_int64(address), group_size)

    return linear_worker


def _products_vnni(source: str, width: int, group_size: int):
    @cfunc(ROWS, cache=True)
    def multiply_linear_rows_vnni(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        products.multiply_linear_rows_vnni(
            width, group_size, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_linear_rows_vnni


def _products_amx(source: str, width: int, group_size: int):
    if group_size % TILE:
        return _products_vnni(source, width, group_size)  # half of every tile would be empty

    @cfunc(ROWS, cache=True)
    def multiply_linear_rows_amx(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        amx.multiply_linear_rows_amx(
            width, group_size, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_linear_rows_amx


def _products_avx_vnni(source: str, width: int, group_size: int):
    @cfunc(ROWS, cache=True)
    def multiply_linear_rows_avx_vnni(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        avx2.multiply_linear_rows_avx_vnni(
            width, group_size, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_linear_rows_avx_vnni


def _products_avx2(source: str, width: int, group_size: int):
    @cfunc(ROWS, cache=True)
    def multiply_linear_rows_avx2(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        avx2.multiply_linear_rows_avx2(
            width, group_size, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_linear_rows_avx2


def _products_portable(source: str, width: int, group_size: int):
    @cfunc(ROWS, cache=True)
    def multiply_linear_rows_portable(
        bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        source  # noqa: B018
        products.multiply_linear_rows_portable(
            width, group_size, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )

    return multiply_linear_rows_portable


_PRODUCTS: dict[str, Callable] = {
    "amx": _products_amx,
    "avx512_vnni": _products_vnni,
    "avx_vnni": _products_avx_vnni,
    "avx2": _products_avx2,
    "portable": _products_portable,
}
