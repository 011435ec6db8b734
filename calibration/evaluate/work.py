"""What quantising a model takes, step by step and by kind of work, from its sizes alone.

Counted are products of matrices, Cholesky factors and triangular solves, as the code does them, in multiply-adds; and
what takes time beside them: weights that compiled loops go through, that are read, decoded and written. What a unit of
each kind takes is a machine's Speed (speed.py). A counted run beside it: benchmarks/quantising_work.py.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from vllm_mcmoe.calibration.matrix.gptq import INVERTED_AT_ONCE
from vllm_mcmoe.calibration.matrix.second_moment import MOMENT_ROWS
from vllm_mcmoe.calibration.matrix.two_sided import COUPLED_ROWS
from vllm_mcmoe.calibration.measure.expert_errors import MEASURED_TOKENS, measures_some_rows
from vllm_mcmoe.calibration.measure.expert_tokens import MIN_EXPERT_TOKENS, POOL_TOKENS
from vllm_mcmoe.calibration.measure.output_gradients import GRADIENT_TOKENS
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.recipes import Recipe, needs_gradients, needs_output_gradients
from vllm_mcmoe.kernels.packing import GROUP_SIZE

# Multiply-adds,
#   linear    of linears with all tokens of a batch, or a chunk of an expert's
#   expert    of experts in a layer, with their part of a batch
#   backward  of experts in the passes with autograd's graph, forwards and backwards
#   moment    of Hessians
#   factor    of their Cholesky factors and inverses
#   update    between groups of columns while a matrix is quantised
#   coupling  of rows that share a Hessian of outputs, in a compiled loop
MultiplyAdds = Literal["linear", "expert", "backward", "moment", "factor", "update", "coupling"]
# and other units:
#   score     multiply-adds of attention between tokens, left out of all sums of multiply-adds
#   entry     of a Hessian that is made symmetric, scaled, ordered and copied
#   first     weights through GPTQ's pass over the columns, with the search for their grids
#   swept     weights through a sweep
#   rounded   weights rounded to nearest
#   read      weights of the model's files, checked for NaN, into a layer in float32
#   decoded   weights of the checkpoint, likewise
#   written   weights packed, written, and read again for their checksum
Kind = Literal[MultiplyAdds, "score", "entry", "first", "swept", "rounded", "read", "decoded", "written"]
Amounts = Mapping[Kind, float]

HELD_OUT_PASSES = 2  # of tuning: before and after
SCORES_WITH_GRADIENT = 3.5  # times attention's products: forwards two, backwards five


def multiply_adds(amounts: Amounts) -> float:
    """Of one step."""
    return sum(amount for kind, amount in amounts.items() if kind in get_args(MultiplyAdds))


@dataclass(frozen=True)
class Work:
    """Of the whole model, by kind.

    files            reading the model and writing the checkpoint
    forward          of layers, measuring and quantising
    backward         of loss gradients, with the forward pass again that autograd needs
    linears          quantising attention and shared experts
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

    files: Amounts
    forward: Amounts
    backward: Amounts
    linears: Amounts
    intermediates: Amounts
    hessians: Amounts
    factors: Amounts
    measuring: Amounts
    gptq: Amounts
    sweeps: Amounts
    output_sweeps: Amounts
    output_hessians: Amounts
    tuning: Amounts

    @property
    def of_experts(self) -> float:
        """Multiply-adds of all but the passes through layers and other linears."""
        return self.total - sum(map(multiply_adds, (self.forward, self.backward, self.linears, self.tuning)))

    @property
    def total(self) -> float:
        """Multiply-adds."""
        return sum(map(multiply_adds, asdict(self).values()))


@dataclass(frozen=True)
class ModelCounts:
    """Of the whole model.

    weights  all
    active   that a token is multiplied with
    head     of these, the output head's
    scores   multiply-adds of attention between tokens, for each token
    linears  [out, in] of those that are quantised beside the experts, by layer and stage: those of a stage share inputs
    """

    weights: int
    active: int
    head: int
    scores: float
    linears: list[list[tuple[int, int]]]


