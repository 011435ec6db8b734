"""Time of one MoE layer on a GPU: this project's Triton kernels beside torch's and vLLM's MoE kernels.

    python benchmarks/gpu_moe.py [--shapes mixtral-8x7b ...] [--tokens 1 8 ...] [--bits 2 3] [--json FILE]
    python benchmarks/gpu_moe.py --parts                    what each kernel of a layer takes, instead of comparing
    python benchmarks/gpu_moe.py --tune tiles.json          measure tiles, then serve with VLLM_MCMOE_TILES=tiles.json
    python benchmarks/gpu_moe.py --shapes 256,8,7168,2048   experts, top-k, hidden and intermediate size of any model

Routing is uniform at random, the experts' codes cycle through --bits, where 2t is the 2-bit trellis code. The second
level cache is flushed before every run, as the other layers of a model would. "of copy" is the bytes of the experts
that the routing touches, scales included, over the time, as a share of the device's own copy bandwidth. torch's grouped
matrix product in bf16 is CUTLASS's on Hopper, with routing and activation by plain operators. vLLM's rows appear where
vLLM is installed.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from triton.testing import do_bench

from vllm_mcmoe.kernels.packing import CODES, GROUP_SIZE, Code, StoredMatrix, packed_bytes_per_group
from vllm_mcmoe.kernels.trellis import stored_matrix
from vllm_mcmoe.kernels.triton import experts as backend
from vllm_mcmoe.kernels.triton.tiles import Shape, Tiles, default_tiles, describe_device, write_table

SHAPES = {
    "mixtral-8x7b": Shape(experts=8, top_k=2, hidden_size=4096, intermediate_size=14336),
    "qwen3-30b-a3b": Shape(experts=128, top_k=8, hidden_size=2048, intermediate_size=768),
    "deepseek-v2-lite": Shape(experts=64, top_k=6, hidden_size=2048, intermediate_size=1408),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
COPY_BYTES = 1 << 30  # far beyond any cache
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def named_shape(text: str) -> str:
    """The name, or the four numbers, of a shape, which SHAPES then knows."""
    if text not in SHAPES:
        try:
            SHAPES[text] = Shape(*map(int, text.split(",")))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is none of {', '.join(SHAPES)}, nor EXPERTS,TOP_K,HIDDEN,INTERMEDIATE"
            ) from None
    return text


def short_name(code: Code) -> str:
    """2 or 2t."""
    return f"{code.bits}{'t' if code.kind == 'trellis' else ''}"


CODE_NAMES = {short_name(code): code for code in CODES}


def named_code(text: str) -> Code:
    if text not in CODE_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(CODE_NAMES)}")
    return CODE_NAMES[text]


def of_one_rank(shape: Shape, tensor_parallel: int, expert_parallel: int) -> Shape:
    """What one of several ranks computes: a slice of every expert, or some of the experts."""
    experts, intermediate = shape.experts // expert_parallel, shape.intermediate_size // tensor_parallel
    return replace(shape, experts=experts, intermediate_size=intermediate, all_experts=shape.experts)


@dataclass(frozen=True)
class Measurement:
    shape: str
    tokens: int
    kernel: str
    microseconds: float
    share_of_copy_bandwidth: float


def copy_bandwidth() -> float:
    """Bytes per second that the device reads and writes together in a plain copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def random_matrices(codes: Sequence[Code], out_features: int, in_features: int) -> Iterator[StoredMatrix]:
    """Any bytes are valid codes; scales keep the outputs finite in bfloat16."""
    groups = in_features // GROUP_SIZE
    for code in codes:
        shape = (out_features, groups, packed_bytes_per_group(code.bits))
        scales = torch.full(
            (out_features, groups), in_features**-0.5 / (1 << code.bits), dtype=torch.float16, device="cuda"
        )
        qweight = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        yield stored_matrix(code, qweight, scales)


