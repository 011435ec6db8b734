"""One MoE layer on the CPU: ours at several widths against vLLM's own bf16 kernel, in one process.

    python benchmarks/cpu_moe.py [--shape mixtral] [--tokens 1,16,256] [--intermediate-fraction 0.25] [--json FILE]
                                 [--isa avx2 --isa portable] [--widths "2 bit,2 bit trellis" --baseline "2 bit"]

Every round calls every variant once with fresh random activations and routing, so noise of the machine falls on all
alike; medians over the rounds are printed. Every variant holds several times the last-level cache in weights and goes
round them. Bandwidth is measured in the same rounds, by summing a large tensor with all threads. A decode step should
read each weight once, so its bytes per second as a share of that bandwidth say how near it is to the limit.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

from vllm_mcmoe.kernels.cpu import ISA_VARIABLE, CpuExperts, available_isas, select_isa
from vllm_mcmoe.kernels.packing import (
    GROUP_SIZE,
    Code,
    StoredMatrix,
    middle_zero,
    packed_bytes_per_group,
)
from vllm_mcmoe.kernels.trellis import stored_matrix

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)
DECODE_TOKENS = 4
SCALAR = {"1 bit": (1,), "2 bit": (2,), "2.5 bit mix": (2, 3, 2, 3, 1, 4, 2, 3), "3 bit": (3,), "4 bit": (4,)}
TRELLIS = {f"{name} trellis": tuple(Code(width, "trellis") for width in widths) for name, widths in SCALAR.items()}
TRELLIS["2 bit mix trellis"] = tuple(Code(width, "trellis") for width in (2, 2, 3, 1, 2, 2, 3, 1))
WIDTHS = {name: tuple(map(Code, widths)) for name, widths in SCALAR.items()} | TRELLIS
CACHES_OF_WEIGHTS = 4  # least weights per variant, in sizes of the last-level cache
BASELINE = "bf16"


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = {
    "mixtral": Shape(hidden=4096, intermediate=14336, experts=8, top_k=2),  # Mixtral-8x7B
    "qwen3": Shape(hidden=2048, intermediate=768, experts=128, top_k=8),  # Qwen3-30B-A3B
}

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, topk_weights, topk_ids


@dataclass
class Variant:
    """A way to compute the layer: `layers` copies with weights of their own, and the bytes of every expert."""

    layers: list[Callable[[Call], torch.Tensor]]
    expert_bytes: list[int]


@dataclass
class Result:
    """Medians of one variant at one number of tokens."""

    shape: str
    variant: str
    tokens: int
    milliseconds: float
    spread: float  # (third quartile - first quartile) / median
    speedup: float  # median over rounds of the baseline's time / this variant's
    gbytes_per_second: float  # weights of the experts in use / time
    bandwidth_share: float  # of the bandwidth measured in the same rounds


def last_level_cache_bytes() -> int:
    """Size of the largest cache Linux reports, 64 MiB where it reports none."""
    units = {"K": 2**10, "M": 2**20}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [file.read_text().strip() for file in files]
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=64 * 2**20)


def random_matrix(code: Code, out_features: int, in_features: int, stored_zeros: bool) -> StoredMatrix:
    """Random bytes as codes: every code is equally likely."""
    groups = (out_features, in_features // GROUP_SIZE)
    qweight = torch.randint(0, 256, (*groups, packed_bytes_per_group(code.bits)), dtype=torch.uint8)
    scales = torch.full(groups, 0.01, dtype=torch.float16)
    zeros = torch.full(groups, middle_zero(code.bits), dtype=torch.float16)
    return stored_matrix(code, qweight, scales, zeros if code.has_zeros(stored_zeros) else None)


def quantised_variant(
    shape: Shape, mix: tuple[Code, ...], isa: str, stored_zeros: bool, layer_copies: int | None = None
) -> Variant:
    """layer_copies: instead of as many as hold CACHES_OF_WEIGHTS."""
    os.environ[ISA_VARIABLE] = isa
    codes = [mix[expert % len(mix)] for expert in range(shape.experts)]
    gate_up = {c: random_matrix(c, 2 * shape.intermediate, shape.hidden, stored_zeros) for c in set(codes)}
    down = {c: random_matrix(c, shape.hidden, shape.intermediate, stored_zeros) for c in set(codes)}

    def prepare() -> CpuExperts:
        return CpuExperts.prepare(
            (gate_up[code] for code in codes),
            (down[code] for code in codes),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            gate_up_codes=codes,
            down_codes=codes,
            stored_zeros=stored_zeros,
        )

    layers = [prepare()]
    sizes = [
        torch.diff(table[:, 1], append=torch.tensor([records.numel()]))
        for table, records in (
            (layers[0].gate_up_table, layers[0].gate_up),
            (layers[0].down_table, layers[0].down),
        )
    ]
    expert_bytes = (sizes[0] + sizes[1]).tolist()
    layers += [prepare() for _ in range((layer_copies or copies(sum(expert_bytes))) - 1)]
    return Variant([lambda call, layer=layer: layer(*call) for layer in layers], expert_bytes)


def copies(layer_bytes: int) -> int:
    return -(-CACHES_OF_WEIGHTS * last_level_cache_bytes() // layer_bytes)


def bf16_variant(shape: Shape) -> Variant:
    """vLLM's own kernel, with AMX where the CPU has it."""
    isa = "amx" if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else "vec"
    expert_bytes = 3 * shape.hidden * shape.intermediate * 2

    def layer() -> Callable[[Call], torch.Tensor]:
        w13 = torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16)
        w2 = torch.empty(shape.experts, shape.hidden, shape.intermediate, dtype=torch.bfloat16)
        w13 = cpu_prepack_moe_weight(w13.normal_(std=0.02), isa)
        w2 = cpu_prepack_moe_weight(w2.normal_(std=0.02), isa)

        def run(call: Call) -> torch.Tensor:
            x, topk_weights, topk_ids = call
            out = torch.empty_like(x)
            cpu_fused_moe(out, x, w13, w2, None, None, topk_weights, topk_ids, "silu", isa)
            return out

        return run

    layers = [layer() for _ in range(copies(shape.experts * expert_bytes))]
    return Variant(layers, [expert_bytes] * shape.experts)


