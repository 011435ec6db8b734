"""Which width every expert gets: an exact integer program over measured factors.

    minimise    sum over items i and widths j of  cost[i, j] * x[i, j]
    subject to  sum_j x[i, j] = 1            every item gets one width
                sum size[i, j] * x[i, j] <= budget   per layer, or once for the whole model
                least counts per width, x binary

An item is an expert, or one projection of an expert. Solved by HiGHS through scipy.optimize.milp.
(docs/method.md, section 1 has the paper's program, section 2 the authors' code's.)
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from vllm_mcmoe.calibration.allocate.bits import average_bits
from vllm_mcmoe.calibration.allocate.core import reduce_to_core
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.problem import (
    BYTE,
    Item,
    Problem,
    Request,
    check_feasible,
    constraints,
    extreme_size,
    forced_experts,
    kinds,
    problems_of,
)
from vllm_mcmoe.calibration.allocate.size import parse_size, size_in_bytes
from vllm_mcmoe.calibration.common.native_output import native_output_on_stderr
from vllm_mcmoe.calibration.matrix.linears import PACKED_BITS, check_linear_bits
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors, LayerFactors, LinearTable
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.recipes import Budget, Granularity, Objective, Recipe, Scope, find_recipe
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import WIDTHS

# Up to this many binary variables (32 layers x 8 experts x 2 projections x 4 widths) HiGHS proves optimality in about
# a second; at 48 x 128 it takes minutes. Larger problems are reduced to a core first: 58 x 256 then takes half a second
# to four, at a proven gap the plan records.
EXACT_VARIABLES = 2048


LARGE_GAP = 1e-6


def allocate(
    factors: Factors,
    *,
    recipe: str | Recipe = "mcmoe",
    bits: float | None = None,
    bits_per_layer: float | None = None,
    size: str | int | None = None,
    linear_bits: int | None = None,
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
    bits            average bits per expert weight as written, scales and zeros included: of recipe "mcmoe" a weight
                    costs a sixteenth of a bit more than its code; matrices count by their size (factors' "shapes")
    bits_per_layer  sum of an expert's plain width over a layer's experts, as the authors count
    size            of the whole checkpoint, its safetensors files: bytes, or text like "13.5GB", "12.5GiB" or "45%" (of
                    the model in 16 bits). The widths of the other linears and of the output head are then chosen in
                    the same program, unless linear_bits holds the linears at 4, 8 or 16 (and the head at 16)

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
    request = _request(chosen, factors, bits, bits_per_layer, size, linear_bits)
    items: list[Item] = []
    selection: list[int] = []
    value, gap = None if chosen.objective == "uniform" else 0.0, 0.0
    for problem in problems_of(factors, chosen, request):
        check_feasible(problem)
        if value is None:
            indices = _fill_in_index_order(problem)
        else:
            indices, gap_here = _solve(problem)
            value += float(sum(i.costs[j] for i, j in zip(problem.items, indices, strict=True)))
            gap = max(gap, gap_here)
        items += problem.items
        selection += indices
    plan = _plan(factors, chosen, items, selection)
    if request.size is not None:
        _add_linears(plan, factors, request, items, selection)
    plan.requested_bits = bits
    plan.objective = value
    plan.extra["relative_gap"] = gap  # 0: proven optimal
    if bits_per_layer is not None:
        plan.extra["bits_per_layer"] = bits_per_layer
    return plan


def check_budget(
    model: MoeModel,
    recipe: Recipe,
    bits: float | None,
    bits_per_layer: float | None,
    widths: Sequence[int] | None = None,
    *,
    size: str | int | None = None,
    linear_bits: int | None = None,
    linears: LinearTable | None = None,
) -> None:
    """Whether any plan has this budget, before anything is measured. Raises PlanError as allocate would.

    linears: with size, of the model's linears; what they cost is not looked at
    """
    factors = _without_costs(model, recipe, widths, linears)
    recipe = recipe if widths is None else replace(recipe, widths=tuple(sorted(set(widths))))
    request = _request(recipe, factors, bits, bits_per_layer, size, linear_bits)
    for problem in problems_of(factors, recipe, request):
        check_feasible(problem)


def size_range(
    model: MoeModel, recipe: Recipe, linears: LinearTable, linear_bits: int | None = None
) -> tuple[int, int]:
    """Bytes of the smallest and of the largest checkpoint that a size may ask for."""
    return range_of_sizes(_without_costs(model, recipe, None, linears), recipe, linear_bits)


def range_of_sizes(factors: Factors, recipe: Recipe, linear_bits: int | None = None) -> tuple[int, int]:
    """The same of a model that was measured."""
    problems = problems_of(factors, recipe, Request(size=0, linear_bits=linear_bits))
    sizes = (sum(extreme_size(problem, extreme) - problem.budget for problem in problems) for extreme in (min, max))
    least, largest = (-(-size // BYTE) for size in sizes)
    return least, largest


def range_of_bits(factors: Factors, recipe: Recipe) -> tuple[float, float]:
    """The least and the most average bits per expert weight, as written, that allocate meets."""
    problems = problems_of(factors, recipe, Request(bits=1.0))
    least, most = ([extreme_size(p, extreme) / p.per_ask for p in problems] for extreme in (min, max))
    return max(least), min(most)  # every budget holds for itself


def _without_costs(
    model: MoeModel, recipe: Recipe, widths: Sequence[int] | None, linears: LinearTable | None
) -> Factors:
    """What is known of a model that was not measured."""
    widths = recipe.widths if widths is None else widths
    nothing = [0.0] * model.num_experts
    layer = LayerFactors(
        activation_count=nothing,
        routing_weight_sum=nothing,
        quantization_error=dict.fromkeys(widths, nothing),
        shapes=model.part_shapes(),
        loss_increase={part: dict.fromkeys(widths, nothing) for part in PROJECTIONS},
    )
    if linears is not None:
        modules = [replace(module, loss_increase=dict.fromkeys(PACKED_BITS, 0.0)) for module in linears.modules]
        linears = replace(linears, modules=modules)
    layers = dict.fromkeys(model.moe_layers.values(), layer)
    return Factors(str(model.path), 0, model.top_k, layers, linears)


def _request(
    recipe: Recipe,
    factors: Factors,
    bits: float | None,
    bits_per_layer: float | None,
    size: str | int | None,
    linear_bits: int | None,
) -> Request:
    _check_request(recipe, bits, bits_per_layer, size, linear_bits)
    if size is not None:
        original = 0 if factors.linears is None else factors.linears.original_bytes
        size = size_in_bytes(size, original)
    return Request(bits, bits_per_layer, size, linear_bits)


def _check_request(
    recipe: Recipe,
    bits: float | None,
    bits_per_layer: float | None,
    size: str | int | None,
    linear_bits: int | None,
) -> None:
    given = [amount for amount in (bits, bits_per_layer, size) if amount is not None]
    if len(given) != 1:
        raise PlanError(
            "give either bits (average as written) or bits_per_layer (plain widths per layer) or size (of the whole "
            "checkpoint)"
        )
    if linear_bits is not None:
        if size is None:
            raise PlanError("linear_bits holds linears at a width under a size; bits leaves them out of the plan")
        check_linear_bits(linear_bits)
    if size is not None and recipe.budget == "=":
        raise PlanError("a size is an upper bound; a budget of '=' goes with bits")
    (amount,) = given
    if isinstance(amount, str):
        parse_size(amount)
        amount = 1
    if not math.isfinite(amount) or amount <= 0:
        raise PlanError(f"a budget of {amount} {'bits' if size is None else 'bytes'} is not a positive number")
    unknown = [w for w in recipe.widths if w not in WIDTHS]
    if unknown or not recipe.widths:
        raise PlanError(f"widths {list(recipe.widths)}: expected a choice of {WIDTHS}")
    missing = [w for w, count in recipe.minimum_counts.items() if count and w not in recipe.widths]
    if missing:
        raise PlanError(
            f"recipe {recipe.name!r} requires experts at {missing} bits, which widths {list(recipe.widths)} excludes"
        )


def _fill_in_index_order(problem: Problem) -> list[int]:
    """The uninformed baseline: the largest uniform width that fits, then the next one for the first experts."""
    sizes = np.stack([item.sizes for item in problem.items])
    level = int((sizes.sum(axis=0) <= problem.budget).nonzero()[0][-1])
    if level + 1 == sizes.shape[1]:
        return [level] * len(sizes)
    steps = np.cumsum(sizes[:, level + 1] - sizes[:, level])
    upgraded = int((steps <= problem.budget - sizes[:, level].sum()).sum())
    return [level + 1] * upgraded + [level] * (len(sizes) - upgraded)


def _solve(problem: Problem) -> tuple[list[int], float]:
    """The integer program. Returns the width index of every item, and the relative gap proven."""
    costs, sizes, allowed = _tables(problem)
    # HiGHS' tolerances are absolute: bring the objective to a mean of 1. What an item costs at its cheapest is lost
    # whatever is chosen, so it is left out, which makes the relative gap the stricter.
    costs = costs - costs.min(axis=1, keepdims=True)
    costs /= costs.mean() or 1.0
    large = costs.size > EXACT_VARIABLES
    if large and problem.recipe.budget == "<=" and not problem.recipe.minimum_counts:
        allowed, bound = reduce_to_core(costs, sizes.astype(np.float64), allowed, problem.budget)
        indices = _solve_core(problem, costs, sizes, allowed)
        value = float(costs[np.arange(len(indices)), indices].sum())
        gap = max(0.0, value - bound) / value if value else 0.0
    else:
        indices, gap = _milp(problem, costs, sizes, allowed, LARGE_GAP if large else 0.0)
    used = int(sizes[np.arange(len(indices)), indices].sum())
    if used > problem.budget or (problem.recipe.budget == "=" and used != problem.budget):
        raise RuntimeError(f"HiGHS returned a plan of size {used} for a budget of {problem.budget}; please report this")
    return indices.tolist(), gap


def _solve_core(problem: Problem, costs: np.ndarray, sizes: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Width indices of all items, of which most have one allowed width only: HiGHS sees the others alone."""
    indices, is_open = allowed.argmax(axis=1), allowed.sum(axis=1) > 1
    decided = np.flatnonzero(~is_open)
    spent = int(sizes[decided, indices[decided]].sum())
    core = replace(
        problem,
        items=[item for item, open_ in zip(problem.items, is_open, strict=True) if open_],
        budget=problem.budget - spent,
        other=problem.other + spent,
    )
    if core.items:  # none where all are held at a width
        indices[is_open], _ = _milp(core, costs[is_open], sizes[is_open], allowed[is_open], LARGE_GAP)
    return indices


