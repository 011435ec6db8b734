"""Online pruning of routed experts in plain torch: the definition every backend's version is tested against.

The experts of a token are ranked by routing weight. Rank 0 is kept; rank r > 0, expert e, is kept where

    slope_r log w_r + slope'_r log w_0 + expert_bias_e + expert_features_e . (projection x) >= threshold_r

and the kept weights take over the share `renormalize` of what was dropped.
"""

import torch

TINY = torch.finfo(torch.float32).tiny  # rows of padding may have routing weights of 0


def features(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """What a score looks at besides the routing weights: projection x, float32 [T, rank]. x [T, hidden], projection
    float32 [rank, hidden]."""
    if projection.shape[0] == 0:
        return x.new_empty((x.shape[0], 0), dtype=torch.float32)
    return x.float() @ projection.t()


def scores(
    features: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    weight_slopes: torch.Tensor,
    expert_bias: torch.Tensor,
    expert_features: torch.Tensor,
) -> torch.Tensor:
    """The left side above for ranks 1, 2, ... -> float32 [T, k - 1].

    features [T, rank]; weights, ids [T, k], largest weight first, -1 for no expert; weight_slopes [2, k - 1];
    expert_bias [experts]; expert_features [experts, rank]. All float32 but ids.
    """
    logs = weights.clamp_min(TINY).log()
    of_experts = expert_bias
    if features.shape[1]:
        of_experts = features @ expert_features.t() + expert_bias
    of_experts = of_experts.expand(len(ids), -1).gather(-1, ids[:, 1:].clamp_min(0).long())
    return of_experts + weight_slopes[0] * logs[:, 1:] + weight_slopes[1] * logs[:, :1]


def by_weight(topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 weights and ids [T, k], largest weight first: routers do not always sort them. No expert, no weight."""
    weights = torch.where(topk_ids >= 0, topk_weights.float(), 0.0)
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    return weights, topk_ids.gather(-1, order)


def renormalized(weights: torch.Tensor, keep: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """weights [T, k] scaled so that the kept ones take over a share of what was dropped.

    A token of which nothing was dropped keeps its weights bit for bit, in whatever order a device adds them up.
    """
    total = weights.sum(dim=-1, keepdim=True)
    kept = (weights * keep).sum(dim=-1, keepdim=True)
    scaled = weights * (1 + strength * (total / kept.clamp_min(TINY) - 1))
    return torch.where(keep.all(dim=-1, keepdim=True), weights, scaled)


def drop(
    weights: torch.Tensor,
    ids: torch.Tensor,
    above_first: torch.Tensor,
    renormalize: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the decision above_first, bool [T, k - 1], to weights and ids [T, k] in order of weight.

    counts, int64 [2], is increased by the experts seen and dropped; ids of -1 are neither.
    """
    first = above_first.new_ones(len(ids), 1)
    keep = torch.cat((first, above_first), dim=-1) | (ids < 0)
    counts += torch.stack(((ids >= 0).sum(), (~keep).sum()))
    return renormalized(weights, keep, renormalize), torch.where(keep, ids, -1)


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
    """x [T, hidden], topk_weights float and topk_ids integer [T, k] in any order -> float32 weights and ids, largest
    weight first, -1 for dropped experts; other backends return the pairs in any order. thresholds float32 [k - 1],
    projection float32 [rank, hidden], renormalize float32 [], counts int64 [2] is written."""
    weights, ids = by_weight(topk_weights, topk_ids)
    found = scores(
        features(x, projection),
        weights,
        ids,
        weight_slopes=weight_slopes,
        expert_bias=expert_bias,
        expert_features=expert_features,
    )
    return drop(weights, ids, found >= thresholds, renormalize, counts)
