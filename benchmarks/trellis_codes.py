"""Which trellis code: squared errors of unit Gaussians, and where the tables of kernels/trellis.py come from.

    python benchmarks/trellis_codes.py                  # the codes that were compared, in docs/trellis.md
    python benchmarks/trellis_codes.py --rings 8 16 32 128
    python benchmarks/trellis_codes.py --tables         # make the tables again, and compare
    python benchmarks/trellis_codes.py --time 1024 2048 # how long a matrix takes, beside scalar codes

A code is described by how many of a weight's bits are coded, how many earlier coded bits a window holds besides
("memory": 2**memory states), and how many weights make a ring. Every combination of window and uncoded bits has a level
of its own; flipping all bits negates it. Tables are found by Lloyd's algorithm (codes by Viterbi's, levels by their
means) from many beginnings: levels of a scalar code with one bit more, shared out to windows by random parities of
their bits, as Ungerboeck's set partitioning does.
"""

import argparse
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from numba import njit
from scipy.stats import norm

from vllm_mcmoe.calibration.matrix.gptq import HessianFactor, quantize_gptq
from vllm_mcmoe.calibration.matrix.two_sided import COUPLED_ROWS, OutputHessian
from vllm_mcmoe.calibration.measure.expert_errors import SQUARED_ERROR
from vllm_mcmoe.calibration.recipes import RECIPES
from vllm_mcmoe.kernels.trellis import LARGEST_LEVEL, MEMORY, RING, TRELLIS_WIDTHS, level_table, middle_level

LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}  # of scalar codes with the best levels
FIRST_STEPS, LAST_STEPS = 6, 25


