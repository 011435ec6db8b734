"""Calibration: a 16-bit model and text in, factors.json out.

    factors = calibrate(model_dir, ["c4.jsonl"], recipe="mcmoe")        # everything is measured on the same tokens
    factors.save("factors.json")

For every expert: how often it is used, its routing weights, and what quantising it to each width costs, as an error of
the layer's output (the paper's eps) and as a predicted increase of the loss (`sensitivity.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_mcmoe.calibration.checkpoint.size import decided_bytes
from vllm_mcmoe.calibration.checkpoint.workdir import WorkDirectory
from vllm_mcmoe.calibration.common.files import write_atomically
from vllm_mcmoe.calibration.common.progress import Log
from vllm_mcmoe.calibration.common.threads import side_by_side
from vllm_mcmoe.calibration.measure.expert_errors import ExpertMeasurement, measure_expert
from vllm_mcmoe.calibration.measure.expert_tokens import evenly_spaced, experts_at_once
from vllm_mcmoe.calibration.measure.factors import Factors, LayerFactors
from vllm_mcmoe.calibration.measure.linear_errors import LinearMeasurer, table_of
from vllm_mcmoe.calibration.measure.output_gradients import KeptGradients, OutputGradients
from vllm_mcmoe.calibration.measure.sensitivity import MoeTrace, backward_traces, forward_traces
from vllm_mcmoe.calibration.measure.super_experts import MASSIVE_RATIO, flag_super_experts
from vllm_mcmoe.calibration.model.activations import ActivationStore
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import TokenSequences
from vllm_mcmoe.calibration.recipes import Recipe, find_recipe, needs_gradients, needs_output_gradients


@dataclass(frozen=True)
class Calibration:
    """factors, and by layer name what recipes need of the loss gradient at its output; empty for those that do not.

    gradient_norms    its squared norm at every token, float32 [tokens] of mean 1; none where some are measured
    output_gradients  the gradient itself, at some tokens
    """

    factors: Factors
    gradient_norms: Mapping[str, torch.Tensor]
    output_gradients: Mapping[str, OutputGradients]


def measure(
    model: LayerwiseModel,
    sequences: TokenSequences,
    *,
    recipe: str | Recipe = "mcmoe",
    widths: Sequence[int] | None = None,
    seed: int = 0,
    store: ActivationStore | None = None,
    work: WorkDirectory | None = None,
    for_quantizing: bool = True,
    with_linears: bool = False,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> Calibration:
    """calibrate on a loaded model and drawn sequences.

    store  where activations are kept; memory if not given
    work   where measured layers are kept, so that the next run goes on from there
    for_quantizing  keep the gradients that the recipe quantises with, too, gigabytes for a large model
    with_linears    for a budget of the whole checkpoint: list the other linears and the output head, too, with what
                    their widths would cost where the recipe measures loss increases

    Recipes that use no gradient are measured without one, and their factors have no loss_increase; the uniform
    recipe's have no errors either, unless widths are given.
    """
    recipe = find_recipe(recipe)
    if widths is None:  # a uniform allocation asks for no errors
        widths = () if recipe.objective == "uniform" else recipe.widths
    chosen, store = _measured_sequences(recipe, sequences.tokens), store or ActivationStore()
    tokens = sequences.tokens[chosen]
    names = model.description.moe_layers.values()
    measured = {name: layer for name in names if (layer := _load_measured(work, name)) is not None}
    if measured:
        log(f"{len(measured)} of {len(names)} layers are measured already.")
    options = {"store": store, "measured": frozenset(measured), "show_progress": show_progress}
    linears = table = None
    if needs_gradients(recipe):
        if with_linears and recipe.objective == "loss_increase":
            linears = LinearMeasurer(model, tokens.numel(), work)
        traces = backward_traces(model, tokens, seed=seed, watcher=linears, **options)
    else:
        traces = forward_traces(model, tokens, **options)
    complete = len(measured) == len(names) and (linears is None or linears.complete)
    keep_gradients = for_quantizing and needs_output_gradients(recipe)
    length = tokens.shape[1]
    positions = (chosen[:, None] * length + torch.arange(length)).flatten() if keep_gradients else None
    for trace in traces:
        layer = _measure_trace(trace, model.description, recipe, tuple(widths), positions)
        if len(tokens) < len(sequences.tokens):
            layer = replace(layer, gradient_norms=None)  # of no use where they are not those of every token
        if work is not None:
            layer = _save_measured(work, trace.name, layer)
        measured[trace.name] = layer
    if not complete:  # else what is there belongs to the work that comes after measuring
        store.drop_all()
    if with_linears:
        table = table_of(decided_bytes(model)) if linears is None else linears.table()
    measured = {name: measured[name] for name in names}  # a backward sweep measures the last layer first
    factors = Factors(
        model=str(model.description.path),
        tokens=tokens.numel(),
        top_k=model.description.top_k,
        layers={name: layer.factors for name, layer in measured.items()},
        linears=table,
        extra={
            "recipe": recipe.name,
            "error_quantizer": recipe.error_quantizer,
            "measured_rows": recipe.measured_rows,
            "sequences": list(sequences.tokens.shape),
            "files": [path.name for path in sequences.files],
            "seed": seed,
        },
    )
    flag_super_experts(factors, {name for name, layer in measured.items() if layer.massive}, log)
    norms = {name: layer.gradient_norms for name, layer in measured.items() if layer.gradient_norms is not None}
    gradients = {name: layer.output_gradients for name, layer in measured.items() if layer.output_gradients is not None}
    if work is not None and keep_gradients:
        gradients = KeptGradients({name: _measured_file(work, name) for name in names})
    return Calibration(factors, norms, gradients)


@dataclass(frozen=True)
class _MeasuredLayer:
    """factors; gradient_norms and output_gradients as in Calibration, or None, the latter also where a file has them;
    massive: the layer's output has massive activations."""

    factors: LayerFactors
    gradient_norms: torch.Tensor | None
    output_gradients: OutputGradients | None
    massive: bool


