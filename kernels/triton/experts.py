"""The Triton backend: all experts of a layer as one module, computed by one torch custom op."""

import os
from collections.abc import Iterable, Sequence
from typing import Literal, Self

import torch
import triton

from vllm_mcmoe.kernels.packing import PackedMatrix
from vllm_mcmoe.kernels.triton.activation import ACTIVATIONS
from vllm_mcmoe.kernels.triton.fields import TILE_FEATURES
from vllm_mcmoe.kernels.triton.gemm import grouped_gemm_kernel
from vllm_mcmoe.kernels.triton.layout import ExpertStack, pack_experts
from vllm_mcmoe.kernels.triton.quantize import GROUPS_PER_PROGRAM, activate_kernel, quantize_kernel
from vllm_mcmoe.kernels.triton.routing import CHUNK, SMALLEST_HISTOGRAM, align_kernel, block_capacity, combine_kernel
from vllm_mcmoe.kernels.triton.tiles import Shape, Tiles, choose_tiles, describe_device

MIN_CUDA_CAPABILITY = (8, 0)  # mma.m16n8k32 on int8 and cp.async
ROCM_ARCHITECTURES = ("gfx942", "gfx950")  # compiled ahead of time in the tests
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKENS_PER_CHUNK = 4096  # bounds the float32 workspace to 4096 * top_k * hidden: 256 MiB at top-8 and 2048
COMBINE_BLOCK = 1024
ACTIVATIONS_VARIABLE = "VLLM_MCMOE_ACTIVATIONS"


