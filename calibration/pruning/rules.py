"""Calibrating a pruning rule for every layer of a model.

rules = calibrate_rules(LayerwiseModel(open_weights(checkpoint)), tokens, "otp", 0.25)
"""

import math

import torch

from vllm_mcmoe.calibration.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.models import MoeModel
from vllm_mcmoe.calibration.pruning.costs import (
    RoutedTokens,
    best_renormalization,
    drop_costs,
    mask_costs,
    routed_tokens,
)
from vllm_mcmoe.calibration.pruning.layer_scales import layer_scales, measured_costs
from vllm_mcmoe.calibration.pruning.odp import RatioCurves, allocated_thresholds, measure_curves
from vllm_mcmoe.calibration.pruning.otp import global_thresholds, sample_scores, train_mask_router
from vllm_mcmoe.errors import PruningError
from vllm_mcmoe.pruning import METHODS, LayerPruning, PruningRules, check_target, ratio_pruning

LEVEL_STEP = 0.025


def target_levels(top_k: int) -> tuple[float, ...]:
    """The fractions thresholds are stored for: every LEVEL_STEP up to all activations but each token's first."""
    largest = (top_k - 1) / top_k
    steps = int(largest / LEVEL_STEP)
    return tuple(sorted({0.0, *(round(step * LEVEL_STEP, 6) for step in range(1, steps + 1)), largest}))


def check_request(method: str, target: float, model: MoeModel) -> None:
    """Raises PruningError for an unknown method, a target out of reach, or a model that routes to one expert."""
    if method not in METHODS:
        raise PruningError(f"pruning method {method!r} is not one of {', '.join(METHODS)}.")
    if model.top_k < 2:
        raise PruningError(
            f"{model.path} selects one expert per token, which is always kept: there is nothing to prune."
        )
    check_target(target, model.top_k)


def calibrate_rules(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    method: str,
    target: float,
    *,
    seed: int = 0,
    show_progress: bool = True,
) -> PruningRules:
    """Rules of a method for any target, with `target` as their own. tokens: int64 [sequences, length].

    One layer is in memory at a time, its router is trained while it is there. Raises as check_request does.
    """
    check_request(method, target, model.description)
    top_k, num_experts = model.description.top_k, model.description.num_experts
    levels = target_levels(top_k)
    tensors: dict[str, torch.Tensor] = {}
    curves: dict[str, RatioCurves] = {}
    samples: dict[str, torch.Tensor] = {}
    trials: dict[str, LayerPruning] = {}
    predicted: dict[str, float] = {}
    for layer in routed_tokens(model, tokens, seed=seed, show_progress=show_progress):
        keep, cut = typical_mask(layer, target)
        renormalize = best_renormalization(layer, keep)
        trials[layer.name] = ratio_pruning(cut.expand(top_k - 1), renormalize, num_experts, model.description.hidden)
        predicted[layer.name] = float(mask_costs(layer, keep, renormalize).double().mean())
        tensors[f"{layer.name}.renormalize"] = renormalize
        if method == "odp":
            curves[layer.name] = measure_curves(layer, renormalize)
        else:
            router = train_mask_router(layer, drop_costs(layer, renormalize), num_experts, seed=seed)
            samples[layer.name] = sample_scores(layer, router)
            tensors |= {f"{layer.name}.{name}": tensor for name, tensor in router.items()}
    scales = layer_scales(measured_costs(model, tokens, trials, show_progress=show_progress), predicted)
    if method == "odp":
        thresholds = allocated_thresholds({n: c.scaled(scales[n]) for n, c in curves.items()}, levels, top_k)
    else:
        for name, scale in scales.items():  # scores are logarithms of costs
            tensors[f"{name}.expert_bias"] += math.log(scale)
            samples[name] += math.log(scale)
        shared = global_thresholds(samples.values(), levels, top_k)
        thresholds = {name: shared[:, None].repeat(1, top_k - 1) for name in samples}
    tensors |= {f"{name}.thresholds": layer for name, layer in thresholds.items()}
    return PruningRules.create(method, target, top_k, levels, tensors)


def typical_mask(layer: RoutedTokens, target: float) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [N, k], the layer's smallest ratios dropped until the fraction is reached, and the ratio where they end.

    A target of 0 stands for half of what is possible.
    """
    top_k = layer.weights.shape[1]
    share = (target * top_k / (top_k - 1)) or 0.5
    ratios = layer.ratios.flatten()
    cut = ratios.sort().values[min(int(share * len(ratios)), len(ratios) - 1)]
    return torch.cat((torch.ones(len(layer.x), 1, dtype=torch.bool), layer.ratios >= cut), dim=-1), cut


def layer_rules(rules: PruningRules, model: MoeModel, target: float) -> dict[str, LayerPruning]:
    """Layer name -> its rule. Raises FormatError for rules of another model."""
    return {
        name: rules.layer(name, target, top_k=model.top_k, num_experts=model.num_experts, hidden_size=model.hidden)
        for name in model.moe_layers.values()
    }
