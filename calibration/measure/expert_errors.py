"""What quantising one expert to each width costs, on its own tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_mcmoe.calibration.matrix.gptq import quantize_gptq
from vllm_mcmoe.calibration.matrix.grids import quantize_rtn
from vllm_mcmoe.calibration.measure.expert_tokens import (
    ExpertTokens,
    build_factor,
    calibration_tokens,
    hessian_weights,
    tokens_of,
)
from vllm_mcmoe.calibration.measure.sensitivity import MoeTrace
from vllm_mcmoe.calibration.model.experts import Expert
from vllm_mcmoe.calibration.recipes import Recipe

# Tokens an expert's errors are measured on. The loss increase from 4096 tokens varies by 6% between seeds of the
# sampled labels (reference model, 2 bits), where one bit more or less changes it fourfold.
MEASURED_TOKENS = 4096


@dataclass
class ExpertMeasurement:
    """error: width -> Frobenius norm of the layer output's change over all tokens.
    loss_increase: part -> width -> nats per token. down_output_max: 0 for an expert without tokens."""

    error: dict[int, float]
    loss_increase: dict[str, dict[int, float]]
    down_output_max: float


def measure_expert(
    trace: MoeTrace,
    expert: int,
    recipe: Recipe,
    widths: tuple[int, ...],
    gradient_norms: torch.Tensor | None,
) -> ExpertMeasurement:
    """Quantise one expert to every width and see what its own tokens notice (MEASURED_TOKENS of them).

    With h the intermediate and D the down projection, the change of the layer's output at a token of routing weight r
    is r (D' h' - D h). Its product with the gradient needs no matrix product for gate_up alone: g.D(h' - h) is
    (D^T g).(h' - h).
    """
    tokens = tokens_of(trace.inputs, expert)
    computed, down = trace.layer.expert(expert), trace.layer.down[expert]
    measured = ExpertMeasurement({}, {"gate_up": {}, "down": {}}, _down_output_max(tokens, computed))
    if not widths:
        return measured
    sample = tokens.at_most(MEASURED_TOKENS)
    represented = len(tokens) / max(len(sample), 1)  # tokens a measured one stands for
    x = sample.x
    h = computed.intermediate(x)
    output = h @ down.t()
    weight = sample.routing_weight[:, None]
    if trace.gradients is not None:
        gradients = trace.gradients[sample.index].to(weight.device) * weight
        gradients_at_h = gradients @ down
    quantizers = _part_quantizers(trace, expert, recipe, gradient_norms)
    for width in widths:
        h_change = computed.intermediate(x, quantizers["gate_up"](width)).sub_(h)
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


def _down_output_max(tokens: ExpertTokens, expert: Expert) -> float:
    """Over all of the expert's tokens: massive activations appear at very few."""
    maxima = [float(expert(x).abs().max()) for x in tokens.chunks() if len(x)]
    return max(maxima, default=0.0)


def _part_quantizers(
    trace: MoeTrace,
    expert: int,
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
    transforms = {"gate_up": None, "down": trace.layer.expert(expert).intermediate}
    for part, weight in weights.items():
        name = f"{trace.name}.{expert}.{part}"
        factor = build_factor(tokens, token_weights, transforms[part], recipe, name)
        quantizers[part] = lambda width, weight=weight, factor=factor, name=name: quantize_gptq(
            weight, factor, width, recipe.gptq, name=name
        ).dequantize()
    return quantizers
