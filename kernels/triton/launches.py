"""The launches of one layer: their arguments, grids and memory. Shapes alone decide all of them."""

from collections.abc import Callable

import torch
import triton

from vllm_mcmoe.kernels.expert_function import ExpertFunction
from vllm_mcmoe.kernels.triton.gemm import BLOCKS_PER_GROUP, SUMMED_ROWS, grouped_gemm_kernel
from vllm_mcmoe.kernels.triton.layout import ExpertStack
from vllm_mcmoe.kernels.triton.prepare import LARGEST_BLOCK, prepare_kernel
from vllm_mcmoe.kernels.triton.quantize import GROUPS_PER_PROGRAM
from vllm_mcmoe.kernels.triton.routing import (
    CHUNK,
    COMBINE_BLOCK,
    COMBINE_ROWS,
    FEW_SLOTS,
    SMALLEST_HISTOGRAM,
    block_capacity,
    combine_kernel,
)
from vllm_mcmoe.kernels.triton.tiles import Tiles, describe_device

# a kernel, its grid, its arguments; by keyword what it is compiled for
Launch = Callable[..., None]


def run_kernel(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments, **constants) -> None:
    kernel[grid](*arguments, **constants)


def compile_kernel(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments, **constants) -> None:
    """What a launch would run, compiled and kept, as far as it is not."""
    kernel.warmup(*arguments, grid=grid, **constants)


FEW_TOKENS = 4  # more of them than this have more partial sums than one program per tile should add up