class Activations:
    """Rows as matrix operands: int8 or float16 [rows, features], scale and sum float32 [rows, features/128]."""

    def __init__(self, rows: int, features: int, dtype: torch.dtype, device: torch.device):
        self.values = torch.empty(rows, features, dtype=dtype, device=device)
        self.scales = torch.empty(rows, features // 128, dtype=torch.float32, device=device)
        self.sums = torch.empty_like(self.scales)

    @property
    def is_float(self) -> bool:
        return self.values.dtype == torch.float16


class Routing:
    """Which expert computes which slots: the arguments that every kernel about slots shares."""

    def __init__(self, topk_ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, block_tokens: int):
        self.ids, self.slots = topk_ids, topk_ids.numel()
        self.map = topk_ids if expert_map is None else expert_map  # a pointer that is never read without a map
        self.constants = {"EXPERTS": experts, "MAPPED": expert_map is not None}
        self.block_tokens = block_tokens
        self.blocks = block_capacity(self.slots, experts, block_tokens)
        self.sorted_slots = topk_ids.new_empty(self.blocks * block_tokens, dtype=torch.int32)
        self.block_expert = topk_ids.new_empty(self.blocks, dtype=torch.int32)

    def align(self) -> None:
        experts = self.constants["EXPERTS"]
        align_kernel[(experts + 1,)](
            self.ids,
            self.map,
            self.sorted_slots,
            self.block_expert,
            self.slots,
            self.blocks,
            BINS=max(SMALLEST_HISTOGRAM, triton.next_power_of_2(experts)),
            BLOCK_TOKENS=self.block_tokens,
            CHUNK=CHUNK,
            **self.constants,
        )


def _quantize(x: torch.Tensor, dtype: torch.dtype) -> Activations:
    tokens, features = x.shape
    quantized = Activations(tokens, features, dtype, x.device)
    grid = (tokens, triton.cdiv(features // 128, GROUPS_PER_PROGRAM))
    quantize_kernel[grid](
        x,
        quantized.values,
        quantized.scales,
        quantized.sums,
        features,
        x.stride(0),
        GROUPS=GROUPS_PER_PROGRAM,
        FLOAT=quantized.is_float,
    )
    return quantized


def _grouped_gemm(
    x: Activations,
    weights: ExpertStack,
    routing: Routing,
    out: torch.Tensor | Activations,
    tiles: Tiles,
    split_k: int,
    activation: str | None,
) -> None:
    """Into `out`: float32 [split_k, slots, out_features], or quantised activations where `activation` is given."""
    fused = isinstance(out, Activations)
    grid = (triton.cdiv(weights.out_features, TILE_FEATURES), routing.blocks, split_k)
    grouped_gemm_kernel[grid](
        x.values,
        x.scales,
        x.sums,
        weights.codes,
        weights.scales,
        weights.offsets,
        weights.bits,
        routing.sorted_slots,
        routing.block_expert,
        out.values if fused else out,
        out.scales if fused else out,
        out.sums if fused else out,
        routing.slots,
        weights.out_features,
        weights.in_features,
        SLOTS_PER_ROW=routing.slots // x.values.shape[0],
        WIDTHS=weights.widths,
        BLOCK_TOKENS=tiles.block_tokens,
        SPLIT_K=split_k,
        STAGES=tiles.num_stages,
        ACTIVATION=activation,
        INLINE_ASM=_has_ptx(x.values.device),
        FLOAT=x.is_float,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,  # Triton 3.10 turns it off by default; without it every scaling takes a third more
        **describe_device(x.values.device).compiler_options,
    )


def _has_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _gate_up(x: Activations, weights: ExpertStack, routing: Routing, tiles: Tiles, activation: str) -> Activations:
    """[slots, intermediate], activated and quantised by the GEMM itself, or after it where the groups were split."""
    device, split_k = x.values.device, tiles.gate_up_split_k
    activated = Activations(routing.slots, weights.out_features // 2, x.values.dtype, device)
    if split_k == 1:
        _grouped_gemm(x, weights, routing, activated, tiles, 1, activation)
        return activated
    partial = torch.empty(split_k, routing.slots, weights.out_features, dtype=torch.float32, device=device)
    _grouped_gemm(x, weights, routing, partial, tiles, split_k, None)
    activate_kernel[(routing.slots, weights.out_features // 256)](
        partial,
        routing.ids,
        routing.map,
        activated.values,
        activated.scales,
        activated.sums,
        routing.slots,
        weights.out_features,
        SPLIT_K=split_k,
        ACTIVATION=activation,
        FLOAT=x.is_float,
        **routing.constants,
    )
    return activated


def _down(
    x: Activations,
    weights: ExpertStack,
    routing: Routing,
    tiles: Tiles,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Into out [tokens, hidden]: the routed sum over each token's experts."""
    split_k = tiles.down_split_k
    partial = torch.empty(split_k, routing.slots, weights.out_features, dtype=torch.float32, device=out.device)
    _grouped_gemm(x, weights, routing, partial, tiles, split_k, None)
    combine_kernel[(out.shape[0], triton.cdiv(weights.out_features, COMBINE_BLOCK))](
        partial,
        routing.ids,
        topk_weights,
        routing.map,
        out,
        routing.slots,
        weights.out_features,
        TOP_K=topk_weights.shape[1],
        SPLIT_K=split_k,
        BLOCK=COMBINE_BLOCK,
        **routing.constants,
    )


@torch.library.custom_op("mcmoe::triton_experts", mutates_args=())
def triton_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    gate_up_widths: int,
    down_widths: int,
    intermediate_size: int,
    activation: str,
    float_activations: bool,
) -> torch.Tensor:
    """out[t] = sum_j topk_weights[t, j] * down_e(activation(gate_e(x[t])) * up_e(x[t])),  e = topk_ids[t, j].

    x float [tokens, hidden], topk_weights float and topk_ids int [tokens, top_k], expert_map int32 [global experts];
    gate_up, down: the tensors of an ExpertStack. Shapes alone decide grids and allocations, so it can be captured.
    """
    hidden_size = x.shape[1]
    gate_up_stack = ExpertStack(*gate_up, 2 * intermediate_size, hidden_size, gated=True, widths=gate_up_widths)
    down_stack = ExpertStack(*down, hidden_size, intermediate_size, gated=False, widths=down_widths)
    shape = Shape(gate_up_stack.experts, topk_ids.shape[1], hidden_size, intermediate_size, float_activations)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for begin in range(0, x.shape[0], TOKENS_PER_CHUNK):
        chunk = slice(begin, begin + TOKENS_PER_CHUNK)
        rows, ids, routing_weights = x[chunk], topk_ids[chunk].contiguous(), topk_weights[chunk].contiguous()
        tiles = choose_tiles(describe_device(x.device), shape, rows.shape[0])
        routing = Routing(ids, expert_map, shape.experts, tiles.block_tokens)
        routing.align()
        quantized = _quantize(rows, torch.float16 if float_activations else torch.int8)
        activated = _gate_up(quantized, gate_up_stack, routing, tiles, activation)
        _down(activated, down_stack, routing, tiles, routing_weights, out[chunk])
    return out


@triton_experts.register_fake
def _(x, topk_weights, topk_ids, expert_map, gate_up, down, *_) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def check_device(device: torch.device) -> None:
    """Raises ValueError for a device that these kernels were not compiled for, naming what it has and what it needs."""
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return
    if device.type != "cuda":
        raise ValueError(
            f"the triton kernels run on CUDA and ROCm devices, found {device.type!r}; use the cpu kernels there"
        )
    if not torch.cuda.is_available():
        raise ValueError("the triton kernels need a CUDA or ROCm device, torch sees none; use the cpu kernels instead")
    architecture = describe_device(device).architecture
    if torch.version.hip:
        if architecture not in ROCM_ARCHITECTURES:
            raise ValueError(f"the triton kernels need one of {ROCM_ARCHITECTURES}, found {architecture}")
    elif torch.cuda.get_device_capability(device) < MIN_CUDA_CAPABILITY:
        needed = "sm" + "".join(map(str, MIN_CUDA_CAPABILITY))
        raise ValueError(f"the triton kernels need {needed} or newer for int8 tensor cores, found {architecture}")


class TritonExperts(torch.nn.Module):
    """The experts of one layer in the GPU layout, with per-expert bit-widths.

    Buffers: the tensors of two ExpertStacks, `gate_up_*` and `down_*`.
    """

    activations = ACTIVATIONS

    def __init__(self, gate_up: ExpertStack, down: ExpertStack, activation: str, float_activations: bool):
        super().__init__()
        for name, stack in (("gate_up", gate_up), ("down", down)):
            for field, tensor in stack.tensors().items():
                self.register_buffer(f"{name}_{field}", tensor, persistent=False)
        self.gate_up_widths, self.down_widths = gate_up.widths, down.widths
        self.intermediate_size, self.activation = down.in_features, activation
        self.float_activations = float_activations

    @classmethod
    def prepare(
        cls,
        gate_up: Iterable[PackedMatrix],
        down: Iterable[PackedMatrix],
        *,
        hidden_size: int,
        intermediate_size: int,
        gate_up_bits: Sequence[int],
        down_bits: Sequence[int],
        activation: str = "silu",
        device: torch.device | str = "cuda",
        activations: Literal["int8", "float"] | None = None,
    ) -> Self:
        """Repack a layer's experts, one matrix at a time, on the device.

        gate_up: matrices [2 * intermediate_size, hidden_size], gate rows first; down: [hidden_size, intermediate_size].
        activations: what the activations are multiplied as. "int8" is the contract of all backends; "float" rounds them
        to float16 instead. None takes VLLM_MCMOE_ACTIVATIONS, or int8 without it.
        Raises ValueError for an unsupported device or activation, and where a matrix is not what was announced.
        """
        device = torch.device(device)
        check_device(device)
        if activation not in ACTIVATIONS:
            raise ValueError(f"the triton kernels have no activation {activation!r}; supported: {ACTIVATIONS}")
        activations = activations or os.environ.get(ACTIVATIONS_VARIABLE, "int8")
        if activations not in ("int8", "float"):
            raise ValueError(f"{ACTIVATIONS_VARIABLE}={activations!r}: choose int8 or float")
        return cls(
            pack_experts(
                gate_up,
                bits=gate_up_bits,
                out_features=2 * intermediate_size,
                in_features=hidden_size,
                gated=True,
                device=device,
            ),
            pack_experts(
                down,
                bits=down_bits,
                out_features=hidden_size,
                in_features=intermediate_size,
                gated=False,
                device=device,
            ),
            activation,
            activations == "float",
        )

    def forward(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [tokens, hidden], topk_weights and topk_ids [tokens, top_k] -> [tokens, hidden] in x.dtype.

        expert_map int32 [global experts] holds the local id of every id in topk_ids, -1 for experts of other ranks;
        without it topk_ids are local. Negative ids contribute nothing. Raises ValueError for an x of another dtype.
        """
        if x.dtype not in INPUT_DTYPES:
            raise ValueError(f"the triton kernels take activations in one of {INPUT_DTYPES}, found {x.dtype}")
        return triton_experts(*self.arguments(x.contiguous(), topk_weights, topk_ids, expert_map))

    def arguments(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> tuple:
        """What the custom op takes for these tokens."""
        return (
            x,
            topk_weights,
            topk_ids,
            expert_map,
            [self.gate_up_codes, self.gate_up_scales, self.gate_up_offsets, self.gate_up_bits],
            [self.down_codes, self.down_scales, self.down_offsets, self.down_bits],
            self.gate_up_widths,
            self.down_widths,
            self.intermediate_size,
            self.activation,
            self.float_activations,
        )
