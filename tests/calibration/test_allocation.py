"""Allocation against brute force, its budgets in written bits, its constraints and its errors."""

import ctypes
import itertools

import numpy as np
import pytest
from scipy.optimize import milp

from vllm_mcmoe.calibration.allocate import program
from vllm_mcmoe.calibration.allocate.bits import average_bits, written_bits
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors, LayerFactors
from vllm_mcmoe.calibration.recipes import RECIPES, Recipe
from vllm_mcmoe.errors import PlanError

WIDTHS = (1, 2, 3)
SHAPES = {"gate_up": [1024, 256], "down": [256, 512]}


def random_factors(layers: int, experts: int, seed: int = 0, widths: tuple[int, ...] = WIDTHS, **fields) -> Factors:
    """Errors fall with the width and differ a lot between experts, as real ones do."""
    rng = np.random.default_rng(seed)

    def errors() -> dict[int, list[float]]:
        importance = rng.lognormal(0, 1.5, experts)
        return {w: (importance * rng.lognormal(0, 0.3, experts) * 4.0**-w).tolist() for w in widths}

    return Factors(
        model="random",
        tokens=100,
        top_k=2,
        layers={
            f"layers.{i}": LayerFactors(
                activation_count=rng.integers(1, 100, experts).tolist(),
                routing_weight_sum=rng.uniform(1, 50, experts).tolist(),
                quantization_error=errors(),
                shapes=SHAPES,
                loss_increase={p: errors() for p in PROJECTIONS},
                **fields,
            )
            for i in range(layers)
        },
    )


def numel(projection: str) -> int:
    return SHAPES[projection][0] * SHAPES[projection][1]


def brute_force(factors: Factors, bits: float) -> float:
    """Least total loss_increase over all per-projection plans of at most that many written bits."""
    items = [(layer, e, p) for layer in factors.layers.values() for e in range(layer.num_experts) for p in PROJECTIONS]
    available = bits * sum(numel(p) for _, _, p in items)
    least = np.inf
    for widths in itertools.product(WIDTHS, repeat=len(items)):
        size = sum(written_bits(w) * numel(p) + 8 * SHAPES[p][0] for w, (_, _, p) in zip(widths, items, strict=True))
        if size <= available:
            cost = sum(layer.loss_increase[p][w][e] for w, (layer, e, p) in zip(widths, items, strict=True))
            least = min(least, cost)
    return least


def total_loss(plan: Plan, factors: Factors) -> float:
    return sum(
        factors.layers[name].loss_increase[p][width][expert]
        for name, widths in plan.layers.items()
        for p in PROJECTIONS
        for expert, width in enumerate(widths[p])
    )