def prepare_layer(shape: Shape, codes: Sequence[Code], activations: str) -> Callable[[Inputs], torch.Tensor]:
    of_experts = [codes[expert % len(codes)] for expert in range(shape.experts)]
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    layer = backend.TritonExperts.prepare(
        random_matrices(of_experts, 2 * intermediate, hidden),
        random_matrices(of_experts, hidden, intermediate),
        hidden_size=hidden,
        intermediate_size=intermediate,
        gate_up_codes=of_experts,
        down_codes=of_experts,
        stored_zeros=False,
        activations=activations,
    )
    local = expert_map(shape)
    return lambda inputs: layer(*inputs, local)


def random_inputs(shape: Shape, tokens: int) -> Inputs:
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden_size, device="cuda", generator=generator).bfloat16()
    everywhere = shape.all_experts or shape.experts
    scores = torch.softmax(torch.randn(tokens, everywhere, device="cuda", generator=generator), dim=-1)
    topk_weights, topk_ids = scores.topk(shape.top_k)
    return x, topk_weights, topk_ids.int()


def expert_map(shape: Shape) -> torch.Tensor | None:
    """Of the first rank, where ranks share the experts."""
    if shape.all_experts <= shape.experts:
        return None
    ids = torch.arange(shape.all_experts, dtype=torch.int32, device="cuda")
    return torch.where(ids < shape.experts, ids, -1)


def expert_bytes(shape: Shape, bits_per_weight: float, topk_ids: torch.Tensor) -> float:
    """Weight bytes of the experts that a routing touches."""
    weights = 3 * shape.hidden_size * shape.intermediate_size
    return topk_ids[topk_ids < shape.experts].unique().numel() * weights * bits_per_weight / 8


def stored_bits(codes: Sequence[Code]) -> float:
    """Average bits per weight on the device, with a float16 scale of each group."""
    return sum(code.bits + 16 / GROUP_SIZE for code in codes) / len(codes)


def microseconds(run: Callable[[], torch.Tensor]) -> float:
    """Median of a captured graph's replays, so that launches from Python cost nothing, as in vLLM's decode."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return do_bench(graph.replay, return_mode="median") * 1e3


def kernel_times(run: Callable[[], torch.Tensor], repeats: int = 20) -> dict[str, float]:
    """Microseconds on the device per kernel and call of `run`, replayed from a graph with cold caches, by name."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            flush.zero_()
            graph.replay()
        torch.cuda.synchronize()
    averages = profile.key_averages()
    return {
        e.key: e.self_device_time_total / repeats
        for e in averages
        if e.self_device_time_total and "Memset" not in e.key and "FillFunctor" not in e.key
    }


def torch_bf16(shape: Shape) -> Callable[[Inputs], torch.Tensor]:
    hidden, intermediate, experts = shape.hidden_size, shape.intermediate_size, shape.experts
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    w1 = (torch.randn(experts, 2 * intermediate, hidden, **options) * hidden**-0.5).transpose(-2, -1)
    w2 = (torch.randn(experts, hidden, intermediate, **options) * intermediate**-0.5).transpose(-2, -1)
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def run(inputs: Inputs) -> torch.Tensor:
        x, topk_weights, topk_ids = inputs
        chosen, order = topk_ids.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(experts, device="cuda", dtype=chosen.dtype), right=True).int()
        token = order // shape.top_k
        gate, up = grouped_mm(x[token], w1, offs=ends).chunk(2, dim=-1)
        out = grouped_mm(torch.nn.functional.silu(gate) * up, w2, offs=ends)
        weighted = out * topk_weights.flatten()[order, None].bfloat16()
        return torch.zeros_like(x).index_add_(0, token, weighted)

    return run


def vllm_bf16(shape: Shape) -> Callable[[Inputs], torch.Tensor]:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    w1 = torch.randn(shape.experts, 2 * intermediate, hidden, **options) * hidden**-0.5
    w2 = torch.randn(shape.experts, hidden, intermediate, **options) * intermediate**-0.5
    return lambda inputs: fused_experts(inputs[0], w1, w2, inputs[1], inputs[2])


