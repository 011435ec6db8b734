"""ODP: thresholds on the routing weight relative to a token's largest, w_r / w_0.

The paper (MC-MoE, section 3.3) takes the median in every layer. Layers and ranks differ in what pruning costs them, so
here one fraction for the model is divided among them: every (layer, rank) has a curve, cost against the share of its
smallest ratios dropped, and the sum of costs is minimised for the total share. On the curves' lower convex hulls the
greedy order of segments by slope is the exact optimum, for every target at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from vllm_mcmoe.calibration.prune.costs import RoutedTokens, drop_costs

GRID = 100  # steps of 1% of a rank's activations: a quantile of 128 x 2048 tokens is known far better than that


@dataclass(frozen=True)
class RatioCurves:
    """One layer. Column q of GRID + 1: when the share q / GRID of a rank's activations, smallest ratios first, is
    dropped.

    ratios  float32 [k - 1, GRID + 1], the threshold that drops this share
    costs   float64 [k - 1, GRID + 1], nats per token it costs
    """

    ratios: torch.Tensor
    costs: torch.Tensor


def measure_curves(tokens: RoutedTokens, renormalize: torch.Tensor) -> RatioCurves:
    """The curves of one layer from its calibration tokens."""
    ordered, order = tokens.ratios.t().sort(dim=-1)
    costs = drop_costs(tokens, renormalize).t().double().gather(-1, order)
    count = ordered.shape[-1]
    dropped = torch.linspace(0, count, GRID + 1).round().long()
    cumulative = torch.cat((torch.zeros(len(costs), 1, dtype=torch.float64), costs.cumsum(-1)), dim=-1)
    return RatioCurves(ordered[:, dropped.clamp(max=count - 1)], cumulative[:, dropped] / count)


def uniform_thresholds(
    curves: Mapping[str, RatioCurves], levels: Sequence[float], top_k: int
) -> dict[str, torch.Tensor]:
    """The paper's rule for any fraction: the same quantile in every layer and rank. -> layer -> [levels, k - 1]."""
    shares = torch.tensor(levels) * top_k / (top_k - 1)
    return {
        name: torch.stack([_at(layer.ratios, share.expand(top_k - 1)) for share in shares])
        for name, layer in curves.items()
    }


def allocated_thresholds(
    curves: Mapping[str, RatioCurves], levels: Sequence[float], top_k: int
) -> dict[str, torch.Tensor]:
    """Thresholds of least total cost for each level, the fraction of all expert activations dropped.

    -> layer -> float32 [levels, k - 1].
    """
    names = list(curves)
    costs = torch.cat([curves[name].costs for name in names])
    shares = divide_budget(costs, [level * top_k / (top_k - 1) for level in levels])
    by_layer = shares.unflatten(1, (len(names), top_k - 1))
    return {
        name: torch.stack([_at(curves[name].ratios, row) for row in by_layer[:, i]]) for i, name in enumerate(names)
    }


def divide_budget(costs: torch.Tensor, mean_shares: Sequence[float]) -> torch.Tensor:
    """Share of each curve to drop so that their mean is as asked and the summed cost is least.

    costs: float64 [curves, GRID + 1] cumulative; mean_shares ascending in [0, 1]. -> float64 [len(mean_shares), curves]
    """
    segments = sorted(
        (slope, curve, width) for curve, row in enumerate(costs.tolist()) for slope, width in _hull_segments(row)
    )
    result, shares, spent = [], torch.zeros(len(costs), dtype=torch.float64), 0.0
    position, used = 0, 0.0  # `used` of the segment at `position` is spent
    for mean in mean_shares:
        budget = mean * len(costs)
        while position < len(segments) and budget - spent > 1e-12:
            _, curve, width = segments[position]
            step = min(width - used, budget - spent)
            shares[curve] += step
            spent, used = spent + step, used + step
            if width - used <= 1e-12:
                position, used = position + 1, 0.0
        result.append(shares.clone())
    return torch.stack(result)


def _hull_segments(cumulative: list[float]) -> list[tuple[float, float]]:
    """(slope, width) of the lower convex hull of a curve over [0, 1], slopes ascending."""
    hull: list[int] = []
    for right in range(len(cumulative)):
        while len(hull) > 1:
            first, middle = hull[-2], hull[-1]
            rise = (cumulative[right] - cumulative[first]) * (middle - first)
            if (cumulative[middle] - cumulative[first]) * (right - first) < rise:
                break
            hull.pop()
        hull.append(right)
    steps = len(cumulative) - 1
    return [((cumulative[b] - cumulative[a]) * steps / (b - a), (b - a) / steps) for a, b in pairwise(hull)]


def _at(ratios: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Ratios of a layer's ranks at a share of each. ratios [k - 1, GRID + 1], shares [k - 1] -> float32 [k - 1]."""
    position = (shares * GRID).clamp(0, GRID)
    low = position.floor().long().clamp(max=GRID - 1)
    pairs = ratios.gather(1, torch.stack((low, low + 1), dim=-1))
    return torch.lerp(pairs[:, 0], pairs[:, 1], (position - low).float())