@pytest.mark.parametrize("bits", [1.3, 1.9, 2.25, 2.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plan_is_the_optimum_that_brute_force_finds(bits, seed):
    factors = random_factors(layers=2, experts=2, seed=seed)
    plan = allocate(factors, recipe="mcmoe", bits=bits, widths=WIDTHS)
    # Both are sums of the same float64 numbers, in another order.
    assert plan.objective == pytest.approx(brute_force(factors, bits), rel=1e-12)
    assert total_loss(plan, factors) == pytest.approx(plan.objective, rel=1e-12)
    assert plan.average_bits <= bits
    assert plan.extra["relative_gap"] == 0


@pytest.mark.parametrize(("width", "bits"), [(1, 1.125), (2, 2.25), (3, 3.25), (4, 4.25), (8, 8.25)])
def test_written_bits_of_version_1_count_the_scale_and_above_one_bit_the_zero_of_every_128_weights(width, bits):
    assert written_bits(width, version=1) == bits


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_written_bits_of_version_2_count_a_byte_of_every_128_weights(width):
    assert written_bits(width) == width + 1 / 16


def test_average_bits_weigh_matrices_by_their_size():
    factors = random_factors(1, 2)
    widths = {"layers.0": {"gate_up": [1, 1], "down": [3, 3]}}
    weights, rows = numel("gate_up") + numel("down"), SHAPES["gate_up"][0] + SHAPES["down"][0]
    assert average_bits(widths, factors, version=1) == (1.125 * numel("gate_up") + 3.25 * numel("down")) / weights
    expected = (1.0625 * numel("gate_up") + 3.0625 * numel("down") + 8 * rows) / weights
    assert average_bits(widths, factors, version=2) == expected


@pytest.mark.parametrize("bits", [1.6, 2.0, 2.7])
@pytest.mark.parametrize("recipe", ["mcmoe", "paper-code"])
def test_model_scope_is_never_worse_than_layer_scope(bits, recipe):
    factors = random_factors(4, 8, widths=(1, 2, 3, 4))
    per_layer, per_model = (allocate(factors, recipe=recipe, bits=bits, scope=s) for s in ("layer", "model"))
    assert per_model.objective <= per_layer.objective * (1 + 1e-12)
    assert per_model.average_bits <= bits


def test_finer_granularity_is_never_worse():
    factors = random_factors(3, 8, widths=(1, 2, 3, 4))
    per_expert, per_projection = (allocate(factors, bits=2.0, granularity=g) for g in ("expert", "projection"))
    assert per_projection.objective <= per_expert.objective * (1 + 1e-12)
    assert all(w["gate_up"] == w["down"] for w in per_expert.layers.values())


def test_bits_per_layer_counts_plain_widths_as_the_authors_do():
    plan = allocate(random_factors(3, 8), recipe="paper-code", bits_per_layer=16)
    assert [sum(w["gate_up"]) for w in plan.layers.values()] == [16, 16, 16]


def test_an_equality_budget_is_met_exactly_and_never_beats_the_inequality():
    factors = random_factors(2, 4)
    equal = allocate(factors, recipe="paper-code", bits_per_layer=9, budget="=")
    at_most = allocate(factors, recipe="paper-code", bits_per_layer=9)
    assert [sum(w["down"]) for w in equal.layers.values()] == [9, 9]
    assert equal.objective >= at_most.objective


def test_an_equality_budget_between_two_sums_names_both():
    with pytest.raises(PlanError, match=r"8\.5000 bits per layer is between two possible sums, 8\.0000 and 9\.0000"):
        allocate(random_factors(1, 4), recipe="paper-code", bits_per_layer=8.5, budget="=")


def test_paper_code_keeps_an_expert_at_three_and_one_at_two_bits():
    for seed in range(5):
        plan = allocate(random_factors(2, 6, seed=seed), recipe="paper-code", bits_per_layer=9)
        for widths in plan.layers.values():
            assert {2, 3} <= set(widths["gate_up"])


@pytest.mark.parametrize("exponents", [(1.0, 1.5, 1.0), (0.5, 1.0, 2.0)], ids=["authors", "other"])
def test_weighted_error_is_the_papers_formula_with_its_exponents(exponents):
    alpha, beta, gamma = exponents
    factors = random_factors(1, 4)
    layer = factors.layers["layers.0"]
    plan = allocate(factors, recipe="paper-code", bits_per_layer=8, alpha=alpha, beta=beta, gamma=gamma)

    def normalised(values) -> np.ndarray:
        return np.array(values) / np.sum(values)

    error = normalised([layer.quantization_error[w] for w in WIDTHS])
    importance = normalised(layer.activation_count) ** alpha * normalised(layer.routing_weight_sum) ** beta
    costs = importance * error**gamma
    allowed = [c for c in itertools.product(range(3), repeat=4) if sum(c) + 4 <= 8 and 1 in c and 2 in c]
    least = min(sum(costs[level, expert] for expert, level in enumerate(c)) for c in allowed)
    assert plan.objective == pytest.approx(least, rel=1e-12)


def test_super_experts_are_held_at_the_top_width_whatever_they_seem_to_cost():
    factors = random_factors(2, 4, widths=(1, 2, 3, 4))
    factors.layers["layers.1"].super_experts = [2]
    for per_width in factors.layers["layers.1"].loss_increase.values():
        for values in per_width.values():
            values[2] = 0.0
    plan = allocate(factors, bits=1.8)
    assert (plan.layers["layers.1"]["gate_up"][2], plan.layers["layers.1"]["down"][2]) == (4, 4)
    assert plan.forced_experts == {"layers.1": [2]}
    assert plan.average_bits <= 1.8


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(2.25, [2, 2, 2, 2]), (2.5, [3, 2, 2, 2]), (2.9, [3, 3, 2, 2]), (1.2, [1, 1, 1, 1]), (8.25, [8, 8, 8, 8])],
)
def test_uniform_gives_the_first_experts_what_a_width_leaves_over(bits, expected):
    plan = allocate(random_factors(2, 4), recipe="uniform", bits=bits)
    assert all(w == {"gate_up": expected, "down": expected} for w in plan.layers.values())
    assert plan.average_bits <= bits


@pytest.mark.parametrize("recipe", ["uniform", "paper-code", "mcmoe"])
def test_a_budget_below_the_smallest_plan_says_what_is_feasible(recipe):
    factors = random_factors(1, 4, widths=(1, 2, 3, 4))
    with pytest.raises(PlanError, match=r"1\.0000 bits per weight as written cannot be met .* feasible are 1\.\d+ to"):
        allocate(factors, recipe=recipe, bits=1.0)