def random_call(shape: Shape, tokens: int) -> Call:
    scores = torch.rand(tokens, shape.experts)
    weights, ids = scores.topk(shape.top_k, dim=-1)
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16)
    return x, weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


class Bandwidth:
    """Bytes per second of reading a tensor larger than the caches with torch's threads."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.data = torch.ones(4 * last_level_cache_bytes() // 8, dtype=torch.int64)

    def measure(self) -> float:
        return self.data.nbytes / seconds(self.data.sum, self.clock)


def measure(
    shape_name: str,
    shape: Shape,
    variants: dict[str, Variant],
    tokens: int,
    bandwidth: Bandwidth,
    budget: float,
    baseline: str,
) -> Iterator[Result]:
    """Rounds over all variants until `budget` seconds are spent, 5 at least."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    rates: dict[str, list[float]] = {name: [] for name in variants}
    bandwidths: list[float] = []
    start, rounds = time.perf_counter(), 0
    while rounds < 6 or time.perf_counter() - start < budget:
        for name, variant in variants.items():
            call = random_call(shape, tokens)
            used = sum(variant.expert_bytes[expert] for expert in call[2].unique().tolist())
            layer = variant.layers[rounds % len(variant.layers)]
            elapsed = seconds(lambda layer=layer, call=call: layer(call), bandwidth.clock)
            if rounds:  # the first round warms up
                times[name].append(elapsed)
                rates[name].append(used / elapsed)
        bandwidths.append(bandwidth.measure())
        rounds += 1
    for name in variants:
        low, middle, high = statistics.quantiles(times[name], n=4)
        ratios = [base / own for base, own in zip(times[baseline], times[name], strict=True)]
        rate = statistics.median(rates[name])
        yield Result(
            shape_name,
            name,
            tokens,
            milliseconds=middle * 1e3,
            spread=(high - low) / middle,
            speedup=statistics.median(ratios),
            gbytes_per_second=rate / 1e9,
            bandwidth_share=rate / statistics.median(bandwidths),
        )


