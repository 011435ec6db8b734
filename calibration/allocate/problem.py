"""What is to be decided under one budget: items, what each width costs and takes, and whether any plan fits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_mcmoe.calibration.allocate.bits import SIXTEENTHS, written_sixteenths
from vllm_mcmoe.calibration.allocate.size import show_size
from vllm_mcmoe.calibration.matrix.linears import LINEAR_BITS, PACKED_BITS, SHAPE_BYTES
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors, LayerFactors
from vllm_mcmoe.calibration.recipes import Recipe
from vllm_mcmoe.errors import PlanError

BYTE = 8 * SIXTEENTHS  # in the unit of items' sizes
BYTES = "for the whole checkpoint"  # the unit of a size
ROUNDING = 1e-12  # forgives 0.1 + 0.2: asked-for budgets are floating point, sizes are integers


class BudgetError(PlanError):
    """A budget below the smallest plan, or above the largest."""


@dataclass(frozen=True)
class Item:
    """What gets one width: an expert's projections that are quantised alike, or linears that share their input.

    projections    of an expert; empty for linears, of which layer is the first one's name
    widths         it may have
    costs, sizes   per width; sizes in sixteenths of a bit, or in bits under bits_per_layer
    """

    layer: str
    expert: int
    projections: tuple[str, ...]
    widths: tuple[int, ...]
    costs: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Request:
    """What a plan may take; one of bits, bits_per_layer and size.

    bits            average bits per expert weight as written
    bits_per_layer  sum of an expert's plain width over a layer's experts
    size            bytes of the whole checkpoint
    linear_bits     with size: the width of all linears in decoder layers, which are then not decided
    """

    bits: float | None = None
    bits_per_layer: float | None = None
    size: int | None = None
    linear_bits: int | None = None


@dataclass(frozen=True)
class Problem:
    """What shares one budget: the items of one layer, or of all.

    budget   in the unit of the items' sizes
    per_ask  budget / per_ask is in the unit the user asked in, which is called unit
    other    what is asked for besides, in the unit of sizes: a checkpoint's bytes that nobody decides, items that have
             their width
    forced   layer -> experts held at the top width
    where    what errors call it
    """

    recipe: Recipe
    items: list[Item]
    budget: int
    per_ask: float
    unit: str
    forced: dict[str, list[int]]
    where: str
    other: int = 0

    def asked(self, size: int, round_up: bool = False) -> str:
        """For people: a size as they ask for it."""
        size += self.other
        if self.unit == BYTES:
            return show_size(-(-size // BYTE))
        asked = size / self.per_ask
        return f"{math.ceil(1e4 * asked) / 1e4 if round_up else asked:.4f}"


def problems_of(factors: Factors, recipe: Recipe, request: Request) -> list[Problem]:
    if request.size is not None:
        return _problems_of_size(factors, recipe, request)
    problems = []
    for shared in _scopes(factors, recipe):
        layers = [factors.layers[name] for name in shared]
        if request.bits is not None:
            amount, unit = request.bits, "bits per weight as written"
            per_ask = SIXTEENTHS * sum(layer.num_experts * layer.expert_numel for layer in layers)
        else:
            amount, unit = request.bits_per_layer, "bits per layer"
            per_ask = sum(layer.expert_numel for layer in layers)
        problems.append(
            Problem(
                recipe,
                [
                    item
                    for name in shared
                    for item in _items(name, factors.layers[name], recipe, request.bits is not None)
                ],
                budget=math.floor(amount * per_ask * (1 + ROUNDING)),
                per_ask=per_ask,
                unit=unit,
                forced=forced_experts(factors, recipe, shared),
                where=_where(recipe, shared),
            )
        )
    return problems


def _scopes(factors: Factors, recipe: Recipe) -> list[list[str]]:
    """Names of layers that share a budget."""
    names = list(factors.layers)
    return [names] if recipe.scope == "model" else [[name] for name in names]


def _where(recipe: Recipe, shared: Sequence[str]) -> str:
    return f"layer {shared[0]!r}" if recipe.scope == "layer" else "the model"


def _problems_of_size(factors: Factors, recipe: Recipe, request: Request) -> list[Problem]:
    """Sizes are of the whole checkpoint. Where layers have budgets of their own, these share what experts may take."""
    other, linears = _linear_items(factors, recipe, request)
    if linears and recipe.scope == "layer":
        raise PlanError(
            f"recipe {recipe.name!r} has one budget per layer, in which the other linears have no part: give "
            "linear bits beside the size"
        )
    if linears and recipe.objective != "loss_increase":
        raise PlanError(
            f"objective {recipe.objective!r} has another unit than what linears cost: give linear bits beside the size"
        )
    left = request.size * BYTE - other
    numels = {name: layer.num_experts * layer.expert_numel for name, layer in factors.layers.items()}
    problems = []
    for shared in _scopes(factors, recipe):
        budget = left * sum(numels[name] for name in shared) // sum(numels.values())
        items = [item for name in shared for item in _items(name, factors.layers[name], recipe, as_written=True)]
        problems.append(
            Problem(
                recipe,
                items + linears,
                budget=budget,
                per_ask=BYTE,
                unit=BYTES,
                forced=forced_experts(factors, recipe, shared),
                where=_where(recipe, shared),
                other=other if recipe.scope == "model" else 0,
            )
        )
    return problems


def _linear_items(factors: Factors, recipe: Recipe, request: Request) -> tuple[int, list[Item]]:
    """What is not decided, in sixteenths of a bit, and the linears that are.

    The 16 bytes of a packed linear's shape would spoil the common divisor of all sizes, by which the budget is stated
    exactly: they are charged to linears of 16 bits, too.
    """
    table = factors.linears
    if table is None:
        raise PlanError(factors.without_linears())
    other, items = table.other_bytes, []
    for module in table.modules:
        if request.linear_bits is not None:
            other += module.nbytes[table.held_at(module, request.linear_bits)]
            continue
        if not module.loss_increase:
            raise PlanError(
                f"{module.names[0]}: the factors of {factors.model} do not say what quantising it costs; calibrate "
                "with a recipe that measures loss increases, or give linear bits beside the size"
            )
        shapes = SHAPE_BYTES * len(module.names)
        other += shapes
        sizes = [module.nbytes[bits] - (shapes if bits in PACKED_BITS else 0) for bits in LINEAR_BITS]
        costs = [module.loss_increase.get(bits, 0.0) for bits in LINEAR_BITS]
        items.append(Item(module.names[0], 0, (), LINEAR_BITS, np.array(costs), BYTE * np.array(sizes)))
    return BYTE * other, items


def forced_experts(factors: Factors, recipe: Recipe, layers: Sequence[str]) -> dict[str, list[int]]:
    if not recipe.keep_super_experts:
        return {}
    return {n: sorted(factors.layers[n].super_experts) for n in layers if factors.layers[n].super_experts}


def _items(name: str, layer: LayerFactors, recipe: Recipe, as_written: bool) -> list[Item]:
    costs = _costs(name, layer, recipe)
    groups = [(p,) for p in PROJECTIONS] if recipe.granularity == "projection" else [PROJECTIONS]
    sizes = {projections: _sizes(layer, projections, recipe, as_written) for projections in groups}
    return [
        Item(name, expert, projections, recipe.widths, costs[projections][expert], sizes[projections])
        for expert in range(layer.num_experts)
        for projections in groups
    ]


def _sizes(layer: LayerFactors, projections: Sequence[str], recipe: Recipe, as_written: bool) -> np.ndarray:
    """Of these projections of one expert, at each width; the experts of a layer are of one shape."""
    if as_written:
        version = recipe.format_version
        return np.array([sum(written_sixteenths(layer, p, w, version) for p in projections) for w in recipe.widths])
    return np.array([sum(map(layer.numel, projections)) * w for w in recipe.widths])


def _costs(name: str, layer: LayerFactors, recipe: Recipe) -> dict[tuple[str, ...], np.ndarray]:
    """Projections quantised alike -> cost [E, widths] of giving them each width."""
    per_projection = [(p,) for p in PROJECTIONS]
    if recipe.objective == "uniform":
        nothing = np.zeros((layer.num_experts, len(recipe.widths)))
        return dict.fromkeys([*per_projection, PROJECTIONS], nothing)
    if recipe.objective == "loss_increase":
        if layer.loss_increase is None:
            raise PlanError(
                f"layer {name!r}: the factors have no loss_increase, which recipe {recipe.name!r} minimises; measure "
                'it, or choose objective="weighted_error"'
            )
        costs = {(p,): _table(name, f"loss_increase[{p!r}]", layer.loss_increase[p], recipe) for p in PROJECTIONS}
        return {**costs, PROJECTIONS: sum(costs.values())}
    if recipe.granularity == "projection":
        raise PlanError(
            f'layer {name!r}: objective "weighted_error" is measured per expert; choose granularity="expert", or the '
            'objective "loss_increase"'
        )
    return {PROJECTIONS: _weighted_error(name, layer, recipe)}


def _weighted_error(name: str, layer: LayerFactors, recipe: Recipe) -> np.ndarray:
    """frequency^alpha * routing weight^beta * error^gamma, [E, widths] (docs/method.md)."""
    frequency = np.array(layer.activation_count, dtype=np.float64)
    routing_weight = np.array(layer.routing_weight_sum, dtype=np.float64)
    error = _table(name, "quantization_error", layer.quantization_error, recipe)
    if recipe.normalise:
        frequency, routing_weight, error = (v / max(v.sum(), 1e-300) for v in (frequency, routing_weight, error))
    return (frequency**recipe.alpha * routing_weight**recipe.beta)[:, None] * error**recipe.gamma


def _table(name: str, key: str, per_width: Mapping[int, Sequence[float]], recipe: Recipe) -> np.ndarray:
    missing = [w for w in recipe.widths if w not in per_width]
    if missing:
        raise PlanError(
            f"layer {name!r}: {key} was measured for widths {sorted(per_width)}, not for {missing}; calibrate with "
            f"them or allocate with widths {[w for w in recipe.widths if w in per_width]}"
        )
    return np.array([per_width[w] for w in recipe.widths], dtype=np.float64).T


def check_feasible(problem: Problem) -> None:
    """Raises BudgetError where the budget is below the smallest plan, or above the largest: who asks for 8 bits where
    experts can have 4 is not to get 4 without a word."""
    smallest, largest = extreme_size(problem, min), extreme_size(problem, max)
    if not smallest <= problem.budget <= largest:
        raise BudgetError(
            f"{problem.where}: {problem.asked(problem.budget)} {problem.unit} cannot be met with "
            f"{constraints(problem)}; feasible are {problem.asked(smallest, round_up=True)} to {problem.asked(largest)}"
        )


def constraints(problem: Problem) -> str:
    parts = [f"widths {list(problem.recipe.widths)}"]
    if any(not item.projections for item in problem.items):
        parts = [f"experts' {parts[0]}, linears' {list(LINEAR_BITS)}"]
    parts += [f"at least {n} expert(s) per layer at {w} bits" for w, n in problem.recipe.minimum_counts.items() if n]
    held = sum(len(experts) for experts in problem.forced.values())
    if held:
        parts.append(f"{held} super expert(s) held at {max(problem.recipe.widths)} bits")
    return ", ".join(parts)


def extreme_size(problem: Problem, extreme: Callable[[np.ndarray], int]) -> int:
    """Size of the smallest or largest plan that keeps the least counts and forced experts."""
    widths = problem.recipe.widths
    total = 0
    for (layer, projections), items in kinds(problem).items():
        if not projections:
            total += int(extreme(items[0].sizes))
            continue
        sizes = items[0].sizes  # the experts of a layer are of one shape
        least = np.array([problem.recipe.minimum_counts.get(width, 0) for width in widths])
        least[-1] = max(least[-1], len(problem.forced.get(layer, ())))
        if least.sum() > len(items):
            raise PlanError(f"layer {layer!r} has {len(items)} experts, too few for {constraints(problem)}")
        total += int(least @ sizes) + (len(items) - int(least.sum())) * int(extreme(sizes))
    return total


def kinds(problem: Problem) -> dict[tuple[str, tuple[str, ...]], list[Item]]:
    """(layer, projections) -> its items, one per expert; linears alone."""
    kinds: dict[tuple[str, tuple[str, ...]], list[Item]] = {}
    for item in problem.items:
        kinds.setdefault((item.layer, item.projections), []).append(item)
    return kinds