def vllm_w4a16(shape: Shape) -> Callable[[Inputs], torch.Tensor]:
    """4 bits, symmetric, groups of 128: vLLM's Triton kernel for it."""
    from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def random(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        packed = (shape.experts, out_features, in_features // 2)
        codes = torch.randint(0, 256, packed, dtype=torch.uint8, device="cuda")
        groups = (shape.experts, out_features, in_features // GROUP_SIZE)
        return codes, torch.full(groups, in_features**-0.5 / 16, dtype=torch.bfloat16, device="cuda")

    w1, w1_scale = random(2 * shape.intermediate_size, shape.hidden_size)
    w2, w2_scale = random(shape.hidden_size, shape.intermediate_size)
    config = int4_w4a16_moe_quant_config(
        w1_scale=w1_scale, w2_scale=w2_scale, w1_zp=None, w2_zp=None, block_shape=[0, GROUP_SIZE]
    )
    return lambda inputs: fused_experts(inputs[0], w1, w2, inputs[1], inputs[2], quant_config=config)


def contenders(shape: Shape, codes: Sequence[Code]) -> Iterator[tuple[str, float, Callable[[Inputs], torch.Tensor]]]:
    """(name, stored bits per weight, layer); one at a time, so that one set of weights is on the device."""
    for activations in ("int8", "float"):
        layer = prepare_layer(shape, codes, activations)
        yield f"{'+'.join(map(short_name, codes))} bit, {activations}", stored_bits(codes), layer
        del layer
    if shape.all_experts > shape.experts:
        return  # the others take local experts' tokens alone
    yield "torch bf16", 16.0, torch_bf16(shape)
    if importlib.util.find_spec("vllm"):
        yield "vLLM bf16", 16.0, vllm_bf16(shape)
        yield "vLLM W4A16", 4 + 16 / GROUP_SIZE, vllm_w4a16(shape)


def measure_shape(name: str, tokens: Sequence[int], codes: Sequence[Code], bandwidth: float) -> list[Measurement]:
    measurements = []
    for kernel, bits_per_weight, layer in contenders(SHAPES[name], codes):
        for count in tokens:
            inputs = random_inputs(SHAPES[name], count)
            time = microseconds(lambda layer=layer, inputs=inputs: layer(inputs))
            read = expert_bytes(SHAPES[name], bits_per_weight, inputs[2])
            measurements.append(Measurement(name, count, kernel, time, read / (time * 1e-6) / bandwidth))
    return measurements


def print_measurements(console: Console, measurements: Sequence[Measurement]) -> None:
    kernels = list(dict.fromkeys(m.kernel for m in measurements))
    table = Table(title=f"{measurements[0].shape}: microseconds per layer (share of copy bandwidth)")
    for heading in ("tokens", *kernels):
        table.add_column(heading, justify="right")
    for tokens in dict.fromkeys(m.tokens for m in measurements):
        row = {m.kernel: m for m in measurements if m.tokens == tokens}
        cells = (f"{row[k].microseconds:.1f} ({row[k].share_of_copy_bandwidth:.0%})" for k in kernels)
        table.add_row(str(tokens), *cells)
    console.print(table)


def print_parts(console: Console, name: str, tokens: Sequence[int], codes: Sequence[Code], activations: str) -> None:
    layer = prepare_layer(SHAPES[name], codes, activations)
    rows = {}
    for count in tokens:
        inputs = random_inputs(SHAPES[name], count)
        rows[count] = kernel_times(lambda inputs=inputs: layer(inputs))
    kernels = list(dict.fromkeys(kernel for times in rows.values() for kernel in times))
    table = Table(title=f"{name}: microseconds by kernel")
    for heading in ("tokens", *kernels, "together"):
        table.add_column(heading, justify="right")
    for count, times in rows.items():
        cells = (f"{times[kernel]:.1f}" if kernel in times else "" for kernel in kernels)
        table.add_row(str(count), *cells, f"{sum(times.values()):.1f}")
    console.print(table)


def candidates(default: Tiles, smallest_block: int) -> Iterator[Tiles]:
    """Blocks, warps and stages with the default's split-K."""
    for block, warps, stages in product((8, 16, 32, 64, 128), (2, 4, 8), (2, 3, 4)):
        if block >= smallest_block and warps >= block // 32:
            yield replace(default, block_tokens=block, num_warps=warps, num_stages=stages)


def splits(tiles: Tiles) -> Iterator[Tiles]:
    for gate_up, down in product((1, 2, 4, 8), repeat=2):
        yield replace(tiles, gate_up_split_k=gate_up, down_split_k=down)


def fastest(layer: Callable[[Inputs], torch.Tensor], inputs: Inputs, tried: Iterator[Tiles]) -> Tiles:
    """Of the tiles that fit the device's shared memory."""
    times = {}
    for tiles in tried:
        with mock.patch.object(backend, "choose_tiles", lambda *_, tiles=tiles: tiles):
            try:
                times[tiles] = microseconds(lambda: layer(inputs))
            except backend.triton.runtime.errors.OutOfResources:
                continue
    return min(times, key=times.__getitem__)


def tune(
    console: Console, names: Sequence[str], tokens: Sequence[int], codes: Sequence[Code], activations: str, path: Path
) -> None:
    """Write the fastest tiles by shape and number of tokens: first block, warps and stages, then split-K."""
    device = describe_device(torch.device("cuda"))
    table: dict[str, dict[int, Tiles]] = {}
    for name in names:
        shape = replace(SHAPES[name], float_activations=activations == "float")
        layer = prepare_layer(shape, codes, activations)
        table[shape.key] = {}
        for count in tokens:
            inputs, default = random_inputs(shape, count), default_tiles(device, shape, count)
            best = fastest(layer, inputs, candidates(default, device.smallest_block))
            table[shape.key][count] = fastest(layer, inputs, splits(best))
            console.print(f"{name}, {count} tokens: {table[shape.key][count]}")
            write_table(path, {device.architecture: table})  # kept if a later shape is interrupted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=named_shape, default=list(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="measure one rank's slice of the experts")
    parser.add_argument("--expert-parallel-size", type=int, default=1, help="measure one rank's experts")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument(
        "--bits",
        nargs="+",
        type=named_code,
        default=(Code(2), Code(3)),
        help=f"what the experts cycle through, of {', '.join(CODE_NAMES)}",
    )
    parser.add_argument("--tune", type=Path, metavar="FILE", help="write a tile table instead of comparing")
    parser.add_argument("--parts", action="store_true", help="time by kernel instead of comparing")
    parser.add_argument("--activations", choices=("int8", "float"), default="int8", help="of --tune, --parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_moe.py needs a CUDA or ROCm device")
    for name in arguments.shapes:
        SHAPES[name] = of_one_rank(SHAPES[name], arguments.tensor_parallel_size, arguments.expert_parallel_size)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if arguments.tune:
        tune(console, arguments.shapes, arguments.tokens, arguments.bits, arguments.activations, arguments.tune)
        return
    if arguments.parts:
        for name in arguments.shapes:
            print_parts(console, name, arguments.tokens, arguments.bits, arguments.activations)
        return
    bandwidth = copy_bandwidth()
    console.print(f"{torch.cuda.get_device_name()}: copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    measurements = []
    for name in arguments.shapes:
        measured = measure_shape(name, arguments.tokens, arguments.bits, bandwidth)
        print_measurements(console, measured)
        measurements += measured
    if arguments.json:
        report = {"device": torch.cuda.get_device_name(), "copy_bandwidth": bandwidth}
        report["measurements"] = [vars(m) for m in measurements]
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
