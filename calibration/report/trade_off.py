"""What the integer program would have made of other sizes: a sweep around the plan that a checkpoint has."""

from dataclasses import dataclass, replace

from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.problem import BudgetError
from vllm_mcmoe.calibration.allocate.program import range_of_bits, range_of_sizes
from vllm_mcmoe.calibration.allocate.ranges import Budget
from vllm_mcmoe.calibration.allocate.sweep import SweepPoint, point_of, predicted_kl, sweep
from vllm_mcmoe.calibration.measure.factors import Factors
from vllm_mcmoe.calibration.recipes import METADATA, RECIPES, Recipe
from vllm_mcmoe.calibration.report.contents import Contents
from vllm_mcmoe.checkpoint import SCALAR_VERSION

POINTS = 13
STEPS = (10**9, 10**8, 10**7, 10**6, 10**5)  # bytes; the largest that is at most a fifth of the checkpoint


@dataclass(frozen=True)
class TradeOff:
    """A checkpoint among the plans that there are for its factors.

    points      from the smallest size to the largest
    here        the checkpoint's own plan
    less, more  plans of as many bytes less and more as step says; None where there is none
    step        bytes
    other       bytes of the checkpoint besides the experts', where the sweep decides nothing else, else 0
    """

    points: list[SweepPoint]
    here: SweepPoint
    less: SweepPoint | None
    more: SweepPoint | None
    step: int
    other: int

    def nbytes(self, point: SweepPoint) -> int:
        """Of the whole checkpoint, or of the experts where nothing else is known."""
        return point.expert_bytes + self.other if self.other else point.nbytes


def trade_off(contents: Contents, show_progress: bool) -> TradeOff | str:
    """Or the reason, for people, why there is none."""
    factors, plan = contents.factors, contents.plan
    if factors is None:
        return "factors.json is not there."
    if any(layer.loss_increase is None or layer.shapes is None for layer in factors.layers.values()):
        return "factors.json has no predicted loss increase, or no shapes of experts."
    if plan.linears is not None and (
        factors.linears is None or not all(m.loss_increase for m in factors.linears.modules)
    ):
        return "factors.json does not say what the other linears cost, whose widths plan.json decides."
    recipe = _recipe(contents)
    if predicted_kl(plan, factors) is None:
        return "The plan has widths whose loss increase was not measured."
    held = plan.extra.get("linear_bits")
    here = point_of(plan, factors, recipe, {}, held)
    other = 0
    if plan.linears is None and contents.report is not None:
        other = contents.report.total_bytes - contents.report.expert_bytes
    around = _around(plan, factors, recipe, held)
    points = sweep(factors, around, recipe=recipe, linear_bits=held, show_progress=show_progress)
    found = TradeOff(points, here, None, None, 0, other)
    step = next((s for s in STEPS if 5 * s <= found.nbytes(here)), STEPS[-1])
    less, more = (_at(factors, recipe, plan, held, here, sign * step) for sign in (-1, 1))
    return replace(found, less=less, more=more, step=step)


def _recipe(contents: Contents) -> Recipe:
    """The default's objective, whatever the plan's was, so that the points are the best by predicted KL; the plan's
    widths, scope and granularity, and the checkpoint's format."""
    plan, default = contents.plan, RECIPES["mcmoe"]
    measured = [set(widths) for layer in contents.factors.layers.values() for widths in layer.loss_increase.values()]
    common = set.intersection(*measured)
    widths = [width for width in plan.extra.get("widths", common) if width in common]
    version = contents.config.format_version
    codes = "trellis" if version > SCALAR_VERSION else "scalar"
    return replace(
        default,
        widths=tuple(sorted(widths or common)),
        scope=plan.extra.get("scope", default.scope),
        granularity=plan.extra.get("granularity", default.granularity),
        keep_super_experts=bool(plan.forced_experts),
        gptq=replace(default.gptq, metadata=METADATA[version], codes=codes),
    )


def _around(plan: Plan, factors: Factors, recipe: Recipe, linear_bits: int | None) -> list[Budget]:
    """Budgets from the least to the most, in the unit the plan was asked for in."""
    if plan.linears is not None:
        least, most = range_of_sizes(factors, recipe, linear_bits)
        return [{"size": least + (most - least) * i // (POINTS - 1)} for i in range(POINTS)]
    low, high = range_of_bits(factors, recipe)
    return [{"bits": low + (high - low) * i / (POINTS - 1)} for i in range(POINTS)]


def _at(
    factors: Factors, recipe: Recipe, plan: Plan, linear_bits: int | None, here: SweepPoint, change: int
) -> SweepPoint | None:
    """The plan of as many bytes more, or less; None where there is none."""
    decided = here.expert_bytes if plan.linears is None else here.nbytes
    if decided + change <= 0:
        return None
    budget: Budget = {"size": decided + change}
    if plan.linears is None:
        numel = sum(layer.num_experts * layer.expert_numel for layer in factors.layers.values())
        budget = {"bits": 8 * (decided + change) / numel}
    try:
        return sweep(factors, [budget], recipe=recipe, linear_bits=linear_bits, show_progress=False)[0]
    except BudgetError:
        return None
