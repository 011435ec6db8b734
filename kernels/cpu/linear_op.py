"""The custom op `vllm_mcmoe::cpu_linear`: from tensors to one call of compiled code."""

import ctypes
from functools import cache

import torch
import torch.nn.functional as F

from vllm_mcmoe.kernels.cpu.chunks import CHUNK
from vllm_mcmoe.kernels.cpu.compiled_linear import compile_linear
from vllm_mcmoe.kernels.cpu.layout import ROWS, linear_record, matrix_bytes
from vllm_mcmoe.kernels.cpu.linear_phases import COUNTER_BYTES, PARAMETERS
from vllm_mcmoe.kernels.cpu.op import MAX_TOKENS, TASKS_PER_THREAD, kept_buffer
from vllm_mcmoe.kernels.cpu.vectors import DTYPES

TASK_SUMS_BYTES = 256 * 1024  # of a task: [row blocks, slots, 16] float32 should stay in L2 beside the activations

_Parameters = ctypes.c_int64 * PARAMETERS
_LIBRARY = torch.library.Library("vllm_mcmoe", "FRAGMENT")
_LIBRARY.define(
    "cpu_linear(Tensor x, Tensor records, Tensor factor, Tensor? bias, int out_features, int bits, int group_size, "
    "str isa) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _run(x, records, factor, bias, bits, group_size, compiled, out) -> None:
    """x [tokens, inputs] and out [tokens, 16 * row blocks] contiguous, bias float32 [16 * row blocks] or None."""
    (tokens, inputs), row_blocks = x.shape, out.shape[1] // ROWS
    if not tokens:
        return
    threads, chunk = torch.get_num_threads(), min(CHUNK, tokens)
    task_blocks = min(row_blocks // (threads * TASKS_PER_THREAD), TASK_SUMS_BYTES // (4 * ROWS * chunk))
    task_blocks = max(2, task_blocks // 2 * 2)  # AMX takes blocks by pairs
    scratch_bytes = 4 * ROWS * task_blocks * chunk
    codes = COUNTER_BYTES
    scales = codes + _round_up(tokens * inputs)
    scratch = scales + _round_up(8 * tokens * (inputs // group_size))
    base = kept_buffer(scratch + threads * scratch_bytes).data_ptr()
    params = _Parameters(
        x.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        DTYPES[x.dtype],
        tokens,
        inputs,
        row_blocks,
        records.data_ptr(),
        bits,
        factor.data_ptr(),
        base,
        base + codes,
        base + scales,
        base + scratch,
        scratch_bytes,
        task_blocks,
        threads,
        compiled.gomp_parallel,
        compiled.worker,
        compiled.multiply_rows,
    )
    compiled.entry(ctypes.addressof(params))


@cache
def _rows_and_bytes(out_features: int, inputs: int, bits: int, group_size: int) -> tuple[int, int]:
    """Rows in whole row blocks, and the bytes of such a matrix' records."""
    rows = -(-out_features // ROWS) * ROWS
    return rows, matrix_bytes(linear_record(bits, group_size), rows, inputs)


def _cpu_linear(x, records, factor, bias, out_features, bits, group_size, isa):
    """A decode step calls this hundreds of times for a token each: torch's operators, 1.5 us apiece, are counted."""
    *leading, inputs = x.shape
    rows, expected = _rows_and_bytes(out_features, inputs, bits, group_size)
    if inputs % group_size or records.numel() != expected:
        raise ValueError(
            f"{records.numel()} bytes of records are no {bits}-bit matrix [{out_features}, {inputs}] in groups of "
            f"{group_size}, which has {expected}"
        )
    tokens = x if len(leading) == 1 else x.reshape(-1, inputs)
    tokens = tokens if tokens.is_contiguous() else tokens.contiguous()
    if bias is not None:
        bias = F.pad(bias.float(), (0, rows - out_features)) if rows != out_features else bias.float().contiguous()
    out = torch.empty((tokens.shape[0], rows), dtype=x.dtype)
    compiled = compile_linear(isa, bits, group_size)
    if tokens.shape[0] <= MAX_TOKENS:
        _run(tokens, records, factor, bias, bits, group_size, compiled, out)
    else:
        for part, out_part in zip(tokens.split(MAX_TOKENS), out.split(MAX_TOKENS), strict=True):
            _run(part, records, factor, bias, bits, group_size, compiled, out_part)
    if rows != out_features:
        out = out[:, :out_features].contiguous()
    return out if len(leading) == 1 else out.reshape(*leading, out_features)


_LIBRARY.impl("cpu_linear", _cpu_linear, "CPU")


@torch.library.register_fake("vllm_mcmoe::cpu_linear", lib=_LIBRARY)
def _fake(x, records, factor, bias, out_features, bits, group_size, isa):
    return torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
