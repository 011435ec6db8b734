"""The custom op `vllm_mcmoe::cpu_fused_experts`: from tensors to one call of compiled code."""

import ctypes
import threading
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

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

_Parameters = ctypes.c_int64 * len(Field)
_BAD_ID = int(Field.BAD_ID)
_kept = threading.local()  # calls from different threads may run at once
_LIBRARY = torch.library.Library("vllm_mcmoe", "FRAGMENT")
_LIBRARY.define(
    "cpu_fused_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up, Tensor gate_up_table, "
    "Tensor down, Tensor down_table, Tensor? gate_up_bias, Tensor? down_bias, int intermediate_size, int function, "
    "Tensor parameters, str isa, int[] families) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _down_rows(tokens: int, hidden: int, threads: int) -> int:
    """Output rows of a task of the down projection, a multiple of 32: AMX multiplies two row blocks at a time."""
    even = hidden // (threads * TASKS_PER_THREAD)
    cached = DOWN_SUMS_BYTES // (4 * tokens)
    return max(2 * ROWS, min(even, cached) // (2 * ROWS) * (2 * ROWS))


class _Plan(NamedTuple):
    """How a call of this size is cut up: bytes of its workspace, and the areas in it."""

    nbytes: int
    offsets: tuple[int, ...]  # of the areas Field.COUNTERS to SCRATCH, in their order
    scratch_bytes: int  # of one thread
    down_rows: int


@lru_cache(maxsize=4096)  # a decode step of a small layer would spend a third of its time here
def _plan(tokens: int, top_k: int, hidden: int, intermediate: int, experts: int, threads: int) -> _Plan:
    slots = tokens * top_k
    chunk = min(CHUNK, slots)
    down_rows = _down_rows(tokens, hidden, threads)
    gate_up = 2 * GROUP_ROWS * chunk * 4 + GROUP_ROWS * 4
    down = (tokens + chunk) * down_rows * 4
    scratch_bytes = _whole_lines(max(gate_up, down))
    areas = {
        Field.COUNTERS: 6 * 64,
        Field.SLOT_OF: 4 * slots,
        Field.SLOT_TOKEN: 4 * slots,
        Field.SLOT_WEIGHT: 4 * slots,
        Field.SLOT_CHUNK: 8 * slots,
        Field.CHUNKS: 12 * (min(experts, slots) + slots // CHUNK),
        Field.EXPERT_START: 4 * (experts + 1),
        Field.CODES: slots * hidden + TILE_BYTES,
        Field.SCALES: 8 * slots * (hidden // GROUP_SIZE),
        Field.MID_CODES: slots * intermediate + TILE_BYTES,
        Field.MID_SCALES: 8 * slots * (intermediate // GROUP_SIZE),
        Field.SCRATCH: threads * scratch_bytes,
    }
    *offsets, nbytes = accumulate(map(_whole_lines, areas.values()), initial=0)
    return _Plan(nbytes, tuple(offsets), scratch_bytes, down_rows)


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def kept_buffer(size: int) -> torch.Tensor:
    """Memory for one call, kept for the next, so that prefill does not wait for Linux to clear fresh pages."""
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _kept.buffer = torch.empty(size, dtype=torch.uint8)
    return buffer


def _run(
    x, topk_weights, topk_ids, gate_up, gate_up_table, down, down_table, gate_up_bias, down_bias,
    intermediate_size, function, parameters, isa, families, out,
):  # fmt: skip
    tokens, hidden = x.shape
    top_k, experts = topk_ids.shape[1], gate_up_table.shape[0]
    threads = torch.get_num_threads()
    plan = _plan(tokens, top_k, hidden, intermediate_size, experts, threads)
    base = kept_buffer(plan.nbytes).data_ptr()
    counters, slot_of, slot_token, slot_weight, slot_chunk, chunks, *others = (base + offset for offset in plan.offsets)
    compiled = compile_layer(isa, tuple(families))
    params = _Parameters(  # in the order of Field
        x.data_ptr(),
        out.data_ptr(),
        DTYPES[x.dtype],
        tokens,
        top_k,
        topk_ids.data_ptr(),
        topk_ids.dtype == torch.int64,
        topk_weights.data_ptr(),
        experts,
        hidden,
        intermediate_size,
        function,
        gate_up.data_ptr(),
        gate_up_table.data_ptr(),
        down.data_ptr(),
        down_table.data_ptr(),
        counters,
        slot_of,
        slot_token,
        slot_weight,
        slot_chunk,
        chunks,
        0,  # CHUNK_COUNT, written
        *others,
        plan.scratch_bytes,
        plan.down_rows,
        -1,  # BAD_ID, written
        threads,
        compiled.gomp_parallel,
        compiled.worker,
        compiled.multiply_rows,
        parameters.data_ptr(),
        0 if gate_up_bias is None else gate_up_bias.data_ptr(),
        0 if down_bias is None else down_bias.data_ptr(),
    )
    compiled.entry(ctypes.addressof(params))
    bad_id = params[_BAD_ID]
    if bad_id >= 0:
        raise IndexError(f"topk_ids names expert {bad_id}, this layer holds {experts}")


def _cpu_fused_experts(
    x, topk_weights, topk_ids, gate_up, gate_up_table, down, down_table, gate_up_bias, down_bias,
    intermediate_size, function, parameters, isa, families,
):  # fmt: skip
    x, topk_ids = x.contiguous(), topk_ids.contiguous()
    if topk_ids.dtype not in (torch.int32, torch.int64):
        topk_ids = topk_ids.to(torch.int64)
    topk_weights = topk_weights.to(torch.float32).contiguous()
    out = torch.empty_like(x)
    for first in range(0, x.shape[0], MAX_TOKENS):
        last = first + MAX_TOKENS
        _run(
            x[first:last], topk_weights[first:last], topk_ids[first:last],
            gate_up, gate_up_table, down, down_table, gate_up_bias, down_bias,
            intermediate_size, function, parameters, isa, families, out[first:last],
        )  # fmt: skip
    return out


_LIBRARY.impl("cpu_fused_experts", _cpu_fused_experts, "CPU")


@torch.library.register_fake("vllm_mcmoe::cpu_fused_experts", lib=_LIBRARY)
def _fake(x, *_):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
