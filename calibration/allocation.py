"""Which width every expert gets: an exact integer program over measured factors.

    minimise    sum over items i and widths j of  cost[i, j] * x[i, j]
    subject to  sum_j x[i, j] = 1            every item gets one width
                sum size[i, j] * x[i, j] <= budget   per layer, or once for the whole model
                least counts per width, x binary

An item is an expert, or one projection of an expert. Solved by HiGHS through scipy.optimize.milp.
(docs/method.md, section 1 has the paper's program, section 2 the authors' code's.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from vllm_mcmoe.calibration.artifacts import PROJECTIONS, Factors, LayerFactors, Plan
from vllm_mcmoe.calibration.recipes import Budget, Granularity, Objective, Recipe, Scope, find_recipe
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import GROUP_SIZE, WIDTHS

# Written bits are counted in whole eighths, so that sizes are integers and budgets can be compared exactly.
EIGHTHS = 8
SCALE_BITS = 16  # one fp16 scale per row and group, and one fp16 zero except at 1 bit

# Up to this many binary variables (32 layers x 8 experts x 2 projections x 4 widths) HiGHS proves optimality in about
# a second; at 48 x 128 it takes minutes. Larger problems are reduced to a core first: 61 x 256 then takes seconds, at a
# proven gap the plan records.
EXACT_VARIABLES = 2048
CORE_ITEMS = 100
LARGE_GAP = 1e-6

ROUNDING = 1e-12  # forgives 0.1 + 0.2: asked-for budgets are floating point, sizes are integers


def written_bits(width: int) -> float:
    """Bits per weight in the checkpoint: codes, plus scale and zero of every 128 weights. 2 -> 2.25, 1 -> 1.125."""
    return _written_eighths(width) / EIGHTHS


def _written_eighths(width: int) -> int:
    if width not in WIDTHS:
        raise PlanError(f"bit-width {width} is not one of {WIDTHS}")
    stored = SCALE_BITS if width == 1 else 2 * SCALE_BITS
    return EIGHTHS * width + EIGHTHS * stored // GROUP_SIZE


def average_bits(plan_layers: Mapping[str, Mapping[str, Sequence[int]]], factors: Factors) -> float:
    """Average bits per expert weight as written, scales and zeros included, weighted by the matrices' sizes."""
    eighths = numel = 0
    for name, widths in plan_layers.items():
        layer = factors.layers[name]
        for projection in PROJECTIONS:
            eighths += layer.written_numel(projection) * sum(_written_eighths(w) for w in widths[projection])
            numel += layer.numel(projection) * len(widths[projection])
    return eighths / numel / EIGHTHS


@dataclass(frozen=True)
class _Item:
    """What gets one width: an expert's projections that are quantised alike.

    costs, sizes   per width of the problem; sizes in eighths of a bit, or in bits under bits_per_layer
    """

    layer: str
    expert: int
    projections: tuple[str, ...]
    costs: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class _Problem:
    """What shares one budget: the items of one layer, or of all.

    budget   in the unit of the items' sizes
    per_ask  budget / per_ask is in the unit the user asked in, which is called unit
    forced   layer -> experts held at the top width
    where    what errors call it
    """

    recipe: Recipe
    items: list[_Item]
    budget: int
    per_ask: float
    unit: str
    forced: dict[str, list[int]]
    where: str

    def asked(self, size: int) -> str:
        return f"{size / self.per_ask:.4f}"