@dataclass(frozen=True)
class Code:
    """An entry of the table is, from the low bits up: the weight's newest coded bits, its uncoded bits, older coded
    bits, the most recent lowest."""

    bits: int
    coded: int = 1
    memory: int = MEMORY
    ring: int = RING

    @property
    def entries(self) -> int:
        return 1 << (self.bits + self.memory)

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every entry: all its coded bits, and its uncoded ones."""
        entries = np.arange(self.entries)
        own = entries & ((1 << self.bits) - 1)
        return own & ((1 << self.coded) - 1) | entries >> self.bits << self.coded, own >> self.coded


@njit(cache=True, fastmath=True)
def _nearest_codes(x, levels, bits, coded, memory, found):
    """x, found: [rings, weights]. Entries of (nearly) least squared error, which is returned: every ring is walked
    twice with loose ends, and once more from its middle to its middle, as it was passed then."""
    rings, weights = x.shape
    states, own = 1 << memory, 1 << bits
    cost, extended = np.empty(states, np.float32), np.empty(states, np.float32)
    steps = np.empty((2 * weights, states), np.int32)
    total = 0.0
    for ring in range(rings):
        start, state = -1, 0
        for walk in range(2):
            length = (2 - walk) * weights
            for s in range(states):
                cost[s] = 0.0 if walk == 0 or s == start else 1e30
            for t in range(length):
                extended[:] = 1e30
                value = x[ring, (t + walk * (weights // 2)) % weights]
                for s in range(states):
                    for code in range(own):
                        entry = s << bits | code
                        error = value - levels[entry]
                        into = (s << coded | code & ((1 << coded) - 1)) & (states - 1)
                        if cost[s] + error * error < extended[into]:
                            extended[into], steps[t, into] = cost[s] + error * error, entry
                cost, extended = extended, cost
            state = start
            if walk == 0:
                state = 0
                for s in range(states):
                    if cost[s] < cost[state]:
                        state = s
            else:
                total += cost[start]
            for t in range(length - 1, -1, -1):
                entry = steps[t, state]
                state = entry >> bits
                if walk == 0 and t == weights + weights // 2:
                    start = state
                elif walk == 1:
                    found[ring, (t + weights // 2) % weights] = entry
    return total / x.size


def gaussians(seed: int, rings: int, code: Code) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rings, code.ring)).astype(np.float32)


def squared_error(code: Code, levels: np.ndarray, x: np.ndarray) -> float:
    return _nearest_codes(x, levels.astype(np.float32), code.bits, code.coded, code.memory, np.empty(x.shape, np.int32))


def _lloyd(code: Code, levels: np.ndarray, x: np.ndarray, steps: int) -> tuple[float, np.ndarray]:
    """The squared error before the last step, and the levels after it."""
    found, half = np.empty(x.shape, np.int32), code.entries // 2
    symmetric = np.vstack([np.eye(half), -np.eye(half)[::-1]])  # levels of the first half -> all of them
    for _ in range(steps):
        error = _nearest_codes(x, levels.astype(np.float32), code.bits, code.coded, code.memory, found)
        counts = np.bincount(found.ravel(), minlength=code.entries).astype(float)
        sums = np.bincount(found.ravel(), x.ravel(), minlength=code.entries)
        curvature = symmetric.T @ (counts[:, None] * symmetric) + 1e-6 * np.eye(half)
        levels = symmetric @ np.linalg.solve(curvature, symmetric.T @ sums)
    return error, levels


def _beginning(code: Code, random: np.random.Generator) -> np.ndarray:
    parities = random.integers(1, 1 << (code.coded + code.memory), code.coded + 1)
    finer = norm.ppf((np.arange(2 << code.bits) + 0.5) / (2 << code.bits))
    finer = np.sign(finer) * np.abs(finer) ** 0.9
    coded, uncoded = code.parts()
    subset = sum(np.array([(int(c) & int(p)).bit_count() & 1 for c in coded]) << i for i, p in enumerate(parities))
    return finer[uncoded << (code.coded + 1) | subset]


def trained(code: Code, tries: int | None, finals: int) -> tuple[float, np.ndarray]:
    """Squared error and levels: the best of so many beginnings, of which the most promising are trained to the end.

    tries: None for as many as the tables of kernels/trellis.py are of
    """
    tries = tries or (150 if code.bits < 4 else 50)
    random, x = np.random.default_rng(0), gaussians(5, 8000 // code.ring, code)
    begun = [_lloyd(code, _beginning(code, random), x, FIRST_STEPS) for _ in range(tries)]
    begun.sort(key=lambda error_and_levels: error_and_levels[0])
    x, unseen = gaussians(0, max(100, 24000 // code.ring), code), gaussians(99, max(200, 100000 // code.ring), code)
    best = (np.inf, np.empty(0))
    for _, levels in begun[:finals]:
        _, levels = _lloyd(code, levels, x, LAST_STEPS)
        error = squared_error(code, levels, unseen)
        if error < best[0]:
            best = error, levels
    return best


def integer_table(code: Code, levels: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Squared error, levels per standard deviation, and the levels around 0 rounded to steps of 1: the best size of a
    step for the range that kernels have."""
    unseen, middle = gaussians(1234, 30000, code), middle_level(code.bits)
    best = (np.inf, 0.0, levels)
    for step in np.linspace(0.8, 1.1, 16) * np.abs(levels).max() / middle:
        rounded = np.clip(np.round(levels / step - 0.5) + 0.5, -middle, middle)
        error = squared_error(code, rounded * step, unseen)
        if error < best[0]:
            best = error, 1 / step, rounded
    return best


def as_defined(code: Code, rounded: np.ndarray) -> np.ndarray:
    """By window + 16 * uncoded bits, a window's oldest bit the lowest, as kernels/trellis.py has it: uint8."""
    coded, uncoded = code.parts()
    window = sum((coded >> age & 1) << (code.memory - age) for age in range(code.memory + 1))
    table = np.empty(code.entries, np.uint8)
    table[window + (uncoded << (code.memory + 1))] = rounded + middle_level(code.bits)
    return table