@pytest.mark.parametrize("recipe", ["mcmoe", "paper-code"])
def test_the_feasible_range_named_is_itself_feasible(recipe):
    factors = random_factors(2, 4, widths=(1, 2, 3, 4), super_experts=[0])
    with pytest.raises(PlanError, match="feasible are") as caught:
        allocate(factors, recipe=recipe, bits=1.1)
    smallest = float(str(caught.value).split("feasible are ")[1].split(" to ")[0])
    plan = allocate(factors, recipe=recipe, bits=smallest)
    assert plan.average_bits == pytest.approx(smallest, abs=1e-4)  # the message has four decimals, rounded up


def test_minimum_counts_that_exceed_the_experts_are_named():
    with pytest.raises(PlanError, match=r"has 1 experts, too few for .*at least 1 expert"):
        allocate(random_factors(1, 1), recipe="paper-code", bits=3.0)


def test_missing_loss_increase_is_an_error_until_another_objective_is_chosen():
    factors = random_factors(1, 4, widths=(1, 2, 3, 4))
    factors.layers["layers.0"].loss_increase = None
    with pytest.raises(PlanError, match=r'no loss_increase.*objective="weighted_error"'):
        allocate(factors, bits=2.0)
    with pytest.raises(PlanError, match='granularity="expert"'):
        allocate(factors, bits=2.0, objective="weighted_error")
    plan = allocate(factors, bits=2.0, objective="weighted_error", granularity="expert")
    assert plan.extra["objective_kind"] == "weighted_error"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either bits .* or bits_per_layer"),
        ({"bits": 2.0, "bits_per_layer": 8}, "either bits .* or bits_per_layer"),
        ({"bits": float("nan")}, "not a positive number"),
        ({"bits": 2.0, "widths": (2, 5)}, r"widths \[2, 5\]"),
        ({"bits": 2.0, "widths": (1, 8)}, r"measured for widths \[1, 2, 3\], not for \[8\]"),
        ({"bits": 2.0, "recipe": "best"}, "'best' is not one of mcmoe, paper-code, uniform"),
        ({"bits": 2.0, "recipe": "paper-code", "widths": (1, 2)}, r"requires experts at \[3\] bits"),
    ],
)
def test_contradictory_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(random_factors(1, 4), **arguments)


def test_without_shapes_gate_up_counts_twice_as_down():
    factors = random_factors(2, 4)
    for layer in factors.layers.values():
        layer.shapes = None
    known = {"recipe": "paper-code", "objective": "loss_increase", "granularity": "projection", "scope": "model"}
    with_shapes = allocate(random_factors(2, 4), bits=2.0, widths=WIDTHS, **known)
    # SHAPES has that ratio too; what rows add in version 2 is not known without shapes
    assert allocate(factors, bits=2.0, widths=WIDTHS, **known).layers == with_shapes.layers


def test_a_model_of_many_experts_is_solved_to_a_small_proven_gap():
    factors = random_factors(24, 128, widths=(1, 2, 3, 4))
    plan = allocate(factors, bits=2.0)
    assert plan.average_bits <= 2.0
    assert 0 <= plan.extra["relative_gap"] < 1e-4  # factors are measured to a few per cent
    exact = allocate(random_factors(4, 8, widths=(1, 2, 3, 4)), bits=2.0)
    assert exact.extra["relative_gap"] == 0


def test_the_core_of_a_large_problem_is_as_good_as_the_whole(monkeypatch):
    from vllm_mcmoe.calibration.allocate import program

    factors = random_factors(8, 16, widths=(1, 2, 3, 4))
    exact = allocate(factors, bits=2.0)
    monkeypatch.setattr(program, "EXACT_VARIABLES", 0)
    reduced = allocate(factors, bits=2.0)
    assert exact.objective <= reduced.objective * (1 + 1e-12)
    assert reduced.objective <= exact.objective / (1 - reduced.extra["relative_gap"]) * (1 + 1e-9)


def test_every_recipe_is_named_as_it_is_found():
    assert all(name == recipe.name and isinstance(recipe, Recipe) for name, recipe in RECIPES.items())


def test_what_the_solver_prints_stays_off_standard_output(capfd, monkeypatch):
    """HiGHS does so with the plan of SmolLM2's experts at 4 bits, by C's printf, and `--json` would not be JSON."""

    def talkative(*arguments, **options):
        ctypes.CDLL(None).puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
        return milp(*arguments, **options)

    monkeypatch.setattr(program, "milp", talkative)
    print("before")
    allocate(random_factors(1, 4, widths=(1, 2, 3, 4)), bits=2.0)
    print("after")
    printed = capfd.readouterr()
    assert printed.out == "before\nafter\n"
    assert printed.err == "HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n"
