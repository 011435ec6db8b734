"""What quantising one expert to each width costs, on its own tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch

from vllm_mcmoe.calibration.matrix.gptq import quantize_gptq
from vllm_mcmoe.calibration.matrix.grids import quantize_rtn
from vllm_mcmoe.calibration.measure.expert_tokens import (
    ExpertTokens,
    build_factor,
    calibration_tokens,
    evenly_spaced,
    hessian_weights,
    tokens_of,
)
from vllm_mcmoe.calibration.measure.sensitivity import MoeTrace
from vllm_mcmoe.calibration.model.experts import Expert
from vllm_mcmoe.calibration.recipes import Recipe
from vllm_mcmoe.kernels.packing import Kind

# Tokens an expert's errors are measured on. The loss increase from 4096 tokens varies by 6% between seeds of the
# sampled labels (reference model, 2 bits), where one bit more or less changes it fourfold.
MEASURED_TOKENS = 4096
# Rows add up coherently as far as rounding makes weights smaller, which is to say as far as the error points against
# the weight itself: by its squared error, here that of a Gaussian, by the best uniform quantiser (Max 1960) and by the
# trellis codes (docs/trellis.md).
SQUARED_ERROR: dict[Kind, dict[int, float]] = {
    "scalar": {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 0.0001},
    "trellis": {1: 0.3059, 2: 0.0824, 3: 0.0215, 4: 0.0057, 8: 0.0001},
}


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

    Where the recipe measures some rows of a matrix, only these are quantised. GPTQ treats rows independently of each
    other, so they are quantised as they would be among all; what the others add is known from rounding all to nearest.
    """
    tokens = tokens_of(trace.inputs, expert)
    computed = trace.layer.expert(expert)
    if not widths:
        return ExpertMeasurement({}, {"gate_up": {}, "down": {}}, _down_output_max(tokens, computed))
    quantizers, largest_output = _part_quantizers(trace, expert, recipe, gradient_norms, tokens)
    measured = ExpertMeasurement({}, {"gate_up": {}, "down": {}}, largest_output)
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
    of_units, of_features = (_Sample.whole(matrix.shape[1], matrix.device) for matrix in (h, output))
    if measures_some_rows(recipe, h.shape[1]):
        rounded = computed.intermediate(x, _rounded(computed.gate_up)).sub_(h)
        energy = weight.square() * computed.down.square().sum(0)
        of_units = _Sample.choose(rounded, gradients_at_h, energy, recipe.measured_rows)
    if measures_some_rows(recipe, output.shape[1]):
        rounded = (h @ _rounded(computed.down).t()).sub_(output)
        of_features = _Sample.choose(rounded, gradients, weight.square(), recipe.measured_rows)
    units, features = of_units.rows, of_features.rows
    some = computed if units is None else computed.some_units(units)
    rows = None if units is None else computed.rows(units)
    for width in widths:
        h_change = some.intermediate(x, quantizers["gate_up"](width, rows)).sub_(_columns(h, units))
        down = quantizers["down"](width, features)
        output_change = (h @ down.t()).sub_(_columns(output, features))
        if gradients is not None:
            for part, products, sample_of in (
                ("gate_up", _columns(gradients_at_h, units) * h_change, of_units),
                ("down", _columns(gradients, features) * output_change, of_features),
            ):
                squares = sample_of.loss_of_all(products, SQUARED_ERROR[recipe.gptq.codes][width])
                measured.loss_increase[part][width] = 0.5 * represented * squares / trace.inputs.num_tokens
        if units is None and features is None:
            # D'h' - Dh = D'h - Dh + D'(h' - h)
            error = _energy(output_change.addmm_(h_change, down.t()).mul_(weight))
        else:
            # of parts that are known from some rows each, as if they were independent, the second by the original D
            error = _energy(output_change.mul_(weight * of_features.change_weight.sqrt()))
            error += _energy(((h_change * of_units.change_weight.sqrt()) @ some.down.t()).mul_(weight))
        measured.error[width] = (represented * error) ** 0.5
    return measured


def _columns(matrix: torch.Tensor, some: torch.Tensor | None) -> torch.Tensor:
    return matrix if some is None else matrix[:, some]


