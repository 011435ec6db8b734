"""The custom op `vllm_mcmoe::cpu_prune_experts`: online pruning in one call of compiled code.

A decode step has one token and layers of a millisecond: the thirty small torch operators of the reference would cost
more than skipping an expert gains.
"""

import ctypes
import math
from functools import cache

import numpy as np
import torch
from numba import cfunc, njit, types

from vllm_mcmoe.kernels.cpu.compiled import source_digest
from vllm_mcmoe.kernels.cpu.intrinsics import as_float32, as_int32, as_int64
from vllm_mcmoe.kernels.cpu.vectors import (
    BFLOAT16,
    DTYPES,
    FLOAT32,
    LANES,
    dot_bfloat16,
    dot_float16,
    dot_float32,
)
from vllm_mcmoe.kernels.reference import pruning as reference

TINY = float(reference.TINY)
# More tokens than this are projected by torch, on all threads: one thread takes 1 to 2 us for each.
PROJECTED_HERE = 64

_LIBRARY = torch.library.Library("vllm_mcmoe", "FRAGMENT")
_LIBRARY.define(
    "cpu_prune_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor thresholds, Tensor weight_slopes, "
    "Tensor expert_bias, Tensor projection, Tensor expert_features, Tensor renormalize, Tensor(a!) counts) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)

# The int64 array a call passes to the compiled code, in this order: plain integers, as a call fills it in microseconds.
# Addresses unless said otherwise.
(
    TOKENS,  # value
    TOP_K,  # value
    EXPERTS,  # value
    RANK,  # value, of the features
    HIDDEN,  # value, 0 where X holds the features already
    DTYPE,  # value, of X
    IDS_ARE_INT64,  # value: 1 for int64 ids, 0 for int32
    BAD_ID,  # value, written: an expert id out of range, else -1
    X,  # DTYPE [tokens, hidden], or float32 [tokens, rank]
    WEIGHTS,  # float32 [tokens, top_k]
    IDS,  # [tokens, top_k]
    THRESHOLDS,  # float32 [top_k - 1]
    SLOPES,  # float32 [2, top_k - 1]
    BIAS,  # float32 [experts]
    PROJECTION,  # float32 [rank, hidden]
    EXPERT_FEATURES,  # float32 [experts, rank]
    RENORMALIZE,  # float32 [1]
    COUNTS,  # int64 [2], increased
    OUT_WEIGHTS,  # like WEIGHTS, written
    OUT_IDS,  # like IDS, written
    FEATURES,  # float32 [rank], written where HIDDEN is not 0: of the token at hand
) = range(21)
_Parameters = ctypes.c_int64 * 21


@njit
def _prune(p):
    counts = as_int64(p[COUNTS])
    p[BAD_ID] = -1
    for token in range(p[TOKENS]):
        first = token * p[TOP_K]
        _project(p, token)
        if p[IDS_ARE_INT64]:
            seen, dropped = _prune_token(p, as_int64(p[IDS]), as_int64(p[OUT_IDS]), first)
        else:
            seen, dropped = _prune_token(p, as_int32(p[IDS]), as_int32(p[OUT_IDS]), first)
        counts[0] += seen
        counts[1] += dropped


@njit
def _project(p, token):
    """FEATURES of this token."""
    if p[HIDDEN] == 0:
        p[FEATURES] = p[X] + 4 * token * p[RANK]
        return
    features, vectors = as_float32(p[FEATURES]), p[HIDDEN] // LANES
    for i in range(p[RANK]):
        row, first = p[PROJECTION] + 4 * i * p[HIDDEN], token * p[HIDDEN]
        if p[DTYPE] == FLOAT32:
            features[i] = dot_float32(p[X] + 4 * first, row, vectors)
        elif p[DTYPE] == BFLOAT16:
            features[i] = dot_bfloat16(p[X] + 2 * first, row, vectors)
        else:
            features[i] = dot_float16(p[X] + 2 * first, row, vectors)


@njit
def _prune_token(p, ids, out_ids, first):
    """Rank the pairs, drop, renormalise. Returns the experts seen and dropped."""
    top_k = p[TOP_K]
    weights, out = as_float32(p[WEIGHTS]), as_float32(p[OUT_WEIGHTS])
    thresholds, slopes = as_float32(p[THRESHOLDS]), as_float32(p[SLOPES])
    total = 0.0
    for j in range(top_k):  # insertion into the pairs already ranked, behind equal weights
        expert, rank = ids[first + j], j
        weight = weights[first + j] if expert >= 0 else np.float32(0)
        while rank > 0 and out[first + rank - 1] < weight:
            out[first + rank], out_ids[first + rank] = out[first + rank - 1], out_ids[first + rank - 1]
            rank -= 1
        out[first + rank], out_ids[first + rank] = weight, expert
        total += weight
    kept, seen, dropped = out[first], 1 if out_ids[first] >= 0 else 0, 0
    first_log = math.log(max(out[first], TINY))
    for j in range(1, top_k):
        weight, expert = out[first + j], out_ids[first + j]
        if expert < 0:
            continue
        if expert >= p[EXPERTS]:
            p[BAD_ID] = expert
            continue
        seen += 1
        score = slopes[j - 1] * math.log(max(weight, TINY)) + slopes[top_k - 1 + j - 1] * first_log
        if score + _expert_score(p, expert) >= thresholds[j - 1]:
            kept += weight
        else:
            out_ids[first + j] = -1
            dropped += 1
    if dropped:
        factor = 1.0 + as_float32(p[RENORMALIZE])[0] * (total / max(kept, TINY) - 1.0)
        for j in range(top_k):
            out[first + j] *= factor
    return seen, dropped


@njit
def _expert_score(p, expert):
    rank, score = p[RANK], as_float32(p[BIAS])[expert]
    features, expert_features = as_float32(p[FEATURES]), as_float32(p[EXPERT_FEATURES])
    for i in range(rank):
        score += features[i] * expert_features[expert * rank + i]
    return score


@cache
def compile_pruning():
    """The compiled code; from numba's cache on disk after the first time on a machine."""
    source = source_digest()

    @cfunc(types.void(types.int64), cache=True)
    def entry(address):
        source  # noqa: B018 -- part of the key numba caches under
        _prune(as_int64(address))

    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(entry.address)


def _cpu_prune_experts(
    x,
    topk_weights,
    topk_ids,
    thresholds,
    weight_slopes,
    expert_bias,
    projection,
    expert_features,
    renormalize,
    counts,
):
    (tokens, top_k), (rank, hidden) = topk_ids.shape, projection.shape
    if rank and (tokens > PROJECTED_HERE or hidden % LANES):
        x, hidden = reference.features(x, projection), 0
    elif x.dtype not in DTYPES:
        x = x.float()
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.float().contiguous(), topk_ids.contiguous()
    if topk_ids.dtype not in (torch.int32, torch.int64):
        topk_ids = topk_ids.to(torch.int64)
    out_weights, out_ids = torch.empty_like(topk_weights), torch.empty_like(topk_ids)
    features = (ctypes.c_float * rank)()
    params = _Parameters(
        tokens,
        top_k,
        expert_bias.shape[0],
        rank,
        hidden,
        DTYPES[x.dtype],
        topk_ids.dtype == torch.int64,
        -1,
        x.data_ptr(),
        topk_weights.data_ptr(),
        topk_ids.data_ptr(),
        thresholds.data_ptr(),
        weight_slopes.data_ptr(),
        expert_bias.data_ptr(),
        projection.data_ptr(),
        expert_features.data_ptr(),
        renormalize.data_ptr(),
        counts.data_ptr(),
        out_weights.data_ptr(),
        out_ids.data_ptr(),
        ctypes.addressof(features),
    )
    compile_pruning()(ctypes.addressof(params))
    if params[BAD_ID] >= 0:
        raise IndexError(f"topk_ids names expert {params[BAD_ID]}, the pruning rule knows {expert_bias.shape[0]}")
    return out_weights, out_ids


_LIBRARY.impl("cpu_prune_experts", _cpu_prune_experts, "CPU")


@torch.library.register_fake("vllm_mcmoe::cpu_prune_experts", lib=_LIBRARY)
def _fake(x, topk_weights, topk_ids, *_):
    ids_dtype = topk_ids.dtype if topk_ids.dtype == torch.int32 else torch.int64
    return topk_weights.new_empty(topk_weights.shape, dtype=torch.float32), topk_ids.new_empty(
        topk_ids.shape, dtype=ids_dtype
    )


def prune_experts(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels.reference.pruning.prune_experts, for tensors on the CPU; the rule's tensors contiguous."""
    return torch.ops.vllm_mcmoe.cpu_prune_experts(*arguments)
