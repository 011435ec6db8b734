"""Calibration: a 16-bit model and text in, factors.json out.

    factors = calibrate(model_dir, ["c4.jsonl"], recipe="mcmoe")        # everything is measured on the same tokens
    factors.save("factors.json")

For every expert: how often it is used, its routing weights, and what quantising it to each width costs, as an error of
the layer's output (the paper's eps) and as a predicted increase of the loss (`sensitivity.py`).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from vllm_mcmoe.calibration.activations import ActivationStore, Storage
from vllm_mcmoe.calibration.artifacts import Factors, LayerFactors
from vllm_mcmoe.calibration.data import DEFAULT_LENGTH, DEFAULT_SEQUENCES, TokenSequences, load_sequences
from vllm_mcmoe.calibration.device import choose_device
from vllm_mcmoe.calibration.experts import (
    Activation,
    ExpertTokens,
    build_factor,
    calibration_tokens,
    hessian_weights,
    intermediate,
    tokens_of,
)
from vllm_mcmoe.calibration.files import write_atomically
from vllm_mcmoe.calibration.gptq import quantize_gptq
from vllm_mcmoe.calibration.identity import (
    identity_of_device,
    identity_of_model,
    identity_of_program,
    identity_of_recipe,
    identity_of_tokens,
)
from vllm_mcmoe.calibration.layerwise import LayerwiseModel, WeightFiles
from vllm_mcmoe.calibration.memory import peak_resident_bytes
from vllm_mcmoe.calibration.models import MoeModel, activation_function, describe_model
from vllm_mcmoe.calibration.progress import progress
from vllm_mcmoe.calibration.quantizers import quantize_rtn
from vllm_mcmoe.calibration.recipes import Recipe, find_recipe
from vllm_mcmoe.calibration.sensitivity import MoeTrace, backward_traces, choose_store, forward_traces
from vllm_mcmoe.calibration.workdir import WorkDirectory, working_on

Log = Callable[[str], None]

# Super experts ("Unveiling Super Experts", arXiv 2507.23279): an expert whose largest down_proj output exceeds the
# 99.5th percentile over all experts of the model and a tenth of the largest, in a layer where massive activations
# form. The paper names those layers by inspection; here, as massive activations are defined (arXiv 2402.17762), a
# layer whose output hidden states peak at 1000 times their median. Without that clause the percentile would flag the
# top expert of every model.
SUPER_EXPERT_PERCENTILE = 0.995
SUPER_EXPERT_SHARE = 0.1
MASSIVE_RATIO = 1000.0

WEIGHTS = "weights"  # the unit of work that says they have been checked


# Tokens an expert's errors are measured on. The loss increase from 4096 tokens varies by 6% between seeds of the
# sampled labels (reference model, 2 bits), where one bit more or less changes it fourfold.
MEASURED_TOKENS = 4096


@dataclass(frozen=True)
class Calibration:
    """factors, and per layer name the squared norm of every token's loss gradient at the layer's output, float32
    [tokens] of mean 1, which recipes with hessian_weighting "gradient" need (empty for recipes without gradients)."""

    factors: Factors
    gradient_norms: dict[str, torch.Tensor]


def load_calibration_data(
    description: MoeModel, data: Sequence[str | Path], sequences: int, length: int, log: Log
) -> TokenSequences:
    """Token sequences of the files for this model, with its own tokenizer; what was shortened is logged."""
    tokens = load_sequences(
        data,
        AutoTokenizer.from_pretrained(description.path),
        sequences=sequences,
        length=length,
        max_position_embeddings=description.config.max_position_embeddings,
    )
    if tokens.notice:
        log(f"Data: {tokens.notice}.")
    return tokens


def calibrate(
    model_dir: str | Path,
    data: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    recipe: str | Recipe = "mcmoe",
    widths: Sequence[int] | None = None,
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    activations: Storage = "auto",
    device: str | torch.device = "auto",
    restart: bool = False,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> Factors:
    """Measure every expert of a model.

    data         text files, .jsonl files or directories, as load_sequences takes them
    out          where to write factors.json; with it, measured layers are kept beside it until the file is complete,
                 and the same call goes on from there after having been killed
    widths       bit-widths to measure; None takes the recipe's
    seed         of the labels sampled for the loss gradient
    activations  "memory", "disk" (beside out, or in the system's temporary directory) or "auto", memory if they fit
    device       what computes, as choose_device takes it
    restart      forget what an earlier run has left

    Raises DeviceError, UnsupportedModelError, FormatError or DataError before any long work, WorkDirectoryError where
    there is unfinished work of other arguments.
    """
    device = choose_device(device, log)
    recipe = find_recipe(recipe)
    source = WeightFiles(describe_model(model_dir))
    tokens = load_calibration_data(source.model, data, sequences, length, log)
    identity = {
        **identity_of_program(),
        **identity_of_device(device),
        **identity_of_model(source.model, source.files),
        **identity_of_tokens(tokens),
        **identity_of_recipe(recipe),
        "widths": None if widths is None else list(widths),
        "seed": seed,
    }
    with ExitStack() as stack:
        target = Path(stack.enter_context(TemporaryDirectory())) / "factors.json" if out is None else Path(out)
        work = stack.enter_context(working_on(target, identity, restart=restart, log=log))
        model = LayerwiseModel(source, device)
        check_weights(model, work, show_progress)
        store = choose_store(activations, model, tokens.tokens.numel(), needs_gradients(recipe), work.activations, log)
        options = {"store": store, "work": work, "log": log, "show_progress": show_progress}
        factors = measure(model, tokens, recipe=recipe, widths=widths, seed=seed, **options).factors
        factors.save(target)
        work.remove()
    log(f"At most {peak_resident_bytes() / 1e9:.2f} GB of memory were resident.")
    return factors


def check_weights(model: LayerwiseModel, work: WorkDirectory, show_progress: bool) -> None:
    """Read every weight once: minutes, against the hours after which a damaged one might be met.

    Raises UnsupportedModelError for NaN or infinite weights, FormatError for a file that cannot be read.
    """
    if work.load(WEIGHTS) is None:
        for name in progress(model.source.names(), "Checking weights", show=show_progress):
            model.check_weight(name)
        work.save(WEIGHTS, {})


def needs_gradients(recipe: Recipe) -> bool:
    return recipe.objective == "loss_increase" or recipe.hessian_weighting == "gradient"


def measure(
    model: LayerwiseModel,
    sequences: TokenSequences,
    *,
    recipe: str | Recipe = "mcmoe",
    widths: Sequence[int] | None = None,
    seed: int = 0,
    store: ActivationStore | None = None,
    work: WorkDirectory | None = None,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> Calibration:
    """calibrate on a loaded model and drawn sequences.

    store  where activations are kept; memory if not given
    work   where measured layers are kept, so that the next run goes on from there

    Recipes that use no gradient are measured without one, and their factors have no loss_increase; the uniform
    recipe's have no errors either, unless widths are given.
    """
    recipe = find_recipe(recipe)
    if widths is None:  # a uniform allocation asks for no errors
        widths = () if recipe.objective == "uniform" else recipe.widths
    tokens, store = sequences.tokens, store or ActivationStore()
    names = model.description.moe_layers.values()
    measured = {name: layer for name in names if (layer := _load_measured(work, name)) is not None}
    if measured:
        log(f"{len(measured)} of {len(names)} layers are measured already.")
    options = {"store": store, "measured": frozenset(measured), "show_progress": show_progress}
    if needs_gradients(recipe):
        traces = backward_traces(model, tokens, seed=seed, **options)
    else:
        traces = forward_traces(model, tokens, **options)
    complete = len(measured) == len(names)
    for trace in traces:
        layer = _measure_trace(trace, model.description, recipe, tuple(widths))
        _save_measured(work, trace.name, layer)
        measured[trace.name] = layer
    if not complete:  # else what is there belongs to the work that comes after measuring
        store.drop_all()
    measured = {name: measured[name] for name in names}  # a backward sweep measures the last layer first
    factors = Factors(
        model=str(model.description.path),
        tokens=tokens.numel(),
        top_k=model.description.top_k,
        layers={name: layer.factors for name, layer in measured.items()},
        extra={
            "recipe": recipe.name,
            "error_quantizer": recipe.error_quantizer,
            "sequences": list(tokens.shape),
            "files": [path.name for path in sequences.files],
            "seed": seed,
        },
    )
    flag_super_experts(factors, {name for name, layer in measured.items() if layer.massive}, log)
    norms = {name: layer.gradient_norms for name, layer in measured.items() if layer.gradient_norms is not None}
    return Calibration(factors, norms)


@dataclass(frozen=True)
class _MeasuredLayer:
    """factors; gradient_norms as in Calibration, or None; massive: the layer's output has massive activations."""

    factors: LayerFactors
    gradient_norms: torch.Tensor | None
    massive: bool


def _measure_trace(trace: MoeTrace, description: MoeModel, recipe: Recipe, widths: tuple[int, ...]) -> _MeasuredLayer:
    norms = trace.gradient_norms
    if norms is not None:
        norms = norms / norms.mean().clamp_min(1e-30)
    factors = _measure_layer(trace, description, recipe, widths, norms)
    return _MeasuredLayer(factors, norms, trace.output_peak >= MASSIVE_RATIO * trace.output_median)


def _save_measured(work: WorkDirectory | None, name: str, layer: _MeasuredLayer) -> None:
    if work is None:
        return
    unit = f"measured-{name}"
    files = []
    if layer.gradient_norms is not None:
        files.append(work.path / f"{unit}.safetensors")
        write_atomically(files[0], lambda path: save_file({"gradient_norms": layer.gradient_norms}, path))
    work.save(unit, {"factors": layer.factors.to_document(), "massive": layer.massive}, files)


def _load_measured(work: WorkDirectory | None, name: str) -> _MeasuredLayer | None:
    unit = f"measured-{name}"
    document = None if work is None else work.load(unit)
    if document is None:
        return None
    path = work.path / f"{unit}.safetensors"
    norms = load_file(path)["gradient_norms"].clone() if path.exists() else None
    return _MeasuredLayer(LayerFactors.from_document(document["factors"], unit), norms, document["massive"])


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
    experts = [
        _measure_expert(trace, expert, activation_function(description), recipe, widths, gradient_norms)
        for expert in range(description.num_experts)
    ]
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


@dataclass
class _ExpertMeasurement:
    """error: width -> Frobenius norm of the layer output's change over all tokens.
    loss_increase: part -> width -> nats per token. down_output_max: 0 for an expert without tokens."""

    error: dict[int, float]
    loss_increase: dict[str, dict[int, float]]
    down_output_max: float


def _measure_expert(
    trace: MoeTrace,
    expert: int,
    activation: Activation,
    recipe: Recipe,
    widths: tuple[int, ...],
    gradient_norms: torch.Tensor | None,
) -> _ExpertMeasurement:
    """Quantise one expert to every width and see what its own tokens notice (MEASURED_TOKENS of them).

    With h the intermediate and D the down projection, the change of the layer's output at a token of routing weight r
    is r (D' h' - D h). Its product with the gradient needs no matrix product for gate_up alone: g.D(h' - h) is
    (D^T g).(h' - h).
    """
    tokens = tokens_of(trace.inputs, expert)
    gate_up, down = trace.layer.gate_up[expert], trace.layer.down[expert]
    measured = _ExpertMeasurement({}, {"gate_up": {}, "down": {}}, _down_output_max(tokens, gate_up, down, activation))
    if not widths:
        return measured
    sample = tokens.at_most(MEASURED_TOKENS)
    represented = len(tokens) / max(len(sample), 1)  # tokens a measured one stands for
    x = sample.x
    h = intermediate(x, gate_up, activation)
    output = h @ down.t()
    weight = sample.routing_weight[:, None]
    if trace.gradients is not None:
        gradients = trace.gradients[sample.index].to(weight.device) * weight
        gradients_at_h = gradients @ down
    quantizers = _part_quantizers(trace, expert, activation, recipe, gradient_norms)
    for width in widths:
        h_change = intermediate(x, quantizers["gate_up"](width), activation).sub_(h)
        down_quantized = quantizers["down"](width)
        output_change = (h @ down_quantized.t()).sub_(output)
        if trace.gradients is not None:
            for part, products in (
                ("gate_up", (gradients_at_h * h_change).sum(-1)),
                ("down", (gradients * output_change).sum(-1)),
            ):
                increase = 0.5 * represented * products.double().square().sum() / trace.inputs.num_tokens
                measured.loss_increase[part][width] = float(increase)
        output_change.addmm_(h_change, down_quantized.t())  # D'h - Dh + D'(h' - h)
        measured.error[width] = represented**0.5 * float(output_change.mul_(weight).double().norm())
    return measured


def _down_output_max(tokens: ExpertTokens, gate_up: torch.Tensor, down: torch.Tensor, activation: Activation) -> float:
    """Over all of the expert's tokens: massive activations appear at very few."""
    maxima = [float((intermediate(x, gate_up, activation) @ down.t()).abs().max()) for x in tokens.chunks() if len(x)]
    return max(maxima, default=0.0)


def _part_quantizers(
    trace: MoeTrace,
    expert: int,
    activation: Activation,
    recipe: Recipe,
    gradient_norms: torch.Tensor | None,
) -> dict[str, Callable[[int], torch.Tensor]]:
    """part -> function from a width to the dequantised weight, by the recipe's error_quantizer.

    Round-to-nearest spans each group's range, as the authors' code does; GPTQ is the one that will really be used.
    """
    weights = {"gate_up": trace.layer.gate_up[expert], "down": trace.layer.down[expert]}
    if recipe.error_quantizer == "rtn":
        return {
            part: lambda width, weight=weight: quantize_rtn(weight, width, search="minmax").dequantize()
            for part, weight in weights.items()
        }
    tokens: ExpertTokens = calibration_tokens(trace.inputs, expert)
    token_weights = hessian_weights(tokens, recipe.hessian_weighting, gradient_norms)
    quantizers = {}
    transforms = {"gate_up": None, "down": lambda x: intermediate(x, weights["gate_up"], activation)}
    for part, weight in weights.items():
        name = f"{trace.name}.{expert}.{part}"
        factor = build_factor(tokens, token_weights, transforms[part], recipe, name)
        quantizers[part] = lambda width, weight=weight, factor=factor, name=name: quantize_gptq(
            weight, factor, width, recipe.gptq, name=name
        ).dequantize()
    return quantizers


def flag_super_experts(factors: Factors, massive_layers: set[str], log: Log) -> None:
    """Set super_experts of every layer from down_output_max, by the rule above SUPER_EXPERT_PERCENTILE."""
    maxima = torch.tensor([m for layer in factors.layers.values() for m in layer.down_output_max])
    threshold = max(float(maxima.double().quantile(SUPER_EXPERT_PERCENTILE)), SUPER_EXPERT_SHARE * float(maxima.max()))
    for name in massive_layers:
        layer = factors.layers[name]
        layer.super_experts = [e for e, m in enumerate(layer.down_output_max) if m > threshold]
        if layer.super_experts:
            log(
                f"{name}: super experts {layer.super_experts}, down_proj outputs up to {max(layer.down_output_max):.3g}"
            )
