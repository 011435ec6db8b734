"""The custom op `mcmoe::triton_prune_experts`: online pruning in one launch.

A decode step's MoE layer takes tens of microseconds on a GPU; the thirty small torch operators of the reference would
cost more, even inside a CUDA graph, than skipping an expert gains.
"""

import torch
import triton
import triton.language as tl

from vllm_mcmoe.kernels.reference import pruning as reference

TINY = tl.constexpr(float(reference.TINY))
# Up to this many tokens each has a program, as decoding waits for the slowest; beyond, a program takes several, which
# read the projection together.
FEW_TOKENS = 256
LARGEST_BLOCK = 8
COMPARISONS_PER_PROGRAM = 1024  # of a token's weights with each other: 4 per thread
PRODUCTS_PER_PROGRAM = 8192  # of hidden states and projection, added up over the hidden size: 32 registers per thread
WARPS = 8


@triton.jit
def rank_by_weight(weights, TOP_K: tl.constexpr, LANES: tl.constexpr):
    """weights [tokens, LANES] -> how many of the first TOP_K stand above each, int32: larger, or equal and earlier."""
    lane = tl.arange(0, LANES)
    mine, other = weights[:, :, None], weights[:, None, :]
    is_earlier = lane[None, None, :] < lane[None, :, None]
    above = (other > mine) | ((other == mine) & is_earlier)
    return tl.sum((above & (lane < TOP_K)[None, None, :]).to(tl.int32), axis=2)


