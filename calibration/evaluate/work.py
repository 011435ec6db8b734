"""What quantising a model takes in multiply-adds, step by step, from its sizes alone.

Counted are products of matrices, Cholesky factors and triangular solves, as the code does them; attention's products
between tokens, a few percent of a pass, and what is proportional to the weights alone are not. A counted run beside it:
benchmarks/quantising_work.py.
"""

from dataclasses import dataclass, fields

from vllm_mcmoe.calibration.matrix.gptq import INVERTED_AT_ONCE
from vllm_mcmoe.calibration.matrix.second_moment import MOMENT_ROWS
from vllm_mcmoe.calibration.matrix.two_sided import COUPLED_ROWS
from vllm_mcmoe.calibration.measure.expert_errors import MEASURED_TOKENS, measures_some_rows
from vllm_mcmoe.calibration.measure.output_gradients import GRADIENT_TOKENS
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.recipes import Recipe, needs_gradients, needs_output_gradients
from vllm_mcmoe.kernels.packing import GROUP_SIZE


@dataclass(frozen=True)
class Work:
    """Multiply-adds, of the whole model.

    forward          of layers, measuring and quantising
    backward         of loss gradients, with the forward pass again that autograd needs
    intermediates    experts on their own tokens, for the Hessians of down and the largest output
    hessians         of inputs
    factors          Cholesky factors of Hessians and their inverses
    measuring        quantising to every width, and what that changes
    gptq             quantising to the width that each matrix gets, without
    sweeps           its refinement, and
    output_sweeps    that under the Hessian of outputs, which
    output_hessians  is made here
    tuning           passes through the original and, forward and backward, through what is quantised
    """

    forward: float
    backward: float
    intermediates: float
    hessians: float
    factors: float
    measuring: float
    gptq: float
    sweeps: float
    output_sweeps: float
    output_hessians: float
    tuning: float

    @property
    def of_experts(self) -> float:
        """All but the passes through layers."""
        return self.total - self.forward - self.backward - self.tuning

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def count_work(
    description: MoeModel, recipe: Recipe, tokens: int, linear_bits: int, active: int, head: int, measures: bool = True
) -> Work:
    """tokens: of calibration. active, head: weights a token is multiplied with, in all and in the output head.
    measures: whether factors are measured; a uniform plan needs none.
    """
    layers, experts, top_k = len(description.moe_layers), description.num_experts, description.top_k
    shapes = description.part_shapes()
    expert = sum(rows * columns for rows, columns in shapes.values())
    inner = active - head
    others = inner - layers * top_k * expert  # attention, routers, dense layers, shared experts
    with_gradients = needs_gradients(recipe)
    by_gptq = measures and recipe.objective != "uniform" and recipe.error_quantizer == "gptq"
    some = recipe.measured_tokens
    measured = tokens if some is None or recipe.hessian_weighting == "gradient" else min(tokens, some)
    forward = backward = 0.0
    if measures:
        forward += measured * (active if with_gradients else inner)
        backward = measured * 2 * active if with_gradients else 0.0
    # once for the experts' inputs, once for the next layer's; and up to each stage of linears that are quantised
    forward += tokens * (others + inner + (len(description.family.linears) * others if linear_bits != 16 else 0))
    intermediates = hessians = factors = measuring = gptq = sweeps = output_sweeps = output_hessians = 0.0
    own, own_measured = tokens * top_k / experts, measured * top_k / experts
    if measures and recipe.objective != "uniform":
        intermediates += own_measured * expert
    intermediates += own * shapes["gate_up"][0] * shapes["gate_up"][1] if recipe.gptq.compensate else 0.0
    kept = min(measured, GRADIENT_TOKENS) * top_k / experts
    for part, (rows, columns) in shapes.items():
        factor = description.function.factor if part == "gate_up" else 1
        moment = _upper_triangle(columns)
        if recipe.gptq.compensate:
            hessians += own * moment
            factors += _factor_products(columns)
            gptq += rows * columns**2 / 2
            sweeps += _refinement_products(recipe.gptq.refinement_sweeps, rows, columns)
        if needs_output_gradients(recipe):
            coupled = min(rows, COUPLED_ROWS)
            output_sweeps += _sweep_products(recipe.gptq.output_sweeps, rows, columns)
            # of a sweep, in its descent and for the loss; and for the loss it begins with
            output_sweeps += (1 + 2 * recipe.gptq.output_sweeps) * coupled * rows * columns
            output_hessians += kept * coupled * rows + kept * rows * columns
        if by_gptq:
            sampled = min(own_measured, MEASURED_TOKENS)
            hessians += own_measured * moment
            factors += _factor_products(columns)
            quantised = rows
            measuring += 2 * sampled * rows * columns  # the expert itself, and gradients through down
            if measures_some_rows(recipe, rows // factor):
                quantised = recipe.measured_rows * factor
                measuring += sampled * rows * columns  # all rows, rounded
            of_width = quantised * columns**2 / 2
            of_width += _refinement_products(recipe.gptq.refinement_sweeps, quantised, columns)
            measuring += len(recipe.widths) * (of_width + sampled * quantised * columns)
    of_experts = (intermediates, hessians, factors, measuring, gptq, sweeps, output_sweeps, output_hessians)
    tuning = 0.0
    if recipe.tuning is not None:
        # No gradients of weights, as in the loss gradients. What is held out is run twice forward instead.
        tuning = min(tokens, recipe.tuning.tokens) * (inner + 3 * active * recipe.tuning.passes)
    return Work(forward, backward, *(products * experts * layers for products in of_experts), tuning)


def _upper_triangle(columns: int) -> float:
    """Multiply-adds of a Hessian by token: blocks of rows, from the diagonal on."""
    starts = range(0, columns, MOMENT_ROWS)
    return sum(min(MOMENT_ROWS, columns - first) * (columns - first) for first in starts)


def _factor_products(columns: int) -> float:
    return columns**3 / 6 + _inverse_products(columns)


def _inverse_products(columns: float) -> float:
    """Of a triangular matrix, in halves: two solves of each half's size, and two halves' inverses."""
    if columns <= INVERTED_AT_ONCE:
        return columns**3 / 2
    return (columns / 2) ** 3 + 2 * _inverse_products(columns / 2)


def _refinement_products(sweeps: int, rows: int, columns: int) -> float:
    """The gradient to begin with, and so many sweeps."""
    return rows * columns**2 + _sweep_products(sweeps, rows, columns) if sweeps else 0.0


def _sweep_products(sweeps: int, rows: int, columns: int) -> float:
    """Every group's codes with the Hessian's block, the descent over them, and their change with the Hessian."""
    return sweeps * rows * columns * (columns + 2 * GROUP_SIZE)
