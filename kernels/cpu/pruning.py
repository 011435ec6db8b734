"""The custom op `vllm_mcmoe::cpu_prune_experts`: online pruning in one call of compiled code.

A decode step has one token and layers of a millisecond: the thirty small torch operators of the reference would cost
more than skipping an expert gains.
"""

import ctypes
import math
from enum import IntEnum
from functools import cache

import numpy as np
import torch
from numba import cfunc, njit, types

from vllm_mcmoe.kernels.cpu.compiled import source_digest
from vllm_mcmoe.kernels.cpu.intrinsics import as_float32, as_int32, as_int64
from vllm_mcmoe.kernels.reference import pruning as reference

TINY = float(reference.TINY)

_LIBRARY = torch.library.Library("vllm_mcmoe", "FRAGMENT")
_LIBRARY.define(
    "cpu_prune_experts(Tensor features, Tensor topk_weights, Tensor topk_ids, Tensor thresholds, Tensor weight_slopes, "
    "Tensor expert_bias, Tensor expert_features, Tensor renormalize, Tensor(a!) counts) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


class Field(IntEnum):
    """Positions in the int64 array a call passes to the compiled code. Addresses unless said otherwise."""

    TOKENS = 0  # value
    TOP_K = 1  # value
    RANK = 2  # value, of the features
    FEATURES = 3  # float32 [tokens, rank]
    WEIGHTS = 4  # float32 [tokens, top_k]
    IDS = 5  # [tokens, top_k]
    IDS_ARE_INT64 = 6  # value: 1 for int64 ids, 0 for int32
    THRESHOLDS = 7  # float32 [top_k - 1]
    SLOPES = 8  # float32 [2, top_k - 1]
    BIAS = 9  # float32 [experts]
    EXPERT_FEATURES = 10  # float32 [experts, rank]
    RENORMALIZE = 11  # float32 [1]
    COUNTS = 12  # int64 [2], increased
    OUT_WEIGHTS = 13  # like WEIGHTS, written
    OUT_IDS = 14  # like IDS, written
    EXPERTS = 15  # value
    BAD_ID = 16  # value, written: an expert id out of range, else -1


(
    TOKENS, TOP_K, RANK, FEATURES, WEIGHTS, IDS, IDS_ARE_INT64, THRESHOLDS, SLOPES, BIAS, EXPERT_FEATURES, RENORMALIZE,
    COUNTS, OUT_WEIGHTS, OUT_IDS, EXPERTS, BAD_ID,
) = map(int, Field)  # fmt: skip


@njit
def _prune(p):
    counts = as_int64(p[COUNTS])
    p[BAD_ID] = -1
    for token in range(p[TOKENS]):
        first = token * p[TOP_K]
        if p[IDS_ARE_INT64]:
            seen, dropped = _prune_token(p, token, as_int64(p[IDS]), as_int64(p[OUT_IDS]), first)
        else:
            seen, dropped = _prune_token(p, token, as_int32(p[IDS]), as_int32(p[OUT_IDS]), first)
        counts[0] += seen
        counts[1] += dropped


@njit
def _prune_token(p, token, ids, out_ids, first):
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
        if score + _expert_score(p, token, expert) >= thresholds[j - 1]:
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
def _expert_score(p, token, expert):
    rank, score = p[RANK], as_float32(p[BIAS])[expert]
    features, expert_features = as_float32(p[FEATURES]), as_float32(p[EXPERT_FEATURES])
    for i in range(rank):
        score += features[token * rank + i] * expert_features[expert * rank + i]
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
    features,
    topk_weights,
    topk_ids,
    thresholds,
    weight_slopes,
    expert_bias,
    expert_features,
    renormalize,
    counts,
):
    features, topk_weights = features.float().contiguous(), topk_weights.float().contiguous()
    topk_ids = topk_ids.contiguous()
    if topk_ids.dtype not in (torch.int32, torch.int64):
        topk_ids = topk_ids.to(torch.int64)
    out_weights, out_ids = torch.empty_like(topk_weights), torch.empty_like(topk_ids)
    params = (ctypes.c_int64 * len(Field))()
    params[Field.TOKENS], params[Field.TOP_K], params[Field.RANK] = *topk_ids.shape, features.shape[1]
    params[Field.IDS_ARE_INT64], params[Field.EXPERTS] = topk_ids.dtype == torch.int64, expert_bias.shape[0]
    for field, tensor in (
        (Field.FEATURES, features),
        (Field.WEIGHTS, topk_weights),
        (Field.IDS, topk_ids),
        (Field.THRESHOLDS, thresholds),
        (Field.SLOPES, weight_slopes),
        (Field.BIAS, expert_bias),
        (Field.EXPERT_FEATURES, expert_features),
        (Field.RENORMALIZE, renormalize),
        (Field.COUNTS, counts),
        (Field.OUT_WEIGHTS, out_weights),
        (Field.OUT_IDS, out_ids),
    ):
        params[field] = tensor.data_ptr()
    compile_pruning()(ctypes.addressof(params))
    if params[Field.BAD_ID] >= 0:
        raise IndexError(f"topk_ids names expert {params[Field.BAD_ID]}, the pruning rule knows {expert_bias.shape[0]}")
    return out_weights, out_ids


_LIBRARY.impl("cpu_prune_experts", _cpu_prune_experts, "CPU")


@torch.library.register_fake("vllm_mcmoe::cpu_prune_experts", lib=_LIBRARY)
def _fake(
    features,
    topk_weights,
    topk_ids,
    thresholds,
    weight_slopes,
    expert_bias,
    expert_features,
    renormalize,
    counts,
):
    ids_dtype = topk_ids.dtype if topk_ids.dtype == torch.int32 else torch.int64
    return topk_weights.new_empty(topk_weights.shape, dtype=torch.float32), topk_ids.new_empty(
        topk_ids.shape, dtype=ids_dtype
    )


def prune_experts(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels.reference.pruning.prune_experts, for tensors on the CPU; the rule's tensors contiguous."""
    return torch.ops.vllm_mcmoe.cpu_prune_experts(*arguments)