def _milp(
    problem: Problem, costs: np.ndarray, sizes: np.ndarray, allowed: np.ndarray, gap: float
) -> tuple[np.ndarray, float]:
    """HiGHS, to this relative gap. Returns the width index of every item, and the gap proven."""
    rows = [_one_width_each(*costs.shape), _budget_row(problem, sizes), *_least_counts(problem, costs.shape)]
    with native_output_on_stderr():  # where a repaired solution is tried, HiGHS prints a line whatever it is told
        result = milp(
            costs.ravel(),
            integrality=np.ones(costs.size),
            bounds=Bounds(0, allowed.ravel()),
            constraints=rows,
            options={"mip_rel_gap": gap},
        )
    if result.x is None or result.status != 0:
        raise PlanError(
            f"{problem.where}: no plan has {'exactly' if problem.recipe.budget == '=' else 'at most'} "
            f"{problem.asked(problem.budget)} {problem.unit} with {constraints(problem)} ({result.message}); "
            "a budget of '<=' is met by anything above the smallest plan"
        )
    return result.x.reshape(costs.shape).argmax(axis=1), float(result.mip_gap or 0.0)


def _one_width_each(items: int, widths: int) -> LinearConstraint:
    columns = np.arange(items * widths)
    matrix = coo_array((np.ones(len(columns)), (columns // widths, columns)), shape=(items, len(columns)))
    return LinearConstraint(matrix.tocsr(), 1, 1)


def _budget_row(problem: Problem, sizes: np.ndarray) -> LinearConstraint:
    unit = int(np.gcd.reduce(sizes.ravel()))
    if problem.recipe.budget == "=" and problem.budget % unit:
        below = problem.budget // unit * unit
        raise PlanError(
            f"{problem.where}: exactly {problem.asked(problem.budget)} {problem.unit} is between two possible sums, "
            f"{problem.asked(below)} and {problem.asked(below + unit)}; ask for one of them or use a budget of '<='"
        )
    upper = problem.budget // unit
    return LinearConstraint((sizes // unit).reshape(1, -1), upper if problem.recipe.budget == "=" else -np.inf, upper)


def _least_counts(problem: Problem, shape: tuple[int, int]) -> list[LinearConstraint]:
    """One row per layer, kind of item and constrained width. shape: [items, columns]."""
    rows = []
    if not problem.recipe.minimum_counts:
        return rows
    for kind in kinds(problem):
        if not kind[1]:
            continue
        inside = np.array([(item.layer, item.projections) == kind for item in problem.items], dtype=np.float64)
        for width, least in problem.recipe.minimum_counts.items():
            is_width = np.arange(shape[1]) == problem.recipe.widths.index(width)
            rows.append(LinearConstraint(np.outer(inside, is_width).reshape(1, -1), least, np.inf))
    return rows


def _tables(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """costs, float64, sizes, int64, and whether an item may have the width, bool; all [items, columns].

    Column j is an item's j-th width; where it has fewer, its last one is repeated and not allowed. Of forced experts
    the top width alone is.
    """
    columns = max(len(item.widths) for item in problem.items)
    repeated = [np.minimum(np.arange(columns), len(item.widths) - 1) for item in problem.items]
    costs = np.stack([item.costs[index] for item, index in zip(problem.items, repeated, strict=True)])
    sizes = np.stack([item.sizes[index] for item, index in zip(problem.items, repeated, strict=True)])
    allowed = np.zeros(costs.shape, dtype=bool)
    for row, item in zip(allowed, problem.items, strict=True):
        row[: len(item.widths)] = True
        if item.projections and item.expert in problem.forced.get(item.layer, ()):
            row[: len(item.widths) - 1] = False
    return costs, sizes, allowed


def _plan(factors: Factors, recipe: Recipe, items: Sequence[Item], selection: Sequence[int]) -> Plan:
    layers = {n: {p: [0] * f.num_experts for p in PROJECTIONS} for n, f in factors.layers.items()}
    for item, index in zip(items, selection, strict=True):
        for projection in item.projections:
            layers[item.layer][projection][item.expert] = item.widths[index]
    return Plan(
        layers=layers,
        recipe=recipe.name,
        average_bits=average_bits(layers, factors, recipe.format_version),
        forced_experts=forced_experts(factors, recipe, list(factors.layers)),
        extra={
            "model": factors.model,
            "objective_kind": recipe.objective,
            "scope": recipe.scope,
            "granularity": recipe.granularity,
            "widths": list(recipe.widths),
            "budget": recipe.budget,
        },
    )


def _add_linears(
    plan: Plan, factors: Factors, request: Request, items: Sequence[Item], selection: Sequence[int]
) -> None:
    """What a plan for a size of the whole checkpoint says of its linears, and of its bytes."""
    table = factors.linears
    chosen = {i.layer: i.widths[j] for i, j in zip(items, selection, strict=True) if not i.projections}
    widths = [
        table.held_at(module, request.linear_bits) if request.linear_bits is not None else chosen[module.names[0]]
        for module in table.modules
    ]
    pairs = list(zip(table.modules, widths, strict=True))
    plan.linears = {name: width for module, width in pairs for name in module.names}
    expert_bits = sum(int(i.sizes[j]) for i, j in zip(items, selection, strict=True) if i.projections)
    planned = table.other_bytes + sum(module.nbytes[width] for module, width in pairs) + -(-expert_bits // BYTE)
    plan.extra["requested_bytes"] = request.size
    plan.extra["planned_bytes"] = planned  # of the safetensors files, at most
    plan.extra["linear_bits"] = request.linear_bits
