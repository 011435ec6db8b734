"""The Triton backend: all experts of a layer as one module, computed by one torch custom op."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Literal, Self

import torch
import triton

from vllm_mcmoe.kernels.expert_function import SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import Code, StoredMatrix
from vllm_mcmoe.kernels.triton.fields import has_trellis
from vllm_mcmoe.kernels.triton.launches import Routing, are_few, compile_kernel, run_kernel, run_layer
from vllm_mcmoe.kernels.triton.layout import ExpertStack, pack_bias, pack_experts, widths_of
from vllm_mcmoe.kernels.triton.tiles import Device, Shape, Tiles, choose_tiles, describe_device

MIN_CUDA_CAPABILITY = (8, 0)  # mma.m16n8k32 on int8 and cp.async
ROCM_ARCHITECTURES = ("gfx942", "gfx950")  # compiled ahead of time in the tests
INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKENS_PER_CHUNK = 4096  # bounds the float32 workspace to 4096 * top_k * hidden: 256 MiB at top-8 and 2048
ACTIVATIONS_VARIABLE = "VLLM_MCMOE_ACTIVATIONS"


# defined without torch.library.custom_op, whose wrappers take longer than the launches
_LIBRARY = torch.library.Library("vllm_mcmoe", "FRAGMENT")
_LIBRARY.define(
    "triton_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor[] gate_up, "
    "Tensor[] down, Tensor? gate_up_bias, Tensor? down_bias, int widths, int intermediate_size, str activation, "
    "bool gated, float? limit, float alpha, float beta, bool float_activations, bool stored_zeros) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


_function = lru_cache(ExpertFunction)  # which checks its arguments


def _triton_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    widths: int,
    intermediate_size: int,
    activation: str,
    gated: bool,
    limit: float | None,
    alpha: float,
    beta: float,
    float_activations: bool,
    stored_zeros: bool,
) -> torch.Tensor:
    """out[t] = sum_j topk_weights[t, j] * down_e(function(gate_up_e(x[t]))),  e = topk_ids[t, j].

    x float [tokens, hidden], topk_weights float and topk_ids int [tokens, top_k], expert_map int32 [global experts];
    gate_up, down: the tensors of an ExpertStack, the biases its bias; widths, stored_zeros: of both stacks; activation
    to beta: an ExpertFunction. Shapes alone decide grids and allocations, so it can be captured.
    """
    function = _function(activation, gated, limit, alpha, beta)
    hidden_size, rows = x.shape[1], function.factor * intermediate_size
    shared = {"widths": widths, "stored_zeros": stored_zeros}
    gate_up_stack = ExpertStack(*gate_up, rows, hidden_size, gated=gated, bias=gate_up_bias, **shared)
    down_stack = ExpertStack(*down, hidden_size, intermediate_size, gated=False, bias=down_bias, **shared)
    device, experts = describe_device(x.device), gate_up_stack.experts
    all_experts = experts if expert_map is None else expert_map.numel()
    shape = Shape(experts, topk_ids.shape[1], hidden_size, intermediate_size, float_activations, all_experts)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for begin in range(0, x.shape[0], TOKENS_PER_CHUNK):
        chunk = slice(begin, begin + TOKENS_PER_CHUNK)
        rows, ids, routing_weights = x[chunk], topk_ids[chunk].contiguous(), topk_weights[chunk].contiguous()
        tiles = choose_tiles(device, shape, rows.shape[0])
        routing = Routing(routing_weights, ids, expert_map, experts, tiles.block_tokens)
        run_layer(run_kernel, rows, routing, gate_up_stack, down_stack, tiles, function, float_activations, out[chunk])
    return out


for _device in ("CPU", "CUDA"):  # CPU: interpreted
    _LIBRARY.impl("triton_experts", _triton_experts, _device)


@torch.library.register_fake("vllm_mcmoe::triton_experts", lib=_LIBRARY)
def _fake(x, *_) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _tiles_of_any_prompt(device: Device, shape: Shape) -> dict[tuple, tuple[int, Tiles]]:
    """For every kind of kernels that some number of tokens asks for: the fewest tokens that do, and their tiles."""
    kinds: dict[tuple, tuple[int, Tiles]] = {}
    for tokens in range(1, TOKENS_PER_CHUNK + 1):
        tiles = choose_tiles(device, shape, tokens)
        launched = (are_few(tokens, shape.top_k), tiles.block_tokens, tiles.num_warps, tiles.num_stages)
        kinds.setdefault(launched, (tokens, tiles))
    return kinds


@lru_cache
def compile_layer(
    device: torch.device,
    shape: Shape,
    widths: int,
    stored_zeros: bool,
    function: ExpertFunction,
    biased: tuple[bool, bool],
    dtype: torch.dtype,
    is_mapped: bool,
) -> None:
    """Compiles what layers of this shape run for any number of tokens of `dtype`, unless Triton's cache has it.

    widths, stored_zeros: as in the op; biased: whether gate_up and down are. Several kernels at a time, one per
    CPU core.
    """
    empty = partial(torch.empty, device=device)
    hidden, intermediate = shape.hidden_size, shape.intermediate_size

    def stack(out_features: int, in_features: int, gated: bool, biased: bool) -> ExpertStack:
        codes, scales = empty(0, dtype=torch.uint8), empty(0, dtype=torch.int32)
        offsets, bits = empty(shape.experts, 2, dtype=torch.int64), empty(shape.experts, dtype=torch.int32)
        bias = empty(0, dtype=torch.float32) if biased else None
        return ExpertStack(codes, scales, offsets, bits, out_features, in_features, gated, widths, stored_zeros, bias)

    gate_up = stack(function.factor * intermediate, hidden, function.gated, biased[0])
    down = stack(hidden, intermediate, False, biased[1])
    expert_map = empty(shape.all_experts or shape.experts, dtype=torch.int32) if is_mapped else None
    described = describe_device(device)
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
        for tokens, tiles in _tiles_of_any_prompt(described, shape).values():
            x, out = empty(tokens, hidden, dtype=dtype), empty(tokens, hidden, dtype=dtype)
            ids = empty(tokens, shape.top_k, dtype=torch.int32)
            weights = empty(tokens, shape.top_k, dtype=torch.float32)
            routing = Routing(weights, ids, expert_map, shape.experts, tiles.block_tokens)
            run_layer(compile_kernel, x, routing, gate_up, down, tiles, function, shape.float_activations, out)


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
    """The experts of one layer in the GPU layout, each matrix with a code of its own.

    Buffers: the tensors of two ExpertStacks, `gate_up_*` and `down_*`.
    """

    def __init__(self, gate_up: ExpertStack, down: ExpertStack, function: ExpertFunction, float_activations: bool):
        super().__init__()
        for name, stack in (("gate_up", gate_up), ("down", down)):
            for field, tensor in stack.tensors().items():
                self.register_buffer(f"{name}_{field}", tensor, persistent=False)
        self.widths, self.stored_zeros = gate_up.widths | down.widths, gate_up.stored_zeros
        self.hidden_size, self.intermediate_size, self.function = gate_up.in_features, down.in_features, function
        self.float_activations = float_activations
        self.register_buffer("gate_up_bias", None, persistent=False)
        self.register_buffer("down_bias", None, persistent=False)

    @classmethod
    def prepare(
        cls,
        gate_up: Iterable[StoredMatrix],
        down: Iterable[StoredMatrix],
        *,
        hidden_size: int,
        intermediate_size: int,
        gate_up_codes: Sequence[Code],
        down_codes: Sequence[Code],
        function: ExpertFunction = SILU,
        stored_zeros: bool = True,
        device: torch.device | str = "cuda",
        activations: Literal["int8", "float"] | None = None,
    ) -> Self:
        """Repack a layer's experts, one matrix at a time, on the device.

        gate_up: matrices [2 * intermediate_size, hidden_size], gate rows first, without a gate half of it; down:
        [hidden_size, intermediate_size].
        stored_zeros: whether those of more than 1 bit have zeros.
        activations: what the activations are multiplied as. "int8" is the contract of all backends; "float" rounds them
        to float16 instead. None takes VLLM_MCMOE_ACTIVATIONS, or int8 without it.
        Raises ValueError for an unsupported device, and where a matrix is not what was announced.
        """
        device = torch.device(device)
        check_device(device)
        activations = activations or os.environ.get(ACTIVATIONS_VARIABLE, "int8")
        if activations not in ("int8", "float"):
            raise ValueError(f"{ACTIVATIONS_VARIABLE}={activations!r}: choose int8 or float")
        return cls(
            pack_experts(
                gate_up,
                codes=gate_up_codes,
                layer_codes=down_codes,
                out_features=function.factor * intermediate_size,
                in_features=hidden_size,
                gated=function.gated,
                stored_zeros=stored_zeros,
                device=device,
            ),
            pack_experts(
                down,
                codes=down_codes,
                layer_codes=gate_up_codes,
                out_features=hidden_size,
                in_features=intermediate_size,
                gated=False,
                stored_zeros=stored_zeros,
                device=device,
            ),
            function,
            activations == "float",
        )

    def set_biases(self, gate_up: torch.Tensor, down: torch.Tensor | None) -> None:
        """gate_up: float32 [E, 2I or I], gate first; down: float32 [E, H], None where another rank adds it."""
        device = self.gate_up_bits.device
        self.gate_up_bias = pack_bias(gate_up.to(device), self.function.gated)
        self.down_bias = None if down is None else pack_bias(down.to(device), gated=False)

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
        return torch.ops.vllm_mcmoe.triton_experts(*self.arguments(x.contiguous(), topk_weights, topk_ids, expert_map))

    def compile_kernels(
        self, *, codes: Iterable[Code], top_k: int, dtype: torch.dtype, expert_map: torch.Tensor | None = None
    ) -> None:
        """Compiles every kernel that `forward` can ask for, where it is not yet.

        codes: of all layers of the model: those of the same shape then share their kernels, but for layers without any
        trellis code in a model that has some. dtype: of x; topk_weights are float32 and topk_ids int32.
        """
        if triton.knobs.runtime.interpret:
            return
        self.widths |= widths_of({code for code in codes if code.kind == "scalar" or has_trellis(self.widths)})
        hidden_size, experts = self.hidden_size, self.gate_up_bits.numel()
        all_experts = experts if expert_map is None else expert_map.numel()
        shape = Shape(experts, top_k, hidden_size, self.intermediate_size, self.float_activations, all_experts)
        device = self.gate_up_bits.device
        biased = self.gate_up_bias is not None, self.down_bias is not None
        compile_layer(
            device, shape, self.widths, self.stored_zeros, self.function, biased, dtype, expert_map is not None
        )

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
            self.gate_up_bias,
            self.down_bias,
            self.widths,
            self.intermediate_size,
            self.function.activation,
            self.function.gated,
            self.function.limit,
            self.function.alpha,
            self.function.beta,
            self.float_activations,
            self.stored_zeros,
        )
