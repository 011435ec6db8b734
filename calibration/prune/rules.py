"""Calibrating a pruning rule for every layer of a model.

rules = calibrate_rules(LayerwiseModel(open_weights(checkpoint)), tokens, "otp", 0.25)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file

from vllm_mcmoe.calibration.checkpoint.workdir import WorkDirectory
from vllm_mcmoe.calibration.common.files import write_atomically
from vllm_mcmoe.calibration.model.activations import ActivationStore
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.prune.costs import RoutedTokens, best_renormalization, drop_costs, mask_costs, routed_tokens
from vllm_mcmoe.calibration.prune.layer_scales import layer_scales, measured_costs
from vllm_mcmoe.calibration.prune.odp import RatioCurves, allocated_thresholds, measure_curves
from vllm_mcmoe.calibration.prune.otp import global_thresholds, sample_scores, train_mask_router
from vllm_mcmoe.errors import PruningError
from vllm_mcmoe.pruning import METHODS, ROUTER_TENSORS, PruningRules, check_target, ratio_pruning

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


@dataclass(frozen=True)
class LayerCalibration:
    """What one layer's tokens told.

    predicted_cost  nats per token of dropping what the typical mask drops
    tensors         "renormalize" []; "cut" [], the ratio where the typical mask ends; for ODP "ratios" and "costs" of
                    its RatioCurves; for OTP the router's tensors and "scores" of sampled tokens
    """

    predicted_cost: float
    tensors: dict[str, torch.Tensor]


def calibrate_rules(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    method: str,
    target: float,
    *,
    seed: int = 0,
    store: ActivationStore | None = None,
    work: WorkDirectory | None = None,
    show_progress: bool = True,
) -> PruningRules:
    """Rules of a method for any target, with `target` as their own. tokens: int64 [sequences, length].

    One layer is in memory at a time, its router is trained while it is there.

    store  where activations are kept; memory if not given
    work   where finished layers are kept, so that the next run goes on from there

    Raises as check_request does.
    """
    check_request(method, target, model.description)
    top_k, levels = model.description.top_k, target_levels(model.description.top_k)
    names = model.description.moe_layers.values()
    layers = {name: layer for name in names if (layer := _load_layer(work, name)) is not None}
    options = {"store": store, "measured": frozenset(layers), "seed": seed, "show_progress": show_progress}
    for layer in routed_tokens(model, tokens, **options):
        layers[layer.name] = _calibrate_layer(layer, method, target, model.description.num_experts, seed)
        _save_layer(work, layer.name, layers[layer.name])
    layers = {name: layers[name] for name in names}  # a backward sweep takes the last layer first
    scales = _layer_scales(model, tokens, layers, show_progress)
    thresholds = (_ratio_thresholds if method == "odp" else _score_thresholds)(layers, scales, levels, top_k)
    tensors = {f"{name}.thresholds": layer for name, layer in thresholds.items()}
    for name, layer in layers.items():
        for part in ("renormalize", *(ROUTER_TENSORS if method == "otp" else ())):
            tensors[f"{name}.{part}"] = layer.tensors[part]
    return PruningRules.create(method, target, top_k, levels, tensors)


def _calibrate_layer(layer: RoutedTokens, method: str, target: float, num_experts: int, seed: int) -> LayerCalibration:
    keep, cut = typical_mask(layer, target)
    renormalize = best_renormalization(layer, keep)
    tensors = {"renormalize": renormalize, "cut": cut}
    if method == "odp":
        curves = measure_curves(layer, renormalize)
        tensors |= {"ratios": curves.ratios, "costs": curves.costs}
    else:
        router = train_mask_router(layer, drop_costs(layer, renormalize), num_experts, seed=seed)
        tensors |= router | {"scores": sample_scores(layer, router)}
    return LayerCalibration(float(mask_costs(layer, keep, renormalize).double().mean()), tensors)


def _save_layer(work: WorkDirectory | None, name: str, layer: LayerCalibration) -> None:
    if work is not None:
        path = work.path / f"pruning-{name}.safetensors"
        write_atomically(path, lambda file: save_file({n: t.contiguous() for n, t in layer.tensors.items()}, file))
        work.save(f"pruning-{name}", {"predicted_cost": layer.predicted_cost}, [path])


def _load_layer(work: WorkDirectory | None, name: str) -> LayerCalibration | None:
    document = None if work is None else work.load(f"pruning-{name}")
    if document is None:
        return None
    return LayerCalibration(document["predicted_cost"], load_file(work.path / f"pruning-{name}.safetensors"))


def _layer_scales(
    model: LayerwiseModel, tokens: torch.Tensor, layers: Mapping[str, LayerCalibration], show_progress: bool
) -> dict[str, float]:
    description = model.description
    trials = {
        name: ratio_pruning(
            layer.tensors["cut"].expand(description.top_k - 1),
            layer.tensors["renormalize"],
            description.num_experts,
            description.expert_hidden,
        )
        for name, layer in layers.items()
    }
    measured = measured_costs(model, tokens, trials, show_progress=show_progress)
    return layer_scales(measured, {name: layer.predicted_cost for name, layer in layers.items()})


def _ratio_thresholds(
    layers: Mapping[str, LayerCalibration], scales: Mapping[str, float], levels: Sequence[float], top_k: int
) -> dict[str, torch.Tensor]:
    """ODP: layer -> float32 [levels, k - 1], ratios."""
    curves = {
        name: RatioCurves(layer.tensors["ratios"], layer.tensors["costs"] * scales[name])
        for name, layer in layers.items()
    }
    return allocated_thresholds(curves, levels, top_k)


def _score_thresholds(
    layers: Mapping[str, LayerCalibration], scales: Mapping[str, float], levels: Sequence[float], top_k: int
) -> dict[str, torch.Tensor]:
    """OTP: layer -> float32 [levels, k - 1]. Scores are logarithms of costs, so a scale moves a layer's threshold."""
    shifts = {name: math.log(scale) for name, scale in scales.items()}
    shared = global_thresholds(
        [layer.tensors["scores"] + shifts[name] for name, layer in layers.items()], levels, top_k
    )
    return {name: (shared - shifts[name])[:, None].repeat(1, top_k - 1) for name in layers}


def typical_mask(layer: RoutedTokens, target: float) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [N, k], the layer's smallest ratios dropped until the fraction is reached, and the ratio where they end.

    A target of 0 stands for half of what is possible.
    """
    top_k = layer.weights.shape[1]
    share = (target * top_k / (top_k - 1)) or 0.5
    ratios = layer.ratios.flatten()
    cut = ratios.sort().values[min(int(share * len(ratios)), len(ratios) - 1)]
    return torch.cat((torch.ones(len(layer.x), 1, dtype=torch.bool), layer.ratios >= cut), dim=-1), cut
