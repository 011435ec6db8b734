"""One MoE layer seen from its experts: which tokens reach which expert, and the second moments GPTQ needs of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_mcmoe.calibration.gptq import HessianFactor
from vllm_mcmoe.calibration.layerwise import DecoderLayer
from vllm_mcmoe.calibration.recipes import Recipe

Activation = Callable[[torch.Tensor], torch.Tensor]

# Below one token per column of a group, a group's Hessian is singular and says more about damping than about inputs.
MIN_EXPERT_TOKENS = 128
POOL_TOKENS = 4096  # tokens standing for the whole layer; 16 per input of a 256-wide Hessian, cheap everywhere


@dataclass(frozen=True)
class MoeInputs:
    """What a layer's experts are called with, for all N calibration tokens.

    x             float32 [N, hidden]
    topk_ids      int64   [N, top_k]
    topk_weights  float32 [N, top_k], the routing weights that multiply the experts' outputs
    """

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.x)


def moe_inputs(layer: DecoderLayer, hidden: list[torch.Tensor]) -> MoeInputs:
    """Run a decoder layer up to its experts. hidden: the layer's input batches."""
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def record(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        calls.append((x, topk_ids, topk_weights.float()))
        return torch.zeros_like(x)

    with torch.no_grad(), layer.experts_forward(record):
        for batch in hidden:
            layer(batch)
    return MoeInputs(*(torch.cat(parts) for parts in zip(*calls, strict=True)))


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens of one expert.

    index           int64   [n], positions among the layer's N tokens
    x               float32 [n, hidden]
    routing_weight  float32 [n]
    pooled          these are tokens of the whole layer, because the expert has too few of its own
    """

    index: torch.Tensor
    x: torch.Tensor
    routing_weight: torch.Tensor
    pooled: bool = False

    def __len__(self) -> int:
        return len(self.index)

    def at_most(self, count: int) -> "ExpertTokens":
        """count of the tokens, evenly spaced, or all if there are no more."""
        if len(self) <= count:
            return self
        chosen = _evenly_spaced(len(self), count)
        return ExpertTokens(self.index[chosen], self.x[chosen], self.routing_weight[chosen], self.pooled)


def _evenly_spaced(total: int, count: int) -> torch.Tensor:
    return torch.arange(count) * total // count


def tokens_of(inputs: MoeInputs, expert: int) -> ExpertTokens:
    """The tokens routed to an expert."""
    index, slot = (inputs.topk_ids == expert).nonzero(as_tuple=True)
    return ExpertTokens(index, inputs.x[index], inputs.topk_weights[index, slot])


def calibration_tokens(inputs: MoeInputs, expert: int) -> ExpertTokens:
    """The tokens an expert's Hessians are made of.

    Its own; with fewer than MIN_EXPERT_TOKENS of them, up to POOL_TOKENS of the layer's tokens instead, evenly spaced
    and all of routing weight 1: an expert that calibration hardly saw is then quantised for the layer's typical input,
    and the second moment keeps full rank.
    """
    own = tokens_of(inputs, expert)
    if len(own) >= MIN_EXPERT_TOKENS:
        return own
    index = _evenly_spaced(inputs.num_tokens, min(POOL_TOKENS, inputs.num_tokens))
    return ExpertTokens(index, inputs.x[index], torch.ones(len(index)), pooled=True)


def hessian_weights(tokens: ExpertTokens, weighting: str, gradient_norms: torch.Tensor | None) -> torch.Tensor | None:
    """Weight of each token in its expert's Hessians, float32 [n], None for all alike.

    weighting: as Recipe.hessian_weighting. gradient_norms: float32 [N], squared norms of the loss gradient at the
    layer's output, needed for "gradient".
    """
    if weighting == "none":
        return None
    weights = tokens.routing_weight.square()
    if weighting == "gradient":
        weights = weights * gradient_norms[tokens.index]
    return weights


def second_moment(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """sum_t weight_t x_t x_t^T: x float32 [n, in] -> [in, in]."""
    return (x if weights is None else x * weights[:, None]).t() @ x


def build_factor(x: torch.Tensor, weights: torch.Tensor | None, recipe: Recipe, name: str) -> HessianFactor:
    return HessianFactor.build(second_moment(x, weights), recipe.gptq, name=name)


def intermediate(x: torch.Tensor, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate x) * up x. x: [n, hidden], gate_up: [2*intermediate, hidden] -> [n, intermediate]."""
    gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
    return activation(gate).mul_(up)