def count_work(
    description: MoeModel,
    recipe: Recipe,
    sequences: int,
    length: int,
    counts: ModelCounts,
    linear_bits: int,
    measures: bool | None = None,
) -> Work:
    """sequences x length calibration tokens. linear_bits: of attention and the like; 16 leaves them as they are.
    measures: whether factors or loss gradients are measured; None, whether the recipe has that done, which a uniform
    plan needs not.
    """
    if measures is None:
        measures = needs_gradients(recipe) or recipe.objective != "uniform"
    tokens = sequences * length
    of: dict[str, Counter[Kind]] = {name: Counter() for name in Work.__dataclass_fields__}
    some = recipe.measured_tokens
    measured = tokens if some is None or recipe.hessian_weighting == "gradient" else min(tokens, some)
    _count_passes(of, description, recipe, tokens, measured if measures else 0, counts, linear_bits)
    if recipe.tuning is not None:
        _count_tuning(of["tuning"], recipe, sequences, length, counts, _routed_weights(description))
    if linear_bits != 16:
        for stage in counts.linears:
            _count_linears(of["linears"], stage, tokens)
    for part, shape in description.part_shapes().items():
        _count_part(of, description, recipe, tokens, measured if measures else 0, part, *shape)
    return Work(**{name: dict(amounts) for name, amounts in of.items()})


def _count_passes(
    of: Mapping[str, Counter[Kind]],
    description: MoeModel,
    recipe: Recipe,
    tokens: int,
    measured: int,
    counts: ModelCounts,
    linear_bits: int,
) -> None:
    """Of all tokens through all layers, and of files. measured: tokens, 0 where nothing is measured."""
    routed = _routed_weights(description)
    others = counts.active - counts.head - routed  # attention, routers, dense layers, shared experts
    forward, with_gradients = of["forward"], needs_gradients(recipe)
    forward["linear"] += measured * (others + (counts.head if with_gradients else 0))
    # Once for the experts' inputs, once for the next layer's; and up to each stage of linears that are quantised.
    passes = 2 + (len(description.family.linears) if linear_bits != 16 else 0)
    forward["linear"] += passes * tokens * others
    forward["expert"] += (measured + tokens) * routed
    forward["score"] += (measured + passes * tokens) * counts.scores
    if measured and with_gradients:
        of["backward"]["backward"] += measured * 2 * routed
        of["backward"]["linear"] += measured * 2 * (others + counts.head)
        of["backward"]["score"] += measured * SCORES_WITH_GRADIENT * counts.scores
    # To check them, forwards, backwards and to be quantised.
    of["files"]["read"] += counts.weights * (2 + (measured > 0) * (2 if with_gradients else 1))
    of["files"]["written"] += counts.weights
    of["files"]["decoded"] += counts.weights  # for the inputs of the layers above


def _routed_weights(description: MoeModel) -> int:
    """Weights of experts that a token is multiplied with, in all layers."""
    expert = sum(rows * columns for rows, columns in description.part_shapes().values())
    return len(description.moe_layers) * description.top_k * expert