class Activations:
    """Rows as matrix operands: int8 or float16 [rows, features], scale and sum float32 [rows, features/128]."""

    def __init__(self, rows: int, features: int, dtype: torch.dtype, device: torch.device):
        self.values = torch.empty(rows, features, dtype=dtype, device=device)
        self.scales = torch.empty(rows, features // 128, dtype=torch.float32, device=device)
        self.sums = torch.empty_like(self.scales)

    @property
    def is_float(self) -> bool:
        return self.values.dtype == torch.float16


def are_few(tokens: int, top_k: int) -> bool:
    """Whether blocks are so few that the down projection itself adds up the experts of each token."""
    return tokens <= FEW_TOKENS and tokens * top_k <= FEW_SLOTS


class Routing:
    """Which expert computes which slots: the arguments that the kernels about slots share, and what they write."""

    def __init__(
        self, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None,
        experts: int, block_tokens: int,
    ):  # fmt: skip
        self.weights, self.ids = topk_weights, topk_ids
        tokens, self.top_k = topk_ids.shape
        self.slots, self.experts, self.block_tokens = tokens * self.top_k, experts, block_tokens
        self.is_mapped = expert_map is not None
        self.map = topk_ids if expert_map is None else expert_map  # a pointer that is never read without a map
        self.are_few = are_few(tokens, self.top_k)
        self.blocks = self.slots if self.are_few else block_capacity(self.slots, experts, block_tokens)
        self.sorted_slots = topk_ids.new_empty(self.blocks * block_tokens, dtype=torch.int32)
        self.block_expert = topk_ids.new_empty(self.blocks, dtype=torch.int32)


class Counters:
    """int32 zeros, once `prepare` has run, for the programs of both GEMMs that add up what others computed."""

    def __init__(self, routing: Routing, tiles: Tiles, gate_up: ExpertStack, down: ExpertStack):
        split = routing.blocks * gate_up.tiles if tiles.gate_up_split_k > 1 else 0
        first_down = -(-split // 4) * 4  # 16 bytes: a pointer that is less aligned would compile another kernel
        self.all = routing.ids.new_empty(first_down + down.tiles, dtype=torch.int32)
        self.gate_up, self.down = self.all, self.all[first_down:]


def prepare(
    launch: Launch, x: torch.Tensor, dtype: torch.dtype, routing: Routing, counters: torch.Tensor,
    in_rings: bool = False,
) -> Activations:  # fmt: skip
    """x [tokens, features] as matrix operands of dtype, the slots sorted, the counters cleared. in_rings: an
    ExpertStack's."""
    tokens, features = x.shape
    quantized = Activations(tokens, features, dtype, x.device)
    sorting_programs = routing.slots if routing.are_few else routing.experts + 1
    pieces = -(-features // (128 * GROUPS_PER_PROGRAM))
    launch(
        prepare_kernel,
        (1 + sorting_programs + tokens * pieces,),
        x,
        quantized.values,
        quantized.scales,
        quantized.sums,
        features,
        routing.ids,
        routing.map,
        routing.sorted_slots,
        routing.block_expert,
        counters,
        routing.slots,
        routing.blocks,
        routing.block_tokens,
        routing.experts,
        sorting_programs,
        int(routing.are_few),
        counters.numel(),
        BINS=max(SMALLEST_HISTOGRAM, 1 << (routing.experts - 1).bit_length()),
        MAPPED=routing.is_mapped,
        CHUNK=CHUNK,
        FEW_SLOTS=FEW_SLOTS,
        LARGEST_BLOCK=LARGEST_BLOCK,
        GROUPS=GROUPS_PER_PROGRAM,
        FLOAT=quantized.is_float,
        RINGS=in_rings,
    )
    return quantized


def _grouped_gemm(
    launch: Launch,
    x: Activations,
    weights: ExpertStack,
    routing: Routing,
    out: torch.Tensor | Activations,
    tiles: Tiles,
    split_k: int,
    partial: torch.Tensor,
    counters: torch.Tensor,
    function: ExpertFunction | None,
) -> None:
    """Into `out`, activations with `function`, or the routed sum [tokens, features] of few.

    partial: float32 [split_k, slots, features], where the parts are added up by others, or later.
    """
    fused, device = isinstance(out, Activations), describe_device(x.values.device)
    launch(
        grouped_gemm_kernel,
        (weights.tiles * routing.blocks, split_k),
        x.values,
        x.scales,
        x.sums,
        weights.codes,
        weights.scales,
        weights.offsets,
        weights.bits,
        weights.scales if weights.bias is None else weights.bias,  # a pointer that is never read without one
        routing.ids,
        routing.map,
        routing.weights,
        routing.sorted_slots,
        routing.block_expert,
        partial,
        counters,
        out.values if fused else out,
        out.scales if fused else partial,
        out.sums if fused else partial,
        routing.slots,
        routing.blocks,
        weights.tiles,
        routing.slots // x.values.shape[0],
        routing.top_k,
        split_k,
        routing.experts,
        weights.out_features,
        weights.in_features,
        WIDTHS=weights.widths,
        STORED_ZEROS=weights.stored_zeros,
        MAPPED=routing.is_mapped,
        BLOCK_TOKENS=tiles.block_tokens,
        STAGES=tiles.num_stages,
        BIASED=weights.bias is not None,
        ACTIVATION=None if function is None else function.activation,
        GATED=weights.gated,
        LIMIT=None if function is None else function.limit,
        ALPHA=1.0 if function is None else function.alpha,
        BETA=0.0 if function is None else function.beta,
        INLINE_ASM=_has_ptx(x.values.device),
        AMD=device.is_amd,
        FLOAT=x.is_float,
        COMBINE=function is None and routing.are_few,
        GROUP=BLOCKS_PER_GROUP,
        ROWS=SUMMED_ROWS,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,  # Triton 3.10 turns it off by default; without it every scaling takes a third more
        **device.compiler_options,
    )


def _has_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _combine(launch: Launch, partial: torch.Tensor, routing: Routing, out: torch.Tensor) -> None:
    """The routed sum over each token's experts, where no GEMM has added it up: partial -> out [tokens, features]."""
    tokens, features = out.shape
    launch(
        combine_kernel,
        (tokens, -(-features // COMBINE_BLOCK)),
        partial,
        routing.ids,
        routing.weights,
        routing.map,
        out,
        routing.slots,
        features,
        routing.top_k,
        partial.shape[0],
        routing.experts,
        MAPPED=routing.is_mapped,
        BLOCK=COMBINE_BLOCK,
        ROWS=COMBINE_ROWS,
    )


def run_layer(
    launch: Launch,
    x: torch.Tensor,
    routing: Routing,
    gate_up: ExpertStack,
    down: ExpertStack,
    tiles: Tiles,
    function: ExpertFunction,
    float_activations: bool,
    out: torch.Tensor,
) -> None:
    """Into out [tokens, hidden], in three launches, or four where tokens are more than a few."""
    counters = Counters(routing, tiles, gate_up, down)
    dtype = torch.float16 if float_activations else torch.int8
    quantized = prepare(launch, x, dtype, routing, counters.all, gate_up.in_rings)
    activated = Activations(routing.slots, down.in_features, dtype, x.device)

    def partial_sums(split_k: int, features: int) -> torch.Tensor:
        return torch.empty(split_k, routing.slots, features, dtype=torch.float32, device=x.device)

    split_k = tiles.gate_up_split_k
    partial = partial_sums(split_k, gate_up.out_features) if split_k > 1 else activated.scales  # never touched
    _grouped_gemm(launch, quantized, gate_up, routing, activated, tiles, split_k, partial, counters.gate_up, function)
    split_k = tiles.down_split_k
    partial = partial_sums(split_k, down.out_features)
    _grouped_gemm(launch, activated, down, routing, out, tiles, split_k, partial, counters.down, None)
    if not routing.are_few:
        _combine(launch, partial, routing, out)
