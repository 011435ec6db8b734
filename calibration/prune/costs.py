"""What leaving out a selected expert costs, in nats, at every token of a calibration text.

With g the gradient of the loss at a MoE layer's output (`sensitivity.py`) and E_j(x) the output of the token's expert
of rank j, routing weight w_j, a change dy of the layer's output costs 1/2 (g . dy)^2 to second order. Dropping experts
changes it by

    dy = s sum_kept w_j E_j - sum_all w_j E_j,      s = 1 + renormalize (W_all / W_kept - 1)

so the k products g . E_j(x) of a token are all that any rule's cost needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mcmoe.calibration.measure.expert_tokens import MoeInputs
from vllm_mcmoe.calibration.measure.sensitivity import backward_traces
from vllm_mcmoe.calibration.model.activations import Rows
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer, LayerwiseModel
from vllm_mcmoe.kernels.reference.pruning import TINY, by_weight, renormalized


@dataclass(frozen=True)
class RoutedTokens:
    """One MoE layer's N calibration tokens, in host memory; experts of a token are ordered by routing weight, largest
    first.

    x         float32 [N, hidden], what the experts are called with, a tensor or rows on disk
    weights   float32 [N, k], the routing weights that multiply the experts' outputs
    ids       int64   [N, k]
    products  float32 [N, k], g . E_j(x)
    """

    name: str
    x: Rows
    weights: torch.Tensor
    ids: torch.Tensor
    products: torch.Tensor

    @property
    def ratios(self) -> torch.Tensor:
        """float32 [N, k - 1], w_r / w_0."""
        return self.weights[:, 1:] / self.weights[:, :1].clamp_min(TINY)


def routed_tokens(model: LayerwiseModel, tokens: torch.Tensor, **options: Any) -> Iterator[RoutedTokens]:
    """Every MoE layer's tokens, last layer first. tokens and options are backward_traces'."""
    for trace in backward_traces(model, tokens, **options):
        weights, ids = by_weight(trace.inputs.topk_weights, trace.inputs.topk_ids)
        inputs = MoeInputs(trace.inputs.x, ids, weights, trace.inputs.device)
        products = _gradient_products(trace.layer, inputs, trace.gradients)
        yield RoutedTokens(trace.name, inputs.x, weights, ids, products)


def _gradient_products(layer: DecoderLayer, inputs: MoeInputs, gradients: Rows) -> torch.Tensor:
    """g . E_j(x) = (D^T g) . h + g . b with b the down projection's bias, float32 [N, k]."""
    products = torch.zeros_like(inputs.topk_weights)
    for expert in range(len(layer.gate_up)):
        index, slot = (inputs.topk_ids == expert).nonzero(as_tuple=True)
        x, gradient = inputs.x[index].to(inputs.device), gradients[index].to(inputs.device)
        computed = layer.expert(expert)
        found = ((gradient @ computed.down) * computed.intermediate(x)).sum(-1)
        if computed.down_bias is not None:
            found += gradient @ computed.down_bias
        products[index, slot] = found.cpu()
    return products


def mask_costs(tokens: RoutedTokens, keep: torch.Tensor, renormalize: torch.Tensor) -> torch.Tensor:
    """Nats each token loses when only the experts in keep (bool [N, k]) are computed. -> float32 [N]."""
    after = renormalized(tokens.weights, keep, renormalize) * keep
    return 0.5 * ((after - tokens.weights) * tokens.products).sum(-1).square()


def drop_costs(tokens: RoutedTokens, renormalize: torch.Tensor) -> torch.Tensor:
    """What dropping rank r adds when all later ranks are dropped already. -> float32 [N, k - 1] for ranks 1, 2, ...

    Summed over the ranks from r on, these are exactly the cost of keeping the first r experts. A single entry may be
    negative where two experts' errors cancel.
    """
    top_k = tokens.weights.shape[1]
    ranks = torch.arange(top_k)
    totals = [mask_costs(tokens, (ranks < kept).expand_as(tokens.weights), renormalize) for kept in range(1, top_k + 1)]
    return torch.stack([totals[i] - totals[i + 1] for i in range(top_k - 1)], dim=-1)


def best_renormalization(tokens: RoutedTokens, keep: torch.Tensor) -> torch.Tensor:
    """The strength in [0, 1] that costs least when the experts in keep are computed. -> float32 [].

    The cost is quadratic in it: dy = strength * b - c, so the minimum is sum(b c) / sum(b b).
    """
    weighted = tokens.weights * tokens.products
    kept_weight = (tokens.weights * keep).sum(-1).clamp_min(TINY)
    b = (tokens.weights.sum(-1) / kept_weight - 1) * (weighted * keep).sum(-1)
    c = (weighted * ~keep).sum(-1)
    b, c = b.double(), c.double()
    return ((b * c).sum() / (b * b).sum().clamp_min(1e-30)).clamp(0, 1).float()