def _energy(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def measures_some_rows(recipe: Recipe, rows: int) -> bool:
    """Whether of a matrix of so many rows, or units of the intermediate, some are measured: of a smaller one, finding
    their share would cost what that saves."""
    return recipe.error_quantizer == "gptq" and recipe.measured_rows is not None and rows > 2 * recipe.measured_rows


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    return quantize_rtn(weight, 1, search="minmax").dequantize()


@dataclass(frozen=True)
class _Sample:
    """Rows of a matrix, and what they say of all. With g the gradient at the rows' outputs and dy their change:

    rows           int64 [n]; None for all
    loss_weight    float32 [n]: of a row's (g_r dy_r)^2 in the sum over all rows, and
    change_weight  likewise, of what its change adds to the squared change of the layer's output
    coherence      what (sum_r g_r dy_r)^2 is of sum_r (g_r dy_r)^2, both summed over tokens, at 1 bit
    """

    rows: torch.Tensor | None
    loss_weight: torch.Tensor
    change_weight: torch.Tensor
    coherence: float

    @classmethod
    def whole(cls, rows: int, device: torch.device) -> Self:
        return cls(None, torch.ones(rows, device=device), torch.ones(rows, device=device), 1.0)

    @classmethod
    def choose(cls, change: torch.Tensor, gradients: torch.Tensor | None, energy: torch.Tensor, count: int) -> Self:
        """By what rounding all rows to nearest costs: half of them those that cost most, which stand for themselves,
        and half evenly spaced among the others, which stand for these in proportion.

        change, gradients: [n, all rows], the latter None where loss is not asked for. energy: what a squared change
        adds to that of the output, broadcast to [n, all rows].
        """
        changes = losses = (change.square() * energy).double().sum(0)
        coherence = 1.0
        if gradients is not None:
            products = (change * gradients).double()
            losses = products.square().sum(0)
            total = float(losses.sum())
            coherence = _energy(products.sum(-1)) / total if total > 0 else 1.0
        order = torch.argsort(losses, descending=True, stable=True)
        costly, others = order[: count // 2], order[count // 2 :].sort().values
        spaced = others[evenly_spaced(len(others), count - len(costly)).to(others.device)]

        def weights(costs: torch.Tensor) -> torch.Tensor:
            part, whole = float(costs[spaced].sum()), float(costs[others].sum())
            stands_for = whole / part if part > 0 else len(others) / len(spaced)
            return torch.cat([torch.ones_like(costs[costly]), torch.full_like(costs[spaced], stands_for)]).float()

        return cls(torch.cat([costly, spaced]), weights(losses), weights(changes), coherence)

    def loss_of_all(self, products: torch.Tensor, squared_error: float) -> float:
        """(sum_r g_r dy_r)^2 of all rows, summed over tokens. products: g_r dy_r, float32 [tokens, n]; squared_error:
        of what the rows were quantised to."""
        if self.rows is None:
            return _energy(products.sum(-1))
        of_rows = float((products.double().square().sum(0) * self.loss_weight).sum())
        return of_rows * (1 + (self.coherence - 1) * squared_error / SQUARED_ERROR["scalar"][1])


def _down_output_max(tokens: ExpertTokens, expert: Expert) -> float:
    """Over all of the expert's tokens: massive activations appear at very few."""
    maxima = [float(expert(x).abs().max()) for x in tokens.chunks() if len(x)]
    return max(maxima, default=0.0)


def _part_quantizers(
    trace: MoeTrace,
    expert: int,
    recipe: Recipe,
    gradient_norms: torch.Tensor | None,
    own: ExpertTokens,
) -> tuple[dict[str, Callable[[int, torch.Tensor | None], torch.Tensor]], float]:
    """part -> function from a width, and rows (None: all), to the dequantised weight, by the recipe's error_quantizer;
    and the expert's largest down_proj output over its own tokens, which the Hessian of down passes by.

    Round-to-nearest spans each group's range, as the authors' code does; GPTQ is the one that will really be used.
    """
    computed = trace.layer.expert(expert)
    weights = {"gate_up": trace.layer.gate_up[expert], "down": trace.layer.down[expert]}
    if recipe.error_quantizer == "rtn":

        def rounded(width, rows, weight) -> torch.Tensor:
            return quantize_rtn(weight if rows is None else weight[rows], width, search="minmax").dequantize()

        return {part: partial(rounded, weight=weight) for part, weight in weights.items()}, _down_output_max(
            own, computed
        )
    tokens: ExpertTokens = calibration_tokens(trace.inputs, expert)
    token_weights = hessian_weights(tokens, recipe.hessian_weighting, gradient_norms)
    maxima = [0.0]

    def intermediate(x: torch.Tensor) -> torch.Tensor:
        h = computed.intermediate(x)
        if not tokens.pooled and len(x):
            maxima.append(float(computed.output(h).abs().max()))
        return h

    quantizers = {}
    for part, transform in (("gate_up", None), ("down", intermediate)):
        name = f"{trace.name}.{expert}.{part}"
        factor = build_factor(tokens, token_weights, transform, recipe, name)

        def quantized(width, rows, weight=weights[part], factor=factor, name=name) -> torch.Tensor:
            chosen = weight if rows is None else weight[rows]
            return quantize_gptq(chosen, factor, width, recipe.gptq, name=name).dequantize()

        quantizers[part] = quantized
    return quantizers, _down_output_max(own, computed) if tokens.pooled else max(maxima)