def _count_tuning(
    tuning: Counter[Kind], recipe: Recipe, sequences: int, length: int, counts: ModelCounts, routed: int
) -> None:
    """No gradients of weights, as in the loss gradients. What is held out is run twice forward instead."""
    chosen, passes = min(sequences, max(2, recipe.tuning.tokens // length)), recipe.tuning.passes
    used, steps = chosen * length, min(recipe.tuning.steps, chosen)
    others = counts.active - counts.head - routed
    tuning["expert"] += used * (1 + passes) * routed
    tuning["linear"] += used * (others + passes * 3 * (others + counts.head))
    tuning["backward"] += used * 2 * passes * routed
    tuning["score"] += used * (1 + passes * (1 + SCORES_WITH_GRADIENT)) * counts.scores
    tuning["read"] += counts.weights
    tuning["decoded"] += counts.weights * (2 * passes * steps + HELD_OUT_PASSES)
    tuning["written"] += counts.weights


def _count_linears(linears: Counter[Kind], stage: list[tuple[int, int]], tokens: int) -> None:
    columns = stage[0][1]
    linears["moment"] += tokens * upper_triangle(columns)
    linears["factor"] += factor_products(columns)
    linears["entry"] += columns**2
    for rows, _ in stage:
        linears["first"] += rows * columns
        linears["update"] += rows * columns**2 / 2


def _count_part(
    of: Mapping[str, Counter[Kind]],
    description: MoeModel,
    recipe: Recipe,
    tokens: int,
    measured: int,
    part: str,
    rows: int,
    columns: int,
) -> None:
    """Of gate_up or down [rows, columns] of all experts."""
    every = description.num_experts * len(description.moe_layers)
    own, own_measured = (count * description.top_k / description.num_experts for count in (tokens, measured))
    weights, gptq = rows * columns, recipe.gptq

    def count(step: str, **amounts: float) -> None:
        of[step].update({kind: every * amount for kind, amount in amounts.items()})

    if measured and recipe.objective != "uniform":
        count("intermediates", linear=own_measured * weights)
    own, own_measured = _hessian_tokens(own, tokens), _hessian_tokens(own_measured, measured)
    if part == "gate_up":
        count("intermediates", linear=own * weights)
    _count_factor(count, own, columns)
    if gptq.compensate:
        count("gptq", first=weights, update=weights * columns / 2)
        count("sweeps", **_sweeps(gptq.refinement_sweeps, rows, columns))
    else:
        count("gptq", rounded=weights)
    kept = min(measured, GRADIENT_TOKENS) * description.top_k / description.num_experts
    if needs_output_gradients(recipe) and kept >= MIN_EXPERT_TOKENS:
        coupled = min(rows, COUPLED_ROWS)
        count("output_sweeps", **_further_sweeps(gptq.output_sweeps, rows, columns))
        # of a sweep, in its descent and for the loss; and for the loss it begins with
        count("output_sweeps", coupling=gptq.output_sweeps * coupled * weights)
        count("output_sweeps", linear=(1 + gptq.output_sweeps) * coupled * weights)
        count("output_hessians", linear=kept * coupled * rows + kept * weights)
    if measured and recipe.objective != "uniform":
        factor = description.function.factor if part == "gate_up" else 1
        _count_measuring(count, recipe, own_measured, rows, columns, factor)


def _hessian_tokens(own: float, tokens: int) -> float:
    """Of an expert that has so many: too few are not enough (measure/expert_tokens.py)."""
    return own if own >= MIN_EXPERT_TOKENS else min(POOL_TOKENS, tokens)


def _count_measuring(
    count: Callable[..., None], recipe: Recipe, own: float, rows: int, columns: int, factor: int
) -> None:
    """factor: rows that a unit of the intermediate has."""
    weights, sampled, widths = rows * columns, min(own, MEASURED_TOKENS), len(recipe.widths)
    count("measuring", linear=2 * sampled * weights)  # the expert itself, and gradients through down
    quantised = rows
    if measures_some_rows(recipe, rows // factor):
        quantised = recipe.measured_rows * factor
        count("measuring", linear=sampled * weights, rounded=weights)  # all rows, rounded
    count("measuring", linear=widths * sampled * quantised * columns)
    if recipe.error_quantizer == "rtn":
        count("measuring", rounded=widths * weights)
        return
    _count_factor(count, own, columns)
    count("measuring", first=widths * quantised * columns, update=widths * quantised * columns**2 / 2)
    for kind, amount in _sweeps(recipe.gptq.refinement_sweeps, quantised, columns).items():
        count("measuring", **{kind: widths * amount})


def _count_factor(count: Callable[..., None], own: float, columns: int) -> None:
    """A Hessian of so many tokens."""
    count("hessians", moment=own * upper_triangle(columns))
    count("factors", factor=factor_products(columns), entry=columns**2)


def attention_products(length: int, width: int) -> float:
    """Multiply-adds between the tokens of a sequence. width: of keys and values, over all heads. No token sees later
    ones: half of all pairs."""
    return length**2 / 2 * width


def upper_triangle(columns: int) -> float:
    """Multiply-adds of a Hessian by token: blocks of rows, from the diagonal on."""
    starts = range(0, columns, MOMENT_ROWS)
    return sum(min(MOMENT_ROWS, columns - first) * (columns - first) for first in starts)


def factor_products(columns: int) -> float:
    """Multiply-adds of a Cholesky factor and its inverse."""
    return columns**3 / 6 + _inverse_products(columns)


def _inverse_products(columns: float) -> float:
    """Of a triangular matrix, in halves: two solves of each half's size, and two halves' inverses."""
    if columns <= INVERTED_AT_ONCE:
        return columns**3 / 2
    return (columns / 2) ** 3 + 2 * _inverse_products(columns / 2)


def _sweeps(sweeps: int, rows: int, columns: int) -> Amounts:
    """The gradient to begin with, and so many sweeps."""
    amounts = Counter(_further_sweeps(sweeps, rows, columns))
    if sweeps:
        amounts["linear"] += rows * columns**2
    return amounts


def _further_sweeps(sweeps: int, rows: int, columns: int) -> Amounts:
    """Every group's codes with the Hessian's block, the descent over them, and their change with the Hessian. The
    descent, in a compiled loop, is in `swept`, too."""
    return {"swept": sweeps * rows * columns, "update": sweeps * rows * columns * (columns + 2 * GROUP_SIZE)}
