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
    Item,
    Problem,
    check_feasible,
    constraints,
    forced_experts,
    kinds,
    problems_of,
)
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors, LayerFactors
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.recipes import Budget, Granularity, Objective, Recipe, Scope, find_recipe
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import WIDTHS

# Up to this many binary variables (32 layers x 8 experts x 2 projections x 4 widths) HiGHS proves optimality in about
# a second; at 48 x 128 it takes minutes. Larger problems are reduced to a core first: 61 x 256 then takes seconds, at a
# proven gap the plan records.
EXACT_VARIABLES = 2048


LARGE_GAP = 1e-6


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
    bits            average bits per expert weight as written, scales and zeros included: of recipe "mcmoe" a weight
                    costs a sixteenth of a bit more than its code; matrices count by their size (factors' "shapes")
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
    items: list[Item] = []
    selection: list[int] = []
    value, gap = None if chosen.objective == "uniform" else 0.0, 0.0
    for problem in problems_of(factors, chosen, bits, bits_per_layer):
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
) -> None:
    """Whether any plan has this budget, before anything is measured. Raises PlanError as allocate would."""
    recipe = recipe if widths is None else replace(recipe, widths=tuple(sorted(set(widths))))
    nothing = [0.0] * model.num_experts
    layer = LayerFactors(
        activation_count=nothing,
        routing_weight_sum=nothing,
        quantization_error=dict.fromkeys(recipe.widths, nothing),
        shapes=model.part_shapes(),
        loss_increase={part: dict.fromkeys(recipe.widths, nothing) for part in PROJECTIONS},
    )
    factors = Factors(str(model.path), 0, model.top_k, dict.fromkeys(model.moe_layers.values(), layer))
    _check_request(recipe, bits, bits_per_layer)
    for problem in problems_of(factors, recipe, bits, bits_per_layer):
        check_feasible(problem)


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
    costs = np.stack([item.costs for item in problem.items])
    # HiGHS' tolerances are absolute: bring the objective to a mean of 1. What an item costs at its cheapest is lost
    # whatever is chosen, so it is left out, which makes the relative gap the stricter.
    costs = costs - costs.min(axis=1, keepdims=True)
    costs /= costs.mean() or 1.0
    sizes = np.stack([item.sizes for item in problem.items])
    allowed, bound = _allowed(problem), None
    large = costs.size > EXACT_VARIABLES
    if large and problem.recipe.budget == "<=" and not problem.recipe.minimum_counts:
        allowed, bound = reduce_to_core(costs, sizes.astype(np.float64), allowed, problem.budget)
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
            f"{problem.asked(problem.budget)} {problem.unit} with {constraints(problem)} ({result.message}); "
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


def _budget_row(problem: Problem) -> LinearConstraint:
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


def _least_counts(problem: Problem) -> list[LinearConstraint]:
    """One row per layer, kind of item and constrained width."""
    rows = []
    for kind in kinds(problem):
        inside = np.array([(item.layer, item.projections) == kind for item in problem.items], dtype=np.float64)
        for width, least in problem.recipe.minimum_counts.items():
            is_width = np.array(problem.recipe.widths) == width
            rows.append(LinearConstraint(np.outer(inside, is_width).reshape(1, -1), least, np.inf))
    return rows


def _allowed(problem: Problem) -> np.ndarray:
    """Widths each item may have, bool [items, widths]: all, or the top one for forced experts."""
    allowed = np.ones((len(problem.items), len(problem.recipe.widths)), dtype=bool)
    for row, item in zip(allowed, problem.items, strict=True):
        if item.expert in problem.forced.get(item.layer, ()):
            row[:-1] = False
    return allowed


def _plan(factors: Factors, recipe: Recipe, items: Sequence[Item], selection: Sequence[int]) -> Plan:
    layers = {n: {p: [0] * f.num_experts for p in PROJECTIONS} for n, f in factors.layers.items()}
    for item, index in zip(items, selection, strict=True):
        for projection in item.projections:
            layers[item.layer][projection][item.expert] = recipe.widths[index]
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
