"""What quantising one expert to each width costs, on its own tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

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
REFINED_ROWS = 256  # of a matrix, that are quantised with all sweeps where the others are not


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

    Where the recipe measures with fewer sweeps of refinement than it quantises with, some rows of each matrix are
    quantised with all of them, too: what these gain, all are taken to gain. GPTQ treats rows independently of each
    other, so some of them are quantised as they would be among all.
    """
    tokens = tokens_of(trace.inputs, expert)
    computed = trace.layer.expert(expert)
    measured = ExpertMeasurement({}, {"gate_up": {}, "down": {}}, _down_output_max(tokens, computed))
    if not widths:
        return measured
    sample = tokens.at_most(MEASURED_TOKENS)
    represented = len(tokens) / max(len(sample), 1)  # tokens a measured one stands for
    x = sample.x
    h = computed.intermediate(x)
    output = h @ computed.down.t()
    weight = sample.routing_weight[:, None]
    gradients = gradients_at_h = None
    if trace.gradients is not None:
        gradients = trace.gradients[sample.index].to(weight.device) * weight
        gradients_at_h = gradients @ computed.down
    units, features = (_refined_rows(recipe, count, h.device) for count in (h.shape[1], output.shape[1]))
    some = None if units is None else computed.some_units(units)
    few_sweeps = {"gate_up": units is not None, "down": features is not None}
    quantizers = _part_quantizers(trace, expert, recipe, gradient_norms, few_sweeps)
    for width in widths:
        h_change = computed.intermediate(x, quantizers["gate_up"](width, None)).sub_(h)
        down = quantizers["down"](width, None)
        output_change = (h @ down.t()).sub_(output)
        by_gate_up = by_down = _Gains(1.0, 1.0)
        if units is not None:
            refined = some.intermediate(x, quantizers["gate_up"](width, computed.rows(units))).sub_(h[:, units])
            by_gate_up = _Gains.of(h_change, refined, gradients_at_h, units)
        if features is not None:
            refined = (h @ quantizers["down"](width, features).t()).sub_(output[:, features])
            by_down = _Gains.of(output_change, refined, gradients, features)
        if gradients is not None:
            for part, products, gains in (
                ("gate_up", (gradients_at_h * h_change).sum(-1), by_gate_up),
                ("down", (gradients * output_change).sum(-1), by_down),
            ):
                increase = 0.5 * represented * products.double().square().sum() / trace.inputs.num_tokens
                measured.loss_increase[part][width] = float(increase) * gains.loss
        # D'h' - Dh = D'h - Dh + D'(h' - h)
        output_change.mul_(by_down.change**0.5).addmm_(h_change, down.t(), alpha=by_gate_up.change**0.5)
        measured.error[width] = represented**0.5 * float(output_change.mul_(weight).double().norm())
    return measured


def with_few_sweeps(recipe: Recipe, rows: int) -> bool:
    """Whether a matrix of so many rows, or units of the intermediate, is measured with few sweeps: of a smaller one,
    the rows that are refined all the same would cost what that saves."""
    return recipe.measured_sweeps is not None and rows > 4 * REFINED_ROWS


def _refined_rows(recipe: Recipe, count: int, device: torch.device) -> torch.Tensor | None:
    """int64 [REFINED_ROWS], evenly spaced; None where all are refined."""
    if not with_few_sweeps(recipe, count):
        return None
    return torch.arange(REFINED_ROWS, device=device) * count // REFINED_ROWS


class _Gains(NamedTuple):
    """What sweeps that were left out would leave, as a share: of the loss increase, and of the squared change of what a
    part gives."""

    loss: float
    change: float

    @classmethod
    def of(
        cls, change: torch.Tensor, refined: torch.Tensor, gradients: torch.Tensor | None, rows: torch.Tensor
    ) -> Self:
        """change, gradients: [n, all rows], the latter None where loss is not asked for; refined: [n, rows]."""
        before = change[:, rows]
        whole = _ratio(refined, before)
        if gradients is None:
            return cls(whole, whole)
        return cls(_ratio(refined * gradients[:, rows], before * gradients[:, rows]), whole)


def _ratio(after: torch.Tensor, before: torch.Tensor) -> float:
    """Of their energies; 1 where there is none to lose."""
    lost = float(before.double().square().sum())
    return float(after.double().square().sum()) / lost if lost > 0 else 1.0


def _down_output_max(tokens: ExpertTokens, expert: Expert) -> float:
    """Over all of the expert's tokens: massive activations appear at very few."""
    maxima = [float(expert(x).abs().max()) for x in tokens.chunks() if len(x)]
    return max(maxima, default=0.0)


def _part_quantizers(
    trace: MoeTrace,
    expert: int,
    recipe: Recipe,
    gradient_norms: torch.Tensor | None,
    few_sweeps: dict[str, bool],
) -> dict[str, Callable[[int, torch.Tensor | None], torch.Tensor]]:
    """part -> function from a width, and rows, to the dequantised weight, by the recipe's error_quantizer: of all rows
    (None), where asked for with the few sweeps that the recipe measures with, or of some rows with all of them.

    Round-to-nearest spans each group's range, as the authors' code does; GPTQ is the one that will really be used.
    """
    weights = {"gate_up": trace.layer.gate_up[expert], "down": trace.layer.down[expert]}
    if recipe.error_quantizer == "rtn":
        return {
            part: lambda width, rows, weight=weight: quantize_rtn(
                weight if rows is None else weight[rows], width, search="minmax"
            ).dequantize()
            for part, weight in weights.items()
        }
    tokens: ExpertTokens = calibration_tokens(trace.inputs, expert)
    token_weights = hessian_weights(tokens, recipe.hessian_weighting, gradient_norms)
    quantizers = {}
    transforms = {"gate_up": None, "down": trace.layer.expert(expert).intermediate}
    for part, weight in weights.items():
        name = f"{trace.name}.{expert}.{part}"
        factor = build_factor(tokens, token_weights, transforms[part], recipe, name)

        few = replace(recipe.gptq, refinement_sweeps=recipe.measured_sweeps) if few_sweeps[part] else recipe.gptq

        def quantized(width, rows, weight=weight, factor=factor, name=name, few=few) -> torch.Tensor:
            chosen, options = (weight, few) if rows is None else (weight[rows], recipe.gptq)
            return quantize_gptq(chosen, factor, width, options, name=name).dequantize()

        quantizers[part] = quantized
    return quantizers
