"""The custom op `mcmoe::triton_prune_experts`: online pruning in one launch.

A decode step's MoE layer takes tens of microseconds on a GPU; the thirty small torch operators of the reference would
cost more, even inside a CUDA graph, than skipping an expert gains.
"""

import torch
import triton
import triton.language as tl

from vllm_mcmoe.kernels.reference import pruning as reference

TINY = tl.constexpr(float(reference.TINY))
COMPARISONS_PER_PROGRAM = 1024  # of a token's weights with each other: 8 per thread of a 4-warp program


@triton.jit
def rank_by_weight(weights, TOP_K: tl.constexpr, LANES: tl.constexpr):
    """weights [tokens, LANES] -> how many of the first TOP_K stand above each, int32: larger, or equal and earlier."""
    lane = tl.arange(0, LANES)
    mine, other = weights[:, :, None], weights[:, None, :]
    is_earlier = lane[None, None, :] < lane[None, :, None]
    above = (other > mine) | ((other == mine) & is_earlier)
    return tl.sum((above & (lane < TOP_K)[None, None, :]).to(tl.int32), axis=2)


@triton.jit(do_not_specialize=["tokens"])  # a prompt of another length must not compile a kernel
def prune_kernel(
    features_ptr, weights_ptr, ids_ptr, thresholds_ptr, slopes_ptr, bias_ptr, expert_features_ptr, renormalize_ptr,
    counts_ptr, out_weights_ptr, out_ids_ptr, tokens,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(tokens / BLOCK_TOKENS),). LANES is TOP_K rounded up to a power of two.

    features         float32  [tokens, RANK]
    weights          float    [tokens, TOP_K]
    ids              int      [tokens, TOP_K]
    thresholds       float32  [TOP_K - 1]
    slopes           float32  [2, TOP_K - 1]
    bias             float32  [EXPERTS]
    expert_features  float32  [EXPERTS, RANK]
    renormalize      float32  []
    counts           int64    [2]              increased: integers, so that the order of programs does not matter
    out_weights      float32  [tokens, TOP_K]
    out_ids          like ids
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    slot, inside = token.to(tl.int64) * TOP_K + lane, (token < tokens) & (lane < TOP_K)
    ids = tl.load(ids_ptr + slot, mask=inside, other=-1)
    chosen = (ids >= 0) & (ids < EXPERTS)
    weights = tl.load(weights_ptr + slot, mask=chosen, other=0.0).to(tl.float32)

    rank = rank_by_weight(weights, TOP_K, LANES)
    droppable = chosen & (rank > 0)
    log_first = tl.log(tl.maximum(tl.max(weights, axis=1), TINY))[:, None]
    score = tl.load(bias_ptr + ids, mask=droppable, other=0.0)
    for i in tl.static_range(RANK):
        feature = tl.load(features_ptr + token.to(tl.int64) * RANK + i, mask=token < tokens, other=0.0)
        score += feature * tl.load(expert_features_ptr + ids * RANK + i, mask=droppable, other=0.0)
    score += tl.load(slopes_ptr + rank - 1, mask=droppable, other=0.0) * tl.log(tl.maximum(weights, TINY))
    score += tl.load(slopes_ptr + TOP_K - 1 + rank - 1, mask=droppable, other=0.0) * log_first
    threshold = tl.load(thresholds_ptr + rank - 1, mask=droppable, other=0.0)
    dropped = droppable & ~(score >= threshold)  # NaN, of a token whose hidden state has one, is not above

    total = tl.sum(weights, axis=1)[:, None]
    kept = tl.sum(tl.where(dropped, 0.0, weights), axis=1)[:, None]
    share = tl.div_rn(total, tl.maximum(kept, TINY)) - 1.0  # rounded correctly: exactly 0 where nothing was dropped
    tl.store(out_weights_ptr + slot, weights * (1.0 + tl.load(renormalize_ptr) * share), mask=inside)
    tl.store(out_ids_ptr + slot, tl.where(chosen & ~dropped, ids, -1), mask=inside)
    tl.atomic_add(counts_ptr, tl.sum(chosen.to(tl.int64)), sem="relaxed")
    tl.atomic_add(counts_ptr + 1, tl.sum(dropped.to(tl.int64)), sem="relaxed")


@torch.library.custom_op("mcmoe::triton_prune_experts", mutates_args=("counts",))
def prune_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    thresholds: torch.Tensor,
    weight_slopes: torch.Tensor,
    expert_bias: torch.Tensor,
    projection: torch.Tensor,
    expert_features: torch.Tensor,
    renormalize: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels.reference.pruning.prune_experts, every pair where it stood; the rule's tensors contiguous.

    Ids beyond the last expert, with which vLLM may pad, are no expert. Shapes alone decide the grid, so it can be
    captured.
    """
    tokens, top_k = topk_ids.shape
    lanes = triton.next_power_of_2(top_k)
    block_tokens = max(1, COMPARISONS_PER_PROGRAM // lanes**2)
    out_weights, out_ids = _like_outputs(topk_weights, topk_ids)
    prune_kernel[(triton.cdiv(tokens, block_tokens),)](
        reference.features(x, projection).contiguous(),
        topk_weights.contiguous(),
        topk_ids.contiguous(),
        thresholds,
        weight_slopes,
        expert_bias,
        expert_features,
        renormalize,
        counts,
        out_weights,
        out_ids,
        tokens,
        EXPERTS=expert_bias.shape[0],
        RANK=projection.shape[0],
        TOP_K=top_k,
        LANES=lanes,
        BLOCK_TOKENS=block_tokens,
    )
    return out_weights, out_ids


def _like_outputs(topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape, device = topk_ids.shape, topk_ids.device
    return (
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=topk_ids.dtype, device=device),
    )


@prune_experts.register_fake
def _(x, topk_weights, topk_ids, *_) -> tuple[torch.Tensor, torch.Tensor]:
    return _like_outputs(topk_weights, topk_ids)