def allocate(
    factors: Factors,
    *,
    recipe: str | Recipe = "mcmoe",
    bits: float | None = None,
    bits_per_layer: float | None = None,
    widths: Sequence[int] | None = None,
    objective: Objective | None = None,
    scope: Scope | None = None,
    granularity: Granularity | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    budget: Budget | None = None,
) -> Plan:
    """Choose the width of every expert.

    Exactly one of
    bits            average bits per expert weight as written, scales and zeros included: a weight costs 1.125 bits at
                    1 bit, b + 0.25 above; matrices count by their size (factors' "shapes")
    bits_per_layer  sum of an expert's plain width over a layer's experts, as the authors count

    Everything else overrides the recipe's choice of the same name (Recipe documents them). objective: a recipe that
    wants "loss_increase" refuses factors that lack it; say objective="weighted_error" to allocate by activation
    counts, routing weights and output errors instead.

    Raises PlanError, with the feasible range, where no plan meets the budget, or for contradictory
    arguments or factors that lack what the objective needs.
    """
    overrides = {
        "widths": None if widths is None else tuple(sorted(set(widths))),
        "objective": objective,
        "scope": scope,
        "granularity": granularity,
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "budget": budget,
    }
    chosen = replace(find_recipe(recipe), **{k: v for k, v in overrides.items() if v is not None})
    _check_request(chosen, bits, bits_per_layer)
    items: list[_Item] = []
    selection: list[int] = []
    value, gap = None if chosen.objective == "uniform" else 0.0, 0.0
    for problem in _problems(factors, chosen, bits, bits_per_layer):
        _check_feasible(problem)
        if value is None:
            indices = _fill_in_index_order(problem)
        else:
            indices, gap_here = _solve(problem)
            value += float(sum(i.costs[j] for i, j in zip(problem.items, indices, strict=True)))
            gap = max(gap, gap_here)
        items += problem.items
        selection += indices
    plan = _plan(factors, chosen, items, selection)
    plan.requested_bits = bits
    plan.objective = value
    plan.extra["relative_gap"] = gap  # 0: proven optimal
    if bits_per_layer is not None:
        plan.extra["bits_per_layer"] = bits_per_layer
    return plan


def _check_request(recipe: Recipe, bits: float | None, bits_per_layer: float | None) -> None:
    if (bits is None) == (bits_per_layer is None):
        raise PlanError("give either bits (average as written) or bits_per_layer (plain widths per layer)")
    amount = bits if bits is not None else bits_per_layer
    if not math.isfinite(amount) or amount <= 0:
        raise PlanError(f"a budget of {amount} bits is not a positive number")
    unknown = [w for w in recipe.widths if w not in WIDTHS]
    if unknown or not recipe.widths:
        raise PlanError(f"widths {list(recipe.widths)}: expected a choice of {WIDTHS}")
    missing = [w for w, count in recipe.minimum_counts.items() if count and w not in recipe.widths]
    if missing:
        raise PlanError(
            f"recipe {recipe.name!r} requires experts at {missing} bits, which widths {list(recipe.widths)} excludes"
        )


def _problems(factors: Factors, recipe: Recipe, bits: float | None, bits_per_layer: float | None) -> list[_Problem]:
    names = list(factors.layers)
    problems = []
    for shared in [names] if recipe.scope == "model" else [[name] for name in names]:
        layers = [factors.layers[name] for name in shared]
        if bits is not None:
            amount, unit = bits, "bits per weight as written"
            per_ask = EIGHTHS * sum(layer.num_experts * layer.expert_numel for layer in layers)
        else:
            amount, unit = bits_per_layer, "bits per layer"
            per_ask = sum(layer.expert_numel for layer in layers)
        problems.append(
            _Problem(
                recipe,
                [item for name in shared for item in _items(name, factors.layers[name], recipe, bits is not None)],
                budget=math.floor(amount * per_ask * (1 + ROUNDING)),
                per_ask=per_ask,
                unit=unit,
                forced=_forced(factors, recipe, shared),
                where=f"layer {shared[0]!r}" if recipe.scope == "layer" else "the model",
            )
        )
    return problems


def _forced(factors: Factors, recipe: Recipe, layers: Sequence[str]) -> dict[str, list[int]]:
    if not recipe.keep_super_experts:
        return {}
    return {n: sorted(factors.layers[n].super_experts) for n in layers if factors.layers[n].super_experts}


def _items(name: str, layer: LayerFactors, recipe: Recipe, as_written: bool) -> list[_Item]:
    costs = _costs(name, layer, recipe)
    groups = [(p,) for p in PROJECTIONS] if recipe.granularity == "projection" else [PROJECTIONS]
    items = []
    for expert in range(layer.num_experts):
        for projections in groups:
            if as_written:
                sizes = [sum(map(layer.written_numel, projections)) * _written_eighths(w) for w in recipe.widths]
            else:
                sizes = [sum(map(layer.numel, projections)) * w for w in recipe.widths]
            items.append(_Item(name, expert, projections, costs[projections][expert], np.array(sizes)))
    return items


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


