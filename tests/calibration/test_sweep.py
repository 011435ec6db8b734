"""The trade-off before the work: what budgets would bring, by the plans that allocate makes for them."""

from itertools import pairwise

import pytest

from tests.calibration.test_allocation import random_factors
from tests.calibration.test_size import with_linears
from vllm_mcmoe.calibration.allocate.program import allocate, range_of_bits, range_of_sizes
from vllm_mcmoe.calibration.allocate.ranges import parse_sweep, show_budget
from vllm_mcmoe.calibration.allocate.sweep import predicted_kl, sweep
from vllm_mcmoe.calibration.recipes import find_recipe
from vllm_mcmoe.errors import PlanError

WIDTHS = (1, 2, 3, 4)
FACTORS = with_linears(random_factors(3, 8, widths=WIDTHS))


def quietly(factors, budgets, **options):
    return sweep(factors, budgets, show_progress=False, **options)


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("1.5:3.5:0.5", [{"bits": 1.5}, {"bits": 2.0}, {"bits": 2.5}, {"bits": 3.0}, {"bits": 3.5}]),
        ("1.5:2.6:0.5", [{"bits": 1.5}, {"bits": 2.0}, {"bits": 2.5}]),
        ("10GB:11GB:500MB", [{"size": 10_000_000_000}, {"size": 10_500_000_000}, {"size": 11_000_000_000}]),
        ("20%:40%:10%", [{"size": "20%"}, {"size": "30%"}, {"size": "40%"}]),
    ],
)
def test_ranges_are_of_bits_or_of_sizes(text, budgets):
    assert parse_sweep(text) == budgets


def test_without_a_step_a_range_has_eleven_points_both_ends_among_them():
    bits = [budget["bits"] for budget in parse_sweep("1.5:3.5")]
    assert bits == [1.5, 1.7, 1.9, 2.1, 2.3, 2.5, 2.7, 2.9, 3.1, 3.3, 3.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2.5", "not a range like 1.5:3.5"),
        ("1:2:0.1:3", "not a range like"),
        (":2", "not a range like"),
        ("a:b", "not a range like"),
        ("3:2", "ends above its beginning"),
        ("0:2", "begins above zero"),
        ("1:2:0", "more than 200 points"),
        ("1:2:0.001", "more than 200 points"),
        ("10%:20GB", "all of them in percent"),
        ("2:20GB", "not a range like"),
    ],
)
def test_what_is_no_range_is_refused_with_what_one_is(text, message):
    with pytest.raises(PlanError, match=message):
        parse_sweep(text)


def test_predicted_kl_falls_with_size_and_is_what_allocate_predicts():
    points = quietly(FACTORS, parse_sweep("1.5:3.5:0.25"))
    assert len(points) == 9
    for smaller, larger in pairwise(points):
        assert smaller.predicted_kl > larger.predicted_kl
        assert smaller.checkpoint_bytes < larger.checkpoint_bytes
    for point in points:
        plan = allocate(FACTORS, bits=point.budget["bits"])
        assert point.predicted_kl == pytest.approx(plan.objective, rel=1e-12)
        assert point.bits == plan.average_bits <= point.budget["bits"]


def test_sizes_decide_linears_too_and_are_kept():
    least, most = range_of_sizes(FACTORS, find_recipe("mcmoe"))
    points = quietly(FACTORS, [{"size": least + (most - least) * i // 4} for i in range(5)])
    for point in points:
        plan = allocate(FACTORS, size=point.budget["size"])
        assert plan.linears is not None
        assert point.predicted_kl == pytest.approx(plan.objective, rel=1e-12)
        assert point.checkpoint_bytes == plan.extra["planned_bytes"] <= point.budget["size"]
    assert [p.predicted_kl for p in points] == sorted((p.predicted_kl for p in points), reverse=True)


def test_bytes_of_a_checkpoint_count_linears_at_the_width_they_will_have():
    at_4, at_16 = (quietly(FACTORS, [{"bits": 2.0}], linear_bits=bits)[0] for bits in (None, 16))
    table = FACTORS.linears
    in_layers = [module for module in table.modules if module.names[0] != table.head]
    assert at_16.checkpoint_bytes - at_4.checkpoint_bytes == sum(m.nbytes[16] - m.nbytes[4] for m in in_layers)
    assert at_4.checkpoint_bytes > at_4.expert_bytes + table.other_bytes


def test_without_a_table_of_linears_the_experts_bytes_are_what_is_known():
    (point,) = quietly(random_factors(2, 4, widths=WIDTHS), [{"bits": 2.0}])
    assert point.checkpoint_bytes is None
    weights = 2 * 4 * (1024 * 256 + 256 * 512)
    assert point.expert_bytes == pytest.approx(point.bits * weights / 8)


def test_budgets_that_no_plan_meets_are_left_out_and_named():
    told = []
    points = quietly(FACTORS, parse_sweep("1.0:2.0:0.5"), log=told.append)
    assert [point.budget["bits"] for point in points] == [1.5, 2.0]
    (message,) = told
    assert message.startswith("Left out 1 bits: ") and "feasible are 1." in message
    with pytest.raises(PlanError, match=r"feasible are 1\.\d+ to"):
        quietly(FACTORS, parse_sweep("5:6:1"))


def test_the_ends_of_the_range_of_bits_are_feasible_and_nothing_beyond():
    low, high = range_of_bits(FACTORS, find_recipe("mcmoe"))
    points = quietly(FACTORS, [{"bits": bits} for bits in (low - 1e-3, low, high, high + 1e-3)])
    assert [point.budget["bits"] for point in points] == [low, high]
    assert [point.bits for point in points] == pytest.approx([low, high])


def test_other_recipes_are_priced_in_predicted_kl_and_never_beat_the_default():
    options = {"widths": (1, 2, 3), "granularity": "expert"}
    authors = quietly(FACTORS, [{"bits": 2.5}], recipe="paper-code", **options)[0]
    ours = quietly(FACTORS, [{"bits": 2.5}])[0]
    assert authors.predicted_kl > ours.predicted_kl


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda layer: setattr(layer, "shapes", None), "no shapes of experts"),
        (lambda layer: setattr(layer, "loss_increase", None), "do not say what the plan's widths cost in KL"),
    ],
)
def test_factors_that_lack_sizes_or_losses_are_refused(spoil, message):
    factors = random_factors(2, 4, widths=WIDTHS)
    for layer in factors.layers.values():
        spoil(layer)
    with pytest.raises(PlanError, match=message):
        quietly(factors, [{"bits": 2.5}], recipe="uniform", widths=WIDTHS)


def test_a_width_that_was_not_measured_has_no_price():
    plan = allocate(FACTORS, bits=2.0)
    plan.layers["layers.0"]["down"][0] = 8
    assert predicted_kl(plan, FACTORS) is None


def test_a_budget_is_shown_as_it_is_asked_for():
    assert [show_budget(b) for b in ({"bits": 2.5}, {"size": "30%"}, {"size": 10_500_000_000})] == [
        "2.5 bits", "30%", "10.5 GB",
    ]  # fmt: skip
