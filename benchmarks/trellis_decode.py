"""What decoding a trellis code costs a CPU, beside scalar codes of the same width.

    python benchmarks/trellis_decode.py                                       # AVX-512 with VBMI
    NUMBA_CPU_NAME=haswell python benchmarks/trellis_decode.py --isa avx2     # on any CPU, instructions of AVX2 alone

One thread, records that stay in its cache: instructions alone, no memory. The loops are those of
`kernels/cpu/products.py`, the records those of `kernels/cpu/layout.py` as they are; only a quad's bytes come from a
table. Before anything is timed, products of random records are compared with the code's definition, exactly.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from vllm_mcmoe.kernels.cpu import avx2
from vllm_mcmoe.kernels.cpu.intrinsics import I8, I32
from vllm_mcmoe.kernels.cpu.layout import ROWS, Record, _plane_mover, expert_record
from vllm_mcmoe.kernels.cpu.products import QUADS, VECTOR_BYTES, Codes, _sum, dot_vnni, product_function, products_by
from vllm_mcmoe.kernels.cpu.vectors import VI32, call, constant, load, splat
from vllm_mcmoe.kernels.packing import GROUP_SIZE
from vllm_mcmoe.kernels.trellis import (
    LARGEST_LEVEL,
    MEMORY,
    TRELLIS_WIDTHS,
    decode,
    level_table,
    pack_trellis,
    trellis_planes,
)

BYTES = ir.VectorType(I8, 64)
GROUPS, REPEATS = 512, 40  # records that fit in L2


class _Levels:
    """The levels of one group of 16 rows, quad by quad, as products.Codes has codes."""

    def __init__(self, builder: ir.IRBuilder, bits: int, record: ir.Value):
        self.builder, self.bits, self.record, self.loaded = builder, bits, record, {}
        self.uncoded, start = [], GROUP_SIZE * ROWS // 8  # bits and first byte of each plane
        for width in trellis_planes(bits)[1:]:
            self.uncoded.append((width, start))
            start += width * GROUP_SIZE * ROWS // 8
        self.entries = level_table(bits).tolist()

    def _plane(self, start: int, quad: int, per_vector: int) -> ir.Value:
        """The vector of a plane that has the quad."""
        address = start + quad // per_vector * VECTOR_BYTES
        if address not in self.loaded:
            self.loaded[address] = load(self.builder, VI32, self.record, address)
        return self.loaded[address]

    def _moved(self, vector: ir.Value, position: int, wanted: int) -> ir.Value:
        shift = self.builder.shl if wanted > position else self.builder.lshr
        return shift(vector, constant(VI32, abs(wanted - position))) if wanted != position else vector

    def _rotated(self, quad: int) -> ir.Value:
        """Windows in the low four bits of every byte."""
        coded = self._plane(0, quad, 8)
        return call(self.builder, "llvm.fshr.v16i32", VI32, coded, coded, constant(VI32, quad % 8))


class _Vbmi(_Levels):
    """One look-up in 64 entries or in 128."""

    def quad(self, quad: int) -> ir.Value:
        builder, index, filled = self.builder, self._rotated(quad), MEMORY + 1
        for width, start in self.uncoded:
            field = self._moved(self._plane(start, quad, 8 // width), quad % (8 // width) * width, filled)
            below = constant(VI32, ((1 << filled) - 1) * 0x01010101)
            index = builder.or_(builder.and_(index, below), builder.and_(field, builder.not_(below)))
            filled += width
        entries = self.entries * max(1, 64 // len(self.entries))  # vpermb looks at 6 bits of an index
        low, *high = (ir.Constant(BYTES, entries[i : i + 64]) for i in range(0, len(entries), 64))
        index = builder.bitcast(index, BYTES)
        if high:
            levels = call(builder, "llvm.x86.avx512.vpermi2var.qi.512", BYTES, low, index, *high)
        else:
            levels = call(builder, "llvm.x86.avx512.permvar.qi.512", BYTES, low, index)
        return builder.bitcast(levels, VI32)


class _Avx2(_Levels):
    """Look-ups in 16 entries, among which uncoded bits choose as the signs of bytes; the highest of them mirrors, so
    that half of the table is enough. Two registers are one vector."""

    def quad(self, quad: int) -> ir.Value:
        builder = self.builder
        windows = self._plane(0, quad, 8)
        windows = self._moved(windows, quad % 8, 0) if quad % 8 <= 8 - MEMORY - 1 else self._rotated(quad)
        signs = [
            self._moved(self._plane(start, quad, 8 // width), position, 7)
            for width, start in self.uncoded
            for position in range(quad % (8 // width) * width, quad % (8 // width) * width + width)
        ]
        mirrored = None
        if signs:
            negative = builder.icmp_signed("<", builder.bitcast(signs.pop(), BYTES), ir.Constant(BYTES, [0] * 64))
            mirrored = builder.bitcast(builder.sext(negative, BYTES), VI32)
            windows = builder.xor(windows, mirrored)
        windows = builder.and_(windows, constant(VI32, 0x0F0F0F0F))
        signs = [avx2._halves(builder, builder.xor(sign, mirrored), avx2.V32X8) for sign in signs]
        half_table = self.entries[: max(16, len(self.entries) // 2)]
        halves = []
        for half, index in enumerate(avx2._halves(builder, windows, avx2.V32X8)):
            found = [
                call(builder, "llvm.x86.avx2.pshuf.b", avx2.V32X8, ir.Constant(avx2.V32X8, 2 * entries), index)
                for entries in (half_table[i : i + 16] for i in range(0, len(half_table), 16))
            ]
            for sign in signs:  # of the lowest bit first: neighbours differ in it
                pairs = zip(found[::2], found[1::2], strict=True)
                found = [call(builder, "llvm.x86.avx2.pblendvb", avx2.V32X8, *pair, sign[half]) for pair in pairs]
            halves.append(found[0])
        levels = builder.bitcast(avx2._join(builder, *halves), VI32)
        if mirrored is None:
            return levels
        return builder.xor(levels, builder.and_(mirrored, constant(VI32, LARGEST_LEVEL[self.bits] * 0x01010101)))


def trellis_vbmi(builder, kind: Record, record, activations, tokens: int, tile_stride) -> list[ir.Value]:
    levels, chains = _Vbmi(builder, kind.bits, record), max(1, 4 // tokens)
    totals = [[constant(VI32, 0)] * chains for _ in range(tokens)]
    for quad in range(QUADS):
        weights = levels.quad(quad)
        for sums, inputs in zip(totals, _inputs(builder, quad, activations, tokens, tile_stride), strict=True):
            sums[quad % chains] = dot_vnni(builder, sums[quad % chains], weights, inputs)
    return [_sum(builder, sums) for sums in totals]


def trellis_avx2(builder, kind: Record, record, activations, tokens: int, tile_stride) -> list[ir.Value]:
    levels, fitting = _Avx2(builder, kind.bits, record), avx2.INT16_MAX // (2 * 127 * LARGEST_LEVEL[kind.bits])
    totals, sums = [constant(VI32, 0)] * tokens, [None] * tokens
    for quad in range(QUADS):
        weights = levels.quad(quad)
        for token, inputs in enumerate(_inputs(builder, quad, activations, tokens, tile_stride)):
            product = avx2._multiply_add_bytes(builder, weights, inputs)
            sums[token] = product if sums[token] is None else builder.add(sums[token], product)
            if quad % fitting == fitting - 1:
                totals[token] = builder.add(totals[token], avx2._widen(builder, sums[token]))
                sums[token] = None
    return totals


def _inputs(builder, quad: int, activations, tokens: int, tile_stride) -> list[ir.Value]:
    """A quad's activations, of each token."""
    base = activations if quad < QUADS // 2 else builder.add(activations, tile_stride)
    return [splat(builder, load(builder, I32, base, token * 64 + quad % (QUADS // 2) * 4)) for token in range(tokens)]


def scalar_avx2(builder, kind: Record, record, activations, tokens: int, tile_stride) -> list[ir.Value]:
    codes_from = partial(Codes, builder, kind, record)
    return avx2.sums_avx2(builder, kind.bits, GROUP_SIZE, codes_from, activations, tokens, tile_stride)


PRODUCTS = {"vbmi": (products_by(dot_vnni), trellis_vbmi), "avx2": (scalar_avx2, trellis_avx2)}


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
    kind = expert_record(bits, stored_zeros=False)
    codes = torch.randint(0, 1 << bits, (ROWS, GROUP_SIZE), dtype=torch.uint8)
    words, start = pack_trellis(codes, bits).numpy().view(np.uint32), 0
    lanes = np.empty((1, 1, words.shape[2], ROWS), np.uint32)
    for width in trellis_planes(bits):
        _plane_mover(width)(words, np.zeros(1, np.int64), start, 4 * width, lanes)
        start += 4 * width
    record = np.zeros(kind.nbytes + 8192, np.uint8)
    record[: kind.nbytes] = np.concatenate([lanes.view(np.uint8).ravel(), np.ones(ROWS, np.float16).view(np.uint8)])
    activations, scales = torch.randint(-127, 128, (GROUP_SIZE,), dtype=torch.int8), np.array([1, 0], np.float32)
    totals = np.zeros((1, ROWS), np.float32)
    compiled(products, kind, 1, f"check_{bits}")(
        1, record.ctypes.data, 1, activations.data_ptr(), 64, scales.ctypes.data, 8, totals.ctypes.data
    )
    assert totals[0].tolist() == (decode(codes, bits).long() @ activations.long()).tolist()


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
            kind = expert_record(bits, stored_zeros=False)
            found = [
                nanoseconds(compiled(products, kind, tokens, f"{name}_{bits}_{tokens}"), kind, tokens)
                for name, products in (("scalar", scalar), ("trellis", trellis))
            ]
            rates = [kind.nbytes / QUADS / ns for ns in found]
            print(
                f"| {tokens} | {bits} | {found[0]:.2f} | {found[1]:.2f} | {rates[0]:.1f} | {rates[1]:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