@triton.jit
def project(
    x_ptr, projection_ptr, token, tokens,
    HIDDEN: tl.constexpr, RANK: tl.constexpr, RANK_LANES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """projection x of BLOCK_TOKENS tokens, float32 [BLOCK_TOKENS, RANK_LANES]; 0 beyond RANK."""
    rank = tl.arange(0, RANK_LANES)[None, :, None]
    row = token.to(tl.int64)[:, None, None] * HIDDEN
    sums = tl.zeros((BLOCK_TOKENS, RANK_LANES, BLOCK), tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        feature = start + tl.arange(0, BLOCK)[None, None, :]
        inside = feature < HIDDEN
        x = tl.load(x_ptr + row + feature, mask=inside & (token < tokens)[:, None, None], other=0.0).to(tl.float32)
        sums += x * tl.load(projection_ptr + rank * HIDDEN + feature, mask=inside & (rank < RANK), other=0.0)
    # x may be infinite, or no number: 0 times it is no number either
    return tl.where((tl.arange(0, RANK_LANES) < RANK)[None, :], tl.sum(sums, axis=2), 0.0)


@triton.jit(do_not_specialize=["tokens"])  # a prompt of another length must not compile a kernel
def prune_kernel(
    x_ptr, weights_ptr, ids_ptr, thresholds_ptr, slopes_ptr, bias_ptr, projection_ptr, expert_features_ptr,
    renormalize_ptr, counts_ptr, out_weights_ptr, out_ids_ptr, tokens,
    EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr,
    LANES: tl.constexpr, RANK_LANES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(tokens / BLOCK_TOKENS),). LANES and RANK_LANES are TOP_K and RANK rounded up to powers of two.

    x                float    [tokens, HIDDEN]
    weights          float    [tokens, TOP_K]
    ids              int      [tokens, TOP_K]
    thresholds       float32  [TOP_K - 1]
    slopes           float32  [2, TOP_K - 1]
    bias             float32  [EXPERTS]
    projection       float32  [RANK, HIDDEN]   read BLOCK features at a time
    expert_features  float32  [EXPERTS, RANK]
    renormalize      float32  []
    counts           int64    [2]              increased: integers, so that the order of programs does not matter
    out_weights      float32  [tokens, TOP_K]
    out_ids          like ids
    """
    tokens_here = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token, lane = tokens_here[:, None], tl.arange(0, LANES)[None, :]
    slot, inside = token.to(tl.int64) * TOP_K + lane, (token < tokens) & (lane < TOP_K)
    ids = tl.load(ids_ptr + slot, mask=inside, other=-1)
    chosen = (ids >= 0) & (ids < EXPERTS)
    weights = tl.load(weights_ptr + slot, mask=chosen, other=0.0).to(tl.float32)

    rank = rank_by_weight(weights, TOP_K, LANES)
    droppable = chosen & (rank > 0)
    log_first = tl.log(tl.maximum(tl.max(weights, axis=1), TINY))[:, None]
    score = tl.load(bias_ptr + ids, mask=droppable, other=0.0)
    if RANK > 0:
        features = project(x_ptr, projection_ptr, tokens_here, tokens, HIDDEN, RANK, RANK_LANES, BLOCK_TOKENS, BLOCK)
        i = tl.arange(0, RANK_LANES)[None, None, :]
        mine = droppable[:, :, None] & (i < RANK)
        of_experts = tl.load(expert_features_ptr + ids[:, :, None] * RANK + i, mask=mine, other=0.0)
        score += tl.sum(features[:, None, :] * of_experts, axis=2)
    score += tl.load(slopes_ptr + rank - 1, mask=droppable, other=0.0) * tl.log(tl.maximum(weights, TINY))
    score += tl.load(slopes_ptr + TOP_K - 1 + rank - 1, mask=droppable, other=0.0) * log_first
    threshold = tl.load(thresholds_ptr + rank - 1, mask=droppable, other=0.0)
    dropped = droppable & ~(score >= threshold)  # NaN, of a token whose hidden state has one, is not above

    # The compiler may add up these two in different orders: a token that keeps all its experts must not depend on it.
    total = tl.sum(weights, axis=1)
    kept = tl.sum(tl.where(dropped, 0.0, weights), axis=1)
    scale = 1.0 + tl.load(renormalize_ptr) * (tl.div_rn(total, tl.maximum(kept, TINY)) - 1.0)
    scale = tl.where(tl.max(dropped.to(tl.int32), axis=1) > 0, scale, 1.0)
    tl.store(out_weights_ptr + slot, weights * scale[:, None], mask=inside)
    tl.store(out_ids_ptr + slot, tl.where(chosen & ~dropped, ids, -1), mask=inside)
    tl.atomic_add(counts_ptr, tl.sum(chosen.to(tl.int64)), sem="relaxed")
    tl.atomic_add(counts_ptr + 1, tl.sum(dropped.to(tl.int64)), sem="relaxed")


def block_sizes(tokens: int, top_k: int, rank: int) -> tuple[int, int]:
    """Tokens per program, and features of the projection it reads at a time."""
    lanes = triton.next_power_of_2(top_k)
    block_tokens = 1 if tokens <= FEW_TOKENS else min(LARGEST_BLOCK, max(1, COMPARISONS_PER_PROGRAM // lanes**2))
    return block_tokens, max(16, PRODUCTS_PER_PROGRAM // (block_tokens * triton.next_power_of_2(max(rank, 1))))


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
    rank, hidden = projection.shape
    block_tokens, block = block_sizes(tokens, top_k, rank)
    out_weights, out_ids = _like_outputs(topk_weights, topk_ids)
    prune_kernel[(triton.cdiv(tokens, block_tokens),)](
        x.contiguous(),
        topk_weights.contiguous(),
        topk_ids.contiguous(),
        thresholds,
        weight_slopes,
        expert_bias,
        projection,
        expert_features,
        renormalize,
        counts,
        out_weights,
        out_ids,
        tokens,
        EXPERTS=expert_bias.shape[0],
        HIDDEN=hidden,
        RANK=rank,
        TOP_K=top_k,
        LANES=triton.next_power_of_2(top_k),
        RANK_LANES=triton.next_power_of_2(max(rank, 1)),
        BLOCK_TOKENS=block_tokens,
        BLOCK=block,
        num_warps=WARPS,
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