def _check_feasible(problem: _Problem) -> None:
    """Raises PlanError where the budget is below the smallest plan, or (for "=") above the largest."""
    smallest, largest = _extreme_size(problem, min), _extreme_size(problem, max)
    if problem.budget < smallest or (problem.recipe.budget == "=" and problem.budget > largest):
        smallest_asked = math.ceil(1e4 * smallest / problem.per_ask) / 1e4  # rounded down it would not be feasible
        raise PlanError(
            f"{problem.where}: {problem.asked(problem.budget)} {problem.unit} cannot be met with "
            f"{_constraints(problem)}; feasible are {smallest_asked:.4f} to {problem.asked(largest)}"
        )


def _constraints(problem: _Problem) -> str:
    parts = [f"widths {list(problem.recipe.widths)}"]
    parts += [f"at least {n} expert(s) per layer at {w} bits" for w, n in problem.recipe.minimum_counts.items() if n]
    held = sum(len(experts) for experts in problem.forced.values())
    if held:
        parts.append(f"{held} super expert(s) held at {max(problem.recipe.widths)} bits")
    return ", ".join(parts)


def _extreme_size(problem: _Problem, extreme: Callable[[np.ndarray], int]) -> int:
    """Size of the smallest or largest plan that keeps the least counts and forced experts."""
    widths = problem.recipe.widths
    total = 0
    for (layer, _), items in _kinds(problem).items():
        sizes = items[0].sizes  # the experts of a layer are of one shape
        least = np.array([problem.recipe.minimum_counts.get(width, 0) for width in widths])
        least[-1] = max(least[-1], len(problem.forced.get(layer, ())))
        if least.sum() > len(items):
            raise PlanError(f"layer {layer!r} has {len(items)} experts, too few for {_constraints(problem)}")
        total += int(least @ sizes) + (len(items) - int(least.sum())) * int(extreme(sizes))
    return total


def _kinds(problem: _Problem) -> dict[tuple[str, tuple[str, ...]], list[_Item]]:
    """(layer, projections) -> its items, one per expert."""
    kinds: dict[tuple[str, tuple[str, ...]], list[_Item]] = {}
    for item in problem.items:
        kinds.setdefault((item.layer, item.projections), []).append(item)
    return kinds


def _fill_in_index_order(problem: _Problem) -> list[int]:
    """The uninformed baseline: the largest uniform width that fits, then the next one for the first experts."""
    sizes = np.stack([item.sizes for item in problem.items])
    level = int((sizes.sum(axis=0) <= problem.budget).nonzero()[0][-1])
    if level + 1 == sizes.shape[1]:
        return [level] * len(sizes)
    steps = np.cumsum(sizes[:, level + 1] - sizes[:, level])
    upgraded = int((steps <= problem.budget - sizes[:, level].sum()).sum())
    return [level + 1] * upgraded + [level] * (len(sizes) - upgraded)


def _solve(problem: _Problem) -> tuple[list[int], float]:
    """The integer program. Returns the width index of every item, and the relative gap proven."""
    costs = np.stack([item.costs for item in problem.items])
    # HiGHS' tolerances are absolute: bring the objective to a mean of 1. What an item costs at its cheapest is lost
    # whatever is chosen, so it is left out, which makes the relative gap the stricter.
    costs = costs - costs.min(axis=1, keepdims=True)
    costs /= costs.mean() or 1.0
    sizes = np.stack([item.sizes for item in problem.items])
    allowed, bound = _allowed(problem), None
    large = costs.size > EXACT_VARIABLES
    if large and problem.recipe.budget == "<=" and not problem.recipe.minimum_counts:
        allowed, bound = _core(costs, sizes.astype(np.float64), allowed, problem.budget)
    result = milp(
        costs.ravel(),
        integrality=np.ones(costs.size),
        bounds=Bounds(0, allowed.ravel()),
        constraints=[_one_width_each(*costs.shape), _budget_row(problem), *_least_counts(problem)],
        options={"mip_rel_gap": LARGE_GAP if large else 0.0},
    )
    if result.x is None or result.status != 0:
        raise PlanError(
            f"{problem.where}: no plan has {'exactly' if problem.recipe.budget == '=' else 'at most'} "
            f"{problem.asked(problem.budget)} {problem.unit} with {_constraints(problem)} ({result.message}); "
            "a budget of '<=' is met by anything above the smallest plan"
        )
    indices = result.x.reshape(costs.shape).argmax(axis=1)
    rows = np.arange(len(indices))
    used = int(sizes[rows, indices].sum())
    if used > problem.budget or (problem.recipe.budget == "=" and used != problem.budget):
        raise RuntimeError(f"HiGHS returned a plan of size {used} for a budget of {problem.budget}; please report this")
    gap = float(result.mip_gap or 0.0)
    if bound is not None:
        value = float(costs[rows, indices].sum())
        gap = max(0.0, value - bound) / value if value else 0.0
    return indices.tolist(), gap


