"""The custom op `vllm_mcmoe::cpu_fused_experts`: from tensors to one call of compiled code."""

import ctypes
import threading

import torch

from vllm_mcmoe.kernels.cpu.chunks import CHUNK
from vllm_mcmoe.kernels.cpu.compiled import compile_layer
from vllm_mcmoe.kernels.cpu.layout import ROWS
from vllm_mcmoe.kernels.cpu.moe import GROUP_ROWS, Field
from vllm_mcmoe.kernels.cpu.vectors import DTYPES
from vllm_mcmoe.kernels.packing import GROUP_SIZE

MAX_TOKENS = 2048  # tokens of one pass; longer inputs take several, so that the workspace stays below 100 MB or so
TASKS_PER_THREAD = 8  # of the down projection: enough to even out cores of different speed
DOWN_SUMS_BYTES = 1024 * 1024  # of a task of the down projection: [tokens, rows] float32 should stay in L2

TILE_BYTES = 1024  # AMX reads whole tiles, past the last slot

_kept = threading.local()  # calls from different threads may run at once
_LIBRARY = torch.library.Library("vllm_mcmoe", "FRAGMENT")
_LIBRARY.define(
    "cpu_fused_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up, Tensor gate_up_table, "
    "Tensor down, Tensor down_table, int intermediate_size, int activation, str isa) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


class _Workspace:
    """Places areas one after the other, then gives their addresses in one buffer."""

    def __init__(self) -> None:
        self.size = 0
        self.offsets: dict[int, int] = {}

    def add(self, field: int, nbytes: int) -> None:
        self.offsets[field] = self.size
        self.size += -(-nbytes // 64) * 64

    def addresses(self, params, base: int) -> None:
        for field, offset in self.offsets.items():
            params[field] = base + offset


def _down_rows(tokens: int, hidden: int, threads: int) -> int:
    """Output rows of a task of the down projection, a multiple of 32: AMX multiplies two row blocks at a time."""
    even = hidden // (threads * TASKS_PER_THREAD)
    cached = DOWN_SUMS_BYTES // (4 * tokens)
    return max(2 * ROWS, min(even, cached) // (2 * ROWS) * (2 * ROWS))


def _workspace(tokens: int, top_k: int, hidden: int, intermediate: int, experts: int, threads: int, down_rows: int):
    slots = tokens * top_k
    chunk = min(CHUNK, slots)
    space = _Workspace()
    space.add(Field.COUNTERS, 6 * 64)
    space.add(Field.SLOT_OF, 4 * slots)
    space.add(Field.SLOT_TOKEN, 4 * slots)
    space.add(Field.SLOT_WEIGHT, 4 * slots)
    space.add(Field.SLOT_CHUNK, 8 * slots)
    space.add(Field.CHUNKS, 12 * (min(experts, slots) + slots // CHUNK))
    space.add(Field.EXPERT_START, 4 * (experts + 1))
    space.add(Field.CODES, slots * hidden + TILE_BYTES)
    space.add(Field.SCALES, 8 * slots * (hidden // GROUP_SIZE))
    space.add(Field.MID_CODES, slots * intermediate + TILE_BYTES)
    space.add(Field.MID_SCALES, 8 * slots * (intermediate // GROUP_SIZE))
    gate_up = 2 * GROUP_ROWS * chunk * 4 + GROUP_ROWS * 4
    down = (tokens + chunk) * down_rows * 4
    scratch_bytes = -(-max(gate_up, down) // 64) * 64
    space.add(Field.SCRATCH, threads * scratch_bytes)
    return space, scratch_bytes


def kept_buffer(size: int) -> torch.Tensor:
    """Memory for one call, kept for the next, so that prefill does not wait for Linux to clear fresh pages."""
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _kept.buffer = torch.empty(size, dtype=torch.uint8)
    return buffer


def _run(x, topk_weights, topk_ids, gate_up, gate_up_table, down, down_table, intermediate_size, activation, isa, out):
    tokens, hidden = x.shape
    top_k, experts = topk_ids.shape[1], gate_up_table.shape[0]
    threads = torch.get_num_threads()
    down_rows = _down_rows(tokens, hidden, threads)
    space, scratch_bytes = _workspace(tokens, top_k, hidden, intermediate_size, experts, threads, down_rows)
    buffer = kept_buffer(space.size)
    compiled = compile_layer(isa)

    params = (ctypes.c_int64 * len(Field))()
    space.addresses(params, buffer.data_ptr())
    params[Field.X], params[Field.OUT], params[Field.DTYPE] = x.data_ptr(), out.data_ptr(), DTYPES[x.dtype]
    params[Field.TOKENS], params[Field.TOP_K], params[Field.EXPERTS] = tokens, top_k, experts
    params[Field.TOPK_IDS], params[Field.IDS_ARE_INT64] = topk_ids.data_ptr(), topk_ids.dtype == torch.int64
    params[Field.TOPK_WEIGHTS] = topk_weights.data_ptr()
    params[Field.HIDDEN], params[Field.INTERMEDIATE] = hidden, intermediate_size
    params[Field.ACTIVATION], params[Field.DOWN_ROWS] = activation, down_rows
    params[Field.GATE_UP], params[Field.GATE_UP_TABLE] = gate_up.data_ptr(), gate_up_table.data_ptr()
    params[Field.DOWN], params[Field.DOWN_TABLE] = down.data_ptr(), down_table.data_ptr()
    params[Field.SCRATCH_BYTES], params[Field.THREADS] = scratch_bytes, threads
    params[Field.WORKER], params[Field.MULTIPLY_ROWS] = compiled.worker, compiled.multiply_rows
    params[Field.PARALLEL] = compiled.gomp_parallel
    compiled.entry(ctypes.addressof(params))
    if params[Field.BAD_ID] >= 0:
        raise IndexError(f"topk_ids names expert {params[Field.BAD_ID]}, this layer holds {experts}")


def _cpu_fused_experts(
    x, topk_weights, topk_ids, gate_up, gate_up_table, down, down_table, intermediate_size, activation, isa
):
    x, topk_ids = x.contiguous(), topk_ids.contiguous()
    if topk_ids.dtype not in (torch.int32, torch.int64):
        topk_ids = topk_ids.to(torch.int64)
    topk_weights = topk_weights.to(torch.float32).contiguous()
    out = torch.empty_like(x)
    for first in range(0, x.shape[0], MAX_TOKENS):
        last = first + MAX_TOKENS
        _run(
            x[first:last], topk_weights[first:last], topk_ids[first:last],
            gate_up, gate_up_table, down, down_table, intermediate_size, activation, isa, out[first:last],
        )  # fmt: skip
    return out


_LIBRARY.impl("cpu_fused_experts", _cpu_fused_experts, "CPU")


@torch.library.register_fake("vllm_mcmoe::cpu_fused_experts", lib=_LIBRARY)
def _fake(x, topk_weights, topk_ids, gate_up, gate_up_table, down, down_table, intermediate_size, activation, isa):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