def _show_tables(options: argparse.Namespace) -> None:
    for bits in options.bits:
        code = Code(bits)
        error, per_deviation, rounded = integer_table(code, trained(code, options.tries, options.finals)[1])
        table = as_defined(code, rounded)
        same = np.array_equal(table, level_table(bits).numpy())
        print(
            f"{bits} bits: squared error {error:.5f}, {per_deviation:.2f} levels per standard deviation, largest "
            f"{LARGEST_LEVEL[bits]}, {'as in' if same else 'not as in'} kernels/trellis.py:\n"
            f"    {tuple(table[: len(table) // 2].tolist())}",
            flush=True,
        )


def _show_codes(options: argparse.Namespace) -> None:
    print("| bits | coded | states | entries | ring | squared error | of Lloyd-Max | bits gained |")
    print("|---|---|---|---|---|---|---|---|")
    for bits in options.bits:
        even = SQUARED_ERROR["scalar"][bits]
        print(f"| {bits} | - | - | {1 << bits} | - | {LLOYD_MAX[bits]:.4g}, even {even:.4g} | | |")
        codes = [Code(bits, memory=memory) for memory in options.memories]
        codes += [Code(bits, coded=2, memory=memory) for memory in (2, 4) if bits > 1]
        for code in (replace(code, ring=ring) for code in codes for ring in options.rings):
            error, _ = trained(code, options.tries, options.finals)
            share = error / LLOYD_MAX[bits]
            print(
                f"| {bits} | {code.coded} | {1 << code.memory} | {code.entries} | {code.ring} | {error:.5f} | "
                f"{share:.2f} | {-np.log2(share) / 2:.2f} |",
                flush=True,
            )


def _show_times(options: argparse.Namespace) -> None:
    """Of one thread: GPTQ and the default recipe's sweeps, a group's rows coupled in blocks of 512."""
    rows, columns = options.time
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight, inputs = torch.randn(rows, columns), torch.randn(2 * columns, columns) @ torch.randn(columns, columns)
    outputs = _coupled_outputs(rows)
    for bits in options.bits:
        seconds = {}
        for codes in ("scalar", "trellis"):
            gptq = replace(RECIPES["mcmoe"].gptq, codes=codes)
            factor = HessianFactor.build(inputs.t() @ inputs, gptq)
            quantize_gptq(weight[:64], factor, bits, gptq, outputs=_coupled_outputs(64))  # compiles, or reads what is
            started = time.thread_time()
            quantize_gptq(weight, factor, bits, gptq, outputs=outputs)
            seconds[codes] = time.thread_time() - started
        print(
            f"{bits} bits, {rows} x {columns}: "
            + ", ".join(f"{codes} {1e6 * s / weight.numel():.2f} us a weight" for codes, s in seconds.items())
            + f", {seconds['trellis'] / seconds['scalar']:.2f} times as long",
            flush=True,
        )


def _coupled_outputs(rows: int) -> OutputHessian:
    gradients = torch.randn(2 * COUPLED_ROWS, rows) @ torch.randn(rows, rows)
    blocks = torch.arange(rows).split(COUPLED_ROWS)
    moments = [gradients[:, block].t() @ gradients[:, block] for block in blocks]
    return OutputHessian.build(blocks, moments, len(gradients))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", action="store_true", help="make the tables of kernels/trellis.py again")
    parser.add_argument("--time", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of a matrix, to quantise it")
    parser.add_argument("--bits", type=int, nargs="+", choices=TRELLIS_WIDTHS, default=list(TRELLIS_WIDTHS))
    parser.add_argument("--memories", type=int, nargs="+", default=[2, 3, 4], help="log2 of the number of states")
    parser.add_argument("--rings", type=int, nargs="+", default=[RING], help="weights of a ring")
    parser.add_argument("--tries", type=int, help="beginnings; 150, at 4 bits 50")
    parser.add_argument("--finals", type=int, default=8, help="of them that are trained to the end")
    options = parser.parse_args()
    (_show_tables if options.tables else _show_times if options.time else _show_codes)(options)


if __name__ == "__main__":
    main()