def _one_width_each(items: int, widths: int) -> LinearConstraint:
    columns = np.arange(items * widths)
    matrix = coo_array((np.ones(len(columns)), (columns // widths, columns)), shape=(items, len(columns)))
    return LinearConstraint(matrix.tocsr(), 1, 1)


def _budget_row(problem: _Problem) -> LinearConstraint:
    sizes = np.stack([item.sizes for item in problem.items])
    unit = int(np.gcd.reduce(sizes.ravel()))
    if problem.recipe.budget == "=" and problem.budget % unit:
        below = problem.budget // unit * unit
        raise PlanError(
            f"{problem.where}: exactly {problem.asked(problem.budget)} {problem.unit} is between two possible sums, "
            f"{problem.asked(below)} and {problem.asked(below + unit)}; ask for one of them or use a budget of '<='"
        )
    upper = problem.budget // unit
    return LinearConstraint((sizes // unit).reshape(1, -1), upper if problem.recipe.budget == "=" else -np.inf, upper)


def _least_counts(problem: _Problem) -> list[LinearConstraint]:
    """One row per layer, kind of item and constrained width."""
    rows = []
    for kind in _kinds(problem):
        inside = np.array([(item.layer, item.projections) == kind for item in problem.items], dtype=np.float64)
        for width, least in problem.recipe.minimum_counts.items():
            is_width = np.array(problem.recipe.widths) == width
            rows.append(LinearConstraint(np.outer(inside, is_width).reshape(1, -1), least, np.inf))
    return rows


def _allowed(problem: _Problem) -> np.ndarray:
    """Widths each item may have, bool [items, widths]: all, or the top one for forced experts."""
    allowed = np.ones((len(problem.items), len(problem.recipe.widths)), dtype=bool)
    for row, item in zip(allowed, problem.items, strict=True):
        if item.expert in problem.forced.get(item.layer, ()):
            row[:-1] = False
    return allowed


def _core(costs: np.ndarray, sizes: np.ndarray, allowed: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """Which widths remain to be decided in a large problem, and a lower bound on any plan's cost.

    At the Lagrangian price of size every item has a cheapest width. Only CORE_ITEMS items, those whose second choice
    is closest, are left open to spend the budget exactly; the bound proves how little that can lose.
    """
    costs = np.where(allowed, costs, np.inf)
    price = _price_of_size(costs, sizes, budget)
    priced = costs + price * sizes
    best_two = np.partition(priced, 1, axis=1)[:, :2]
    open_items = np.argsort(best_two[:, 1] - best_two[:, 0], kind="stable")[:CORE_ITEMS]
    core = priced == best_two[:, :1]
    core[open_items] = allowed[open_items]
    return core, float(best_two[:, 0].sum() - price * budget)


def _price_of_size(costs: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    """The lowest multiplier of size at which every item's cheapest width together fit the budget."""
    rows = np.arange(len(costs))

    def used(price: float) -> float:
        return sizes[rows, (costs + price * sizes).argmin(axis=1)].sum()

    if used(0.0) <= budget:
        return 0.0
    low, high = 0.0, 1e-30
    while used(high) > budget:
        low, high = high, high * 4
    for _ in range(100):  # bisection down to the last bit of a float64
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) > budget else (low, middle)
    return high


def _plan(factors: Factors, recipe: Recipe, items: Sequence[_Item], selection: Sequence[int]) -> Plan:
    layers = {n: {p: [0] * f.num_experts for p in PROJECTIONS} for n, f in factors.layers.items()}
    for item, index in zip(items, selection, strict=True):
        for projection in item.projections:
            layers[item.layer][projection][item.expert] = recipe.widths[index]
    return Plan(
        layers=layers,
        recipe=recipe.name,
        average_bits=average_bits(layers, factors),
        forced_experts=_forced(factors, recipe, list(factors.layers)),
        extra={
            "model": factors.model,
            "objective_kind": recipe.objective,
            "scope": recipe.scope,
            "granularity": recipe.granularity,
            "widths": list(recipe.widths),
            "budget": recipe.budget,
        },
    )
