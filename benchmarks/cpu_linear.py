"""One linear on the CPU: ours at 4 and 8 bits against 16 bits and against vLLM's 4-bit operator, in one process.

    python benchmarks/cpu_linear.py [--shape qkv] [--tokens 1,8,64] [--isa portable] [--json FILE]

As cpu_moe.py: every round calls every variant with fresh random activations, medians over the rounds are printed, and
every variant goes round weights of several times the last-level cache. A round times four linears one after another, as
a decoder layer has them, so that code and threads are warm and weights are not. 16 bits are torch's linear in bfloat16,
as vLLM runs it; vLLM's operator for 4 bits is missing from its build for CPUs without AVX-512.
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
from cpu_moe import BASELINE, DECODE_TOKENS, Bandwidth, copies, seconds, table
from vllm import _custom_ops  # noqa: F401 -- loads the operators
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.scalar_type import scalar_types

from vllm_mcmoe.kernels.cpu import ISA_VARIABLE, CpuLinear, select_isa

TOKENS = (1, 8, 64)
GROUP_SIZE = 128
CALLS = 4
VLLM = "vLLM's 4 bit"
WIDTHS = {"4 bit": 4, "8 bit": 8}
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096)}  # [out, in] of Mixtral-8x7B's attention


@dataclass
class Variant:
    """A way to compute the linear: copies with weights of their own, and the bytes of one."""

    linears: list[Callable[[torch.Tensor], torch.Tensor]]
    nbytes: int


@dataclass
class Result:
    """Medians of one variant at one number of tokens."""

    shape: str
    variant: str
    tokens: int
    milliseconds: float
    spread: float  # (third quartile - first quartile) / median
    speedup: float  # median over rounds of bf16's time / this variant's
    bandwidth_share: float  # weights / time, of the bandwidth measured in the same rounds


def random_weight(bits: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes as codes, and scales: pack-quantized."""
    packed = torch.randint(-(2**31), 2**31, (shape[0], shape[1] * bits // 32)).to(torch.int32)
    return packed, torch.full((shape[0], shape[1] // GROUP_SIZE), 0.01, dtype=torch.bfloat16)


def our_variant(shape: tuple[int, int], bits: int) -> Variant:
    weight = random_weight(bits, shape)
    first = CpuLinear.prepare(*weight, bits=bits)
    rest = (CpuLinear.prepare(*weight, bits=bits) for _ in range(copies(first.records.nbytes) - 1))
    return Variant([first, *rest], first.records.nbytes)


def bf16_variant(shape: tuple[int, int]) -> Variant:
    def linear() -> Callable[[torch.Tensor], torch.Tensor]:
        weight = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        return lambda x: torch.nn.functional.linear(x, weight)

    nbytes = 2 * shape[0] * shape[1]
    return Variant([linear() for _ in range(copies(nbytes))], nbytes)


def vllm_variant(shape: tuple[int, int]) -> Variant:
    """vLLM's kernel class with what its compressed-tensors scheme would give it."""
    config = MPLinearLayerConfig(
        full_weight_shape=shape[::-1],
        partition_weight_shape=shape[::-1],
        weight_type=scalar_types.uint4b8,
        act_type=torch.bfloat16,
        group_size=GROUP_SIZE,
        zero_points=False,
    )

    def linear() -> Callable[[torch.Tensor], torch.Tensor]:
        kernel = CPUWNA16LinearKernel(config, "weight_packed", "weight_scale", "weight_zero_point")
        layer = torch.nn.Module()
        packed, scales = (torch.nn.Parameter(tensor, requires_grad=False) for tensor in random_weight(4, shape))
        packed.input_dim = packed.packed_dim = 1
        packed.output_dim = scales.output_dim = 0
        layer.weight_packed, layer.weight_scale, layer.bias = packed, scales, None
        kernel.process_weights_after_loading(layer)
        return lambda x: kernel.apply_weights(layer, x)

    packed, scales = random_weight(4, shape)
    nbytes = packed.nbytes + scales.nbytes
    return Variant([linear() for _ in range(copies(nbytes))], nbytes)


def measure(
    shape_name: str, variants: dict[str, Variant], tokens: int, bandwidth: Bandwidth, budget: float
) -> Iterator[Result]:
    """Rounds over all variants until `budget` seconds are spent, 5 at least."""
    inputs = SHAPES[shape_name][1]
    times: dict[str, list[float]] = {name: [] for name in variants}
    bandwidths: list[float] = []
    start, rounds = time.perf_counter(), 0
    while rounds < 6 or time.perf_counter() - start < budget:
        for name, variant in variants.items():
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
            first = rounds * CALLS
            linears = [variant.linears[i % len(variant.linears)] for i in range(first, first + CALLS)]
            elapsed = seconds(lambda linears=linears, x=x: [linear(x) for linear in linears])
            if rounds:  # the first round warms up
                times[name].append(elapsed / CALLS)
        bandwidths.append(bandwidth.measure())
        rounds += 1
    for name, variant in variants.items():
        low, middle, high = statistics.quantiles(times[name], n=4)
        ratios = [base / own for base, own in zip(times[BASELINE], times[name], strict=True)]
        yield Result(
            shape_name,
            name,
            tokens,
            milliseconds=middle * 1e3,
            spread=(high - low) / middle,
            speedup=statistics.median(ratios),
            bandwidth_share=variant.nbytes / middle / statistics.median(bandwidths),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeatable; all by default")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated")
    parser.add_argument("--isa", help="instruction set of ours; the best by default")
    parser.add_argument("--seconds", type=float, default=5.0, help="per number of tokens")
    parser.add_argument("--json", type=Path, help="write all results there")
    arguments = parser.parse_args()
    if arguments.isa:
        os.environ[ISA_VARIABLE] = arguments.isa

    bandwidth = Bandwidth()
    gbytes = statistics.median(bandwidth.measure() for _ in range(9)) / 1e9
    print(f"{torch.get_num_threads()} threads, read bandwidth {gbytes:.1f} GB/s, {select_isa()}", flush=True)
    everything: list[Result] = []
    for name in arguments.shape or SHAPES:
        shape = SHAPES[name]
        print(f"\n{name}: {list(shape)}")
        print(f"Cells: median, speed-up over bf16, share of bandwidth up to {DECODE_TOKENS} tokens\n")
        variants = {BASELINE: bf16_variant(shape)}
        variants |= {label: our_variant(shape, bits) for label, bits in WIDTHS.items()}
        if hasattr(torch.ops._C, "cpu_gemm_wna16"):
            variants[VLLM] = vllm_variant(shape)
        results = [
            result
            for text in arguments.tokens.split(",")
            for result in measure(name, variants, int(text), bandwidth, arguments.seconds)
        ]
        print("\n".join(table(results, list(variants))))
        print(
            f"\nspread (interquartile range / median): {statistics.median(r.spread for r in results):.0%}", flush=True
        )
        everything += results
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in everything], indent=1) + "\n")


if __name__ == "__main__":
    main()
