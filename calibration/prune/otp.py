"""OTP: a mask router per layer that learns what dropping an expert would cost a token.

MC# (arXiv 2510.10962) trains a mask m over the selected experts by distilling the unpruned model with a sparsity term,

    loss(m, lambda) = cost(m) / lambda + |m|_1

with Gumbel noise and an annealed temperature to reach hard masks, and one training per lambda. Here the cost of a mask
is known at every token to second order (`costs.py`), so neither is needed: with a score f = log(predicted cost) and the
hard mask "keep where f >= log(lambda)", the loss integrates over all lambda (d lambda / lambda) in closed form,

    integral = cost exp(-f) + f + constant

the expectation of which is least where exp(f) is the expected cost. One training so serves every target. Masks sampled
with Gumbel noise have the same optimum and add noise of their own (`benchmarks/mask_router_training.py` compares).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from vllm_mcmoe.calibration.prune.costs import RoutedTokens
from vllm_mcmoe.kernels.reference.pruning import features, scores
from vllm_mcmoe.pruning import ROUTER_TENSORS

# On the reference model, predicted cost of held-out tokens after training on 8 to 120 thousand:
RANK = 8  # 1 loses a third of what the hidden state adds to the routing weights, 16 adds nothing
STEPS = 200  # 600 steps were no better with 120 thousand tokens, and overfitted with 8 and 30 thousand
BATCH_TOKENS = 1024
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
# The cost of single tokens is heavy-tailed; none of them may decide a step.
LARGEST_STEP = 1.0  # gradient norm
LARGEST_RELATIVE_COST = 1e4
PRIOR_TOKENS = 100  # an expert with fewer activations than this starts nearer to the layer's average than to its own


class MaskRouter(nn.Module):
    """A rule's ROUTER_TENSORS as parameters, starting at cost = w_r^2 * mean cost of the expert per w^2."""

    def __init__(self, tokens: RoutedTokens, costs: torch.Tensor, num_experts: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        hidden, ranks = tokens.x[:1].shape[1], costs.shape[1]
        self.expert_bias = nn.Parameter(_mean_cost(tokens, costs, num_experts).log().float())
        self.weight_slopes = nn.Parameter(torch.stack((torch.full((ranks,), 2.0), torch.zeros(ranks))))
        self.projection = nn.Parameter(torch.randn(RANK, hidden, generator=generator) * hidden**-0.5)
        self.expert_features = nn.Parameter(torch.zeros(num_experts, RANK))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name).detach().clone() for name in ROUTER_TENSORS}

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return router_scores(x, weights, ids, dict(self.named_parameters()))


def router_scores(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, router: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Log of the predicted cost of ranks 1, 2, ... -> float32 [T, k - 1]. weights, ids [T, k], largest weight first."""
    rest = {name: tensor for name, tensor in router.items() if name != "projection"}
    return scores(features(x, router["projection"]), weights, ids, **rest)


def _mean_cost(tokens: RoutedTokens, costs: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Nats per squared routing weight of every expert, float64 [experts], drawn towards the layer's mean."""
    experts = tokens.ids[:, 1:].flatten()
    sums = torch.zeros(2, num_experts, dtype=torch.float64)
    sums[0].index_add_(0, experts, costs.flatten().double())
    sums[1].index_add_(0, experts, tokens.weights[:, 1:].flatten().double().square())
    prior = sums.sum(dim=1, keepdim=True) * (PRIOR_TOKENS / costs.numel())
    cost, squared_weight = (sums + prior).clamp_min(1e-30)
    return cost / squared_weight


def train_mask_router(
    tokens: RoutedTokens, costs: torch.Tensor, num_experts: int, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Fit one layer's router. costs: float32 [N, k - 1] of costs.drop_costs. -> ROUTER_TENSORS, float32."""
    router = MaskRouter(tokens, costs, num_experts, seed)
    optimizer = torch.optim.AdamW(router.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(STEPS):
            batch = torch.randint(len(costs), (min(BATCH_TOKENS, len(costs)),), generator=generator)
            score = router(tokens.x[batch], tokens.weights[batch], tokens.ids[batch])
            relative = (costs[batch] * (-score).exp()).clamp(max=LARGEST_RELATIVE_COST)
            loss = (relative + score).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(router.parameters(), LARGEST_STEP)
            optimizer.step()
            schedule.step()
    return router.tensors()


SAMPLED_TOKENS = 16384  # per layer, for the model's quantiles


def sample_scores(tokens: RoutedTokens, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The trained router's scores of up to SAMPLED_TOKENS tokens, evenly spaced. -> float32 [n, k - 1]."""
    count = min(SAMPLED_TOKENS, len(tokens.x))
    chosen = torch.arange(count) * len(tokens.x) // count
    return router_scores(tokens.x[chosen], tokens.weights[chosen], tokens.ids[chosen], tensors)


def global_thresholds(samples: Iterable[torch.Tensor], levels: Sequence[float], top_k: int) -> torch.Tensor:
    """One threshold for all layers and ranks per level, float32 [levels]: scores are nats everywhere, so the cheapest
    activations of the whole model go first."""
    scores = torch.cat([sample.flatten() for sample in samples]).sort().values
    position = torch.tensor(levels) * top_k / (top_k - 1) * len(scores)
    return scores[position.round().long().clamp(0, len(scores) - 1)]