def _measure_trace(
    trace: MoeTrace, description: MoeModel, recipe: Recipe, widths: tuple[int, ...], positions: torch.Tensor | None
) -> _MeasuredLayer:
    """positions: of the trace's tokens among the calibration tokens, int64 [N]; None keeps no gradients."""
    norms = trace.gradient_norms
    if norms is not None:
        norms = norms / norms.mean().clamp_min(1e-30)
    factors = _measure_layer(trace, description, recipe, widths, norms)
    gradients = None if positions is None else OutputGradients.sample(trace.gradients, positions)
    return _MeasuredLayer(factors, norms, gradients, trace.output_peak >= MASSIVE_RATIO * trace.output_median)


def _measured_sequences(recipe: Recipe, tokens: torch.Tensor) -> torch.Tensor:
    """int64 [n], ascending: the sequences that factors and gradients are measured on, evenly spaced among all. Hessians
    weighted by gradients need them at every token."""
    count = len(tokens)
    if recipe.measured_tokens is not None and recipe.hessian_weighting != "gradient":
        count = min(count, max(1, recipe.measured_tokens // tokens.shape[1]))
    return evenly_spaced(len(tokens), count)


def _measured_unit(name: str) -> str:
    return f"measured-{name}"


def _measured_file(work: WorkDirectory, name: str) -> Path:
    return work.path / f"{_measured_unit(name)}.safetensors"


def _save_measured(work: WorkDirectory, name: str, layer: _MeasuredLayer) -> _MeasuredLayer:
    """Returns the layer without what only the file need hold."""
    tensors, files = {}, []
    if layer.gradient_norms is not None:
        tensors["gradient_norms"] = layer.gradient_norms
    if layer.output_gradients is not None:
        tensors |= layer.output_gradients.to_tensors()
    if tensors:
        files.append(_measured_file(work, name))
        write_atomically(files[0], lambda path: save_file(tensors, path))
    document = {"factors": layer.factors.to_document(), "massive": layer.massive}
    work.save(_measured_unit(name), document, files)
    return replace(layer, output_gradients=None)


def _load_measured(work: WorkDirectory | None, name: str) -> _MeasuredLayer | None:
    unit = _measured_unit(name)
    document = None if work is None else work.load(unit)
    if document is None:
        return None
    path, norms = _measured_file(work, name), None
    if path.exists():
        with safe_open(path, framework="pt") as file:
            norms = file.get_tensor("gradient_norms").clone() if "gradient_norms" in file.keys() else None  # noqa: SIM118
    return _MeasuredLayer(LayerFactors.from_document(document["factors"], unit), norms, None, document["massive"])


def routing_statistics(router_probs: torch.Tensor, topk_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each expert was selected, and the sum of its routing weights where it was.

    router_probs: float32 [N, E], scores of all experts, before top-k renormalisation (docs/method.md, section 1: with
    softmax the paper's w_i times N); topk_ids: int64 [N, k] -> int64 [E], float64 [E].
    """
    num_experts = router_probs.shape[1]
    activation_count = torch.bincount(topk_ids.flatten(), minlength=num_experts)
    selected = router_probs.gather(1, topk_ids).double()
    routing_weight_sum = torch.zeros(num_experts, dtype=torch.float64)
    return activation_count, routing_weight_sum.index_add_(0, topk_ids.flatten(), selected.flatten())


def _measure_layer(
    trace: MoeTrace,
    description: MoeModel,
    recipe: Recipe,
    widths: tuple[int, ...],
    gradient_norms: torch.Tensor | None,
) -> LayerFactors:
    activation_count, routing_weight_sum = routing_statistics(trace.router_probs, trace.inputs.topk_ids)

    def measured(expert: int) -> ExpertMeasurement:
        with torch.no_grad():
            return measure_expert(trace, expert, recipe, widths, gradient_norms)

    at_once = experts_at_once(description, trace.layer.device, trace.layer.nbytes)
    experts = side_by_side(measured, range(description.num_experts), at_once)
    loss_increase = None
    if trace.gradients is not None:
        loss_increase = {
            part: {width: [expert.loss_increase[part][width] for expert in experts] for width in widths}
            for part in ("gate_up", "down")
        }
    return LayerFactors(
        activation_count=activation_count.tolist(),
        routing_weight_sum=routing_weight_sum.tolist(),
        quantization_error={width: [expert.error[width] for expert in experts] for width in widths},
        shapes=description.part_shapes(),
        loss_increase=loss_increase,
        down_output_max=[expert.down_output_max for expert in experts],
    )