def table(results: list[Result], names: list[str], baseline: str = BASELINE) -> Iterator[str]:
    """Markdown: milliseconds, speed-up over the baseline, and for decode the share of the measured bandwidth.

    Also of cpu_linear.py's results, which have the fields it shows.
    """
    yield "| tokens | " + " | ".join(names) + " |"
    yield "|---:" * (len(names) + 1) + "|"
    for tokens in sorted({result.tokens for result in results}):
        cells = []
        for result in (r for name in names for r in results if (r.tokens, r.variant) == (tokens, name)):
            cell = f"{result.milliseconds:.2f} ms"
            if result.variant != baseline:
                cell += f", {result.speedup:.1f}x"
            if tokens <= DECODE_TOKENS:
                cell += f", {result.bandwidth_share:.0%}"
            cells.append(cell)
        yield f"| {tokens} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeatable; all by default")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated")
    parser.add_argument("--intermediate-fraction", type=float, default=0.25, help="of Mixtral's intermediate size")
    parser.add_argument(
        "--widths",
        default=",".join(SCALAR),
        help=f"comma-separated, each several times the cache in memory, of: {', '.join(WIDTHS)}",
    )
    parser.add_argument("--baseline", default=BASELINE, help="of the widths, instead of bf16, which is then left out")
    parser.add_argument(
        "--isa", choices=available_isas(), action="append", help="instruction set of our kernels; repeatable"
    )
    parser.add_argument(
        "--zeros", choices=("none", "stored", "both"), default="none", help="of checkpoints in format version 2, or 1"
    )
    parser.add_argument(
        "--copies",
        type=int,
        help=f"layers of each width; by default as many as fill the cache {CACHES_OF_WEIGHTS} times",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure the thread's own time, for a machine that is busy with other things; with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="per number of tokens")
    parser.add_argument("--json", type=Path, help="write all results there")
    arguments = parser.parse_args()
    tokens = [int(text) for text in arguments.tokens.split(",")]
    isas = arguments.isa or [select_isa()]
    zeros = {"stored": (True,), "none": (False,), "both": (False, True)}[arguments.zeros]
    ours = {
        ", ".join([width, *[isa] * (len(isas) > 1), *["zeros"] * (stored and len(zeros) > 1)]): (
            WIDTHS[width],
            isa,
            stored,
        )
        for width in arguments.widths.split(",")
        for isa in isas
        for stored in zeros
    }
    baseline = arguments.baseline
    if baseline not in (BASELINE, *ours):
        parser.error(f"--baseline {baseline}: expected {BASELINE} or one of {', '.join(ours)}")
    names = [BASELINE, *ours] if baseline == BASELINE else list(ours)

    if arguments.cpu_time and torch.get_num_threads() != 1:
        parser.error("--cpu-time is that of one thread: set OMP_NUM_THREADS=1")
    bandwidth = Bandwidth(time.thread_time if arguments.cpu_time else time.perf_counter)
    gbytes = statistics.median(bandwidth.measure() for _ in range(9)) / 1e9
    print(f"{torch.get_num_threads()} threads, {'/'.join(isas)}, read bandwidth {gbytes:.1f} GB/s", flush=True)
    everything: list[Result] = []
    for name in arguments.shape or SHAPES:
        shape = SHAPES[name]
        if name == "mixtral":
            kept = int(shape.intermediate * arguments.intermediate_fraction) // GROUP_SIZE * GROUP_SIZE
            shape = Shape(shape.hidden, kept, shape.experts, shape.top_k)
        print(f"\n{name}: {shape}")
        print(f"Cells: median, speed-up over {baseline}, share of bandwidth up to {DECODE_TOKENS} tokens\n")
        variants = {BASELINE: bf16_variant(shape)} if baseline == BASELINE else {}
        variants |= {label: quantised_variant(shape, *choice, arguments.copies) for label, choice in ours.items()}
        results = [
            result
            for count in tokens
            for result in measure(name, shape, variants, count, bandwidth, arguments.seconds, baseline)
        ]
        print("\n".join(table(results, names, baseline)))
        print(
            f"\nspread (interquartile range / median): {statistics.median(r.spread for r in results):.0%}", flush=True
        )
        everything += results
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in everything], indent=1) + "\n")


if __name__ == "__main__":
    main()
