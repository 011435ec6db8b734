"""What decoding a trellis code costs a CPU, beside scalar codes of the same width.

    python benchmarks/trellis_decode.py                                       # AVX-512 with VBMI
    python benchmarks/trellis_decode.py --isa avx512                          # AVX-512 without
    NUMBA_CPU_NAME=haswell python benchmarks/trellis_decode.py --isa avx2     # on any CPU, instructions of AVX2 alone

One thread, records that stay in its cache: instructions alone, no memory. Loops and records are the kernels'. Before
anything is timed, products of random records are compared with the code's definition, exactly.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from vllm_mcmoe.kernels.cpu.avx2 import products_avx2
from vllm_mcmoe.kernels.cpu.codes import Avx2Levels, Avx512Levels, VbmiLevels
from vllm_mcmoe.kernels.cpu.layout import ROWS, Record, expert_record, repack
from vllm_mcmoe.kernels.cpu.products import QUADS, dot_vnni, product_function, products_by
from vllm_mcmoe.kernels.packing import GROUP_SIZE, TRELLIS_WIDTHS, Code
from vllm_mcmoe.kernels.trellis import TrellisMatrix, pack_trellis

GROUPS, REPEATS = 512, 40  # records that fit in L2
PRODUCTS = {
    "vbmi": (products_by(dot_vnni), products_by(dot_vnni, VbmiLevels)),
    "avx512": (products_by(dot_vnni), products_by(dot_vnni, Avx512Levels)),
    "avx2": (products_avx2(), products_avx2(Avx2Levels)),
}


def compiled(group_products: Callable[..., list[ir.Value]], kind: Record, tokens: int, name: str):
    """run(times, record, groups, activations, tile_stride, scales, scale_stride, totals), as of product_function."""

    @intrinsic
    def product(typing_context, record, groups, activations, tile_stride, scales, scale_stride, totals):
        def emit(context, builder, signature, args):
            builder.call(product_function(builder.module, name, group_products, kind, tokens), args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), emit

    @njit
    def run(times, record, groups, activations, tile_stride, scales, scale_stride, totals):
        for _ in range(times):
            product(record, groups, activations, tile_stride, scales, scale_stride, totals)

    return run


def nanoseconds(run: Callable[..., None], kind: Record, tokens: int) -> float:
    """For 64 weights times so many tokens."""
    records = np.random.default_rng(0).integers(0, 256, kind.nbytes * GROUPS + 8192, dtype=np.uint8)
    activations, scales = np.zeros(128 * tokens * GROUPS, np.uint8), np.zeros(2 * tokens * GROUPS, np.float32)
    totals, best = np.zeros((tokens, ROWS), np.float32), np.inf
    for _ in range(10):  # the first compiles
        started = time.thread_time()
        run(
            REPEATS, records.ctypes.data, GROUPS, activations.ctypes.data, 64 * tokens, scales.ctypes.data, 8 * tokens,
            totals.ctypes.data,
        )  # fmt: skip
        best = min(best, time.thread_time() - started)
    return best / REPEATS / GROUPS / QUADS * 1e9


def check(bits: int, products: Callable[..., list[ir.Value]]) -> None:
    """One group of 16 rows. Raises AssertionError where the sum is not what the definition gives."""
    kind = expert_record(Code(bits, "trellis"), stored_zeros=False)
    codes = torch.randint(0, 1 << bits, (ROWS, GROUP_SIZE), dtype=torch.uint8)
    matrix = TrellisMatrix(bits, pack_trellis(codes, bits), torch.ones(ROWS, 1, dtype=torch.float16))
    record = torch.zeros(kind.nbytes + 8192, dtype=torch.uint8)
    repack(matrix, np.zeros(1, np.int64), record)
    activations, scales = torch.randint(-127, 128, (GROUP_SIZE,), dtype=torch.int8), np.array([1, 0], np.float32)
    totals = np.zeros((1, ROWS), np.float32)
    compiled(products, kind, 1, f"check_{bits}")(
        1, record.data_ptr(), 1, activations.data_ptr(), 64, scales.ctypes.data, 8, totals.ctypes.data
    )
    assert totals[0].tolist() == (matrix.levels().long() @ activations.long()).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--isa", choices=PRODUCTS, default="vbmi")
    scalar, trellis = PRODUCTS[parser.parse_args().isa]
    print("| tokens | bits | scalar, ns for 64 weights | trellis | scalar, GB/s of records | trellis |")
    print("|---:|---:|---:|---:|---:|---:|")
    for bits in TRELLIS_WIDTHS:
        check(bits, trellis)
    for tokens in (1, 4):
        for bits in TRELLIS_WIDTHS:
            found, rates = [], []
            for code, products in ((Code(bits), scalar), (Code(bits, "trellis"), trellis)):
                kind = expert_record(code, stored_zeros=False)
                run = compiled(products, kind, tokens, f"{code.kind}_{bits}_{tokens}")
                found.append(nanoseconds(run, kind, tokens))
                rates.append(kind.nbytes / QUADS / found[-1])
            print(
                f"| {tokens} | {bits} | {found[0]:.2f} | {found[1]:.2f} | {rates[0]:.1f} | {rates[1]:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
