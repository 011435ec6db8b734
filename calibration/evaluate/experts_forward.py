"""A layer's experts as the kernels compute them: inputs rounded to int8, the pairs that pruning drops left out."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer, ExpertsForward
from vllm_mcmoe.kernels.packing import from_groups, to_groups
from vllm_mcmoe.kernels.reference import quantize_activations
from vllm_mcmoe.pruning import LayerPruning, PruningRules


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels' int8 activations represent it. float [n, K] -> float32 [n, K].

    A kernel's exact integer sums, scaled, equal the float product of these values with the dequantised weights, so
    rounding the inputs is all it takes to compute what the kernels compute.
    """
    codes, scales = quantize_activations(to_groups(x).flatten(-2))
    return from_groups(to_groups(codes) * scales[..., None], x.shape[-1])


def pruned_layer(layer: DecoderLayer, pruner: LayerPruning) -> AbstractContextManager[None]:
    """Within the block the layer's experts are pruned, with float activations."""
    return layer.experts_forward(experts_forward(layer, torch.Tensor.float, pruner))


def experts_forward(
    layer: DecoderLayer,
    round_inputs: Callable[[torch.Tensor], torch.Tensor],
    pruner: LayerPruning | None,
) -> ExpertsForward:
    """The experts of a layer as the kernels compute them: inputs rounded, dropped pairs left out. The pruner is moved
    to the layer's device."""
    if pruner is not None:
        pruner.to(layer.device)

    def forward(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        if pruner is not None:
            topk_weights, topk_ids = pruner(x, topk_weights, topk_ids)
        rounded = round_inputs(x)
        out = torch.zeros_like(x)
        for number in topk_ids.unique().tolist():
            if number < 0:
                continue
            index, slot = (topk_ids == number).nonzero(as_tuple=True)
            expert = layer.expert(number)
            y = expert.output(round_inputs(expert.intermediate(rounded[index])))
            out.index_add_(0, index, y * topk_weights[index, slot, None])
        return out

    return forward


def layer_rules(rules: PruningRules, model: MoeModel, target: float) -> dict[str, LayerPruning]:
    """Layer name -> its rule. Raises FormatError for rules of another model."""
    return {
        name: rules.layer(
            name, target, top_k=model.top_k, num_experts=model.num_experts, hidden_size=model.expert_hidden
        )
        for name in model.moe_layers.values()
    }
