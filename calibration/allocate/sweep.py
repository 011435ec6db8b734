"""What several budgets would bring, before any of them is chosen.

    points = sweep(Factors.load("factors.json"), parse_sweep("1.5:3.5:0.1"))
    points[0].checkpoint_bytes, points[0].predicted_kl

Every point is a plan that allocate made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_mcmoe.calibration.allocate.bits import average_bits, expert_bytes
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.problem import BudgetError
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.allocate.ranges import Budget, show_budget
from vllm_mcmoe.calibration.common.progress import Log, progress
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors
from vllm_mcmoe.calibration.recipes import Recipe, find_recipe
from vllm_mcmoe.errors import PlanError


@dataclass(frozen=True)
class SweepPoint:
    """One plan of a sweep.

    budget            what was asked for, as allocate takes it
    bits              average bits per expert weight as written
    expert_bytes      of all experts as written
    checkpoint_bytes  of the safetensors files, at most; None where the factors do not say what else is in them
    predicted_kl      nats per token, see predicted_kl
    """

    budget: Budget
    bits: float
    expert_bytes: int
    checkpoint_bytes: int | None
    predicted_kl: float

    @property
    def nbytes(self) -> int:
        """Of the whole checkpoint where that is known, else of the experts."""
        return self.expert_bytes if self.checkpoint_bytes is None else self.checkpoint_bytes


def sweep(
    factors: Factors,
    budgets: Sequence[Budget],
    *,
    recipe: str | Recipe = "mcmoe",
    linear_bits: int | None = None,
    log: Log = lambda message: None,
    show_progress: bool = True,
    **options: Any,
) -> list[SweepPoint]:
    """Allocate at each budget. Those that no plan meets are left out, which the log says.

    linear_bits  under sizes as allocate takes it; under bits, of the linears whose bytes count in checkpoint_bytes,
                 None for the recipe's
    options      further ones of allocate

    Raises PlanError where no budget can be met, or the factors do not say what experts weigh or what widths cost in KL.
    """
    recipe = find_recipe(recipe)
    points, refused = [], []
    for budget in progress(budgets, "Allocating", show=show_progress and len(budgets) > 1):
        held = {"linear_bits": linear_bits} if "size" in budget else {}
        try:
            plan = allocate(factors, recipe=recipe, **budget, **held, **options)
        except BudgetError as error:
            refused.append((budget, error))
            continue
        points.append(point_of(plan, factors, recipe, budget, linear_bits))
    if not points:
        raise refused[0][1] if refused else PlanError("a sweep needs at least one budget")
    if refused:
        left_out = ", ".join(show_budget(budget) for budget, _ in refused)
        log(f"Left out {left_out}: {refused[0][1]}")
    return points


def point_of(plan: Plan, factors: Factors, recipe: Recipe, budget: Budget, linear_bits: int | None) -> SweepPoint:
    """What a plan weighs and costs. Raises PlanError where the factors do not say."""
    if any(layer.shapes is None for layer in factors.layers.values()):
        raise PlanError(
            f"the factors of {factors.model} have no shapes of experts, so that nothing is known of sizes: calibrate "
            "again"
        )
    kl = predicted_kl(plan, factors)
    if kl is None:
        raise PlanError(
            f"the factors of {factors.model} do not say what the plan's widths cost in KL: calibrate with recipe "
            "mcmoe, or allocate with widths that were measured"
        )
    version, whole = recipe.format_version, None
    experts = expert_bytes(plan.layers, factors, version)
    if (table := factors.linears) is not None:
        held = recipe.linear_bits if linear_bits is None else linear_bits
        widths = [
            table.held_at(module, held) if plan.linears is None else plan.linears[module.names[0]]
            for module in table.modules
        ]
        linears = sum(module.nbytes[width] for module, width in zip(table.modules, widths, strict=True))
        whole = experts + table.other_bytes + linears
    return SweepPoint(budget, average_bits(plan.layers, factors, version), experts, whole, kl)


def predicted_kl(plan: Plan, factors: Factors) -> float | None:
    """Nats per token that a plan's experts and, where it decides them, linears are predicted to cost: the sum of what
    the factors say of each alone. None where they say nothing of a width.
    """
    total = 0.0
    for name, widths in plan.layers.items():
        loss = factors.layers[name].loss_increase
        for projection in PROJECTIONS:
            for expert, width in enumerate(widths[projection]):
                if loss is None or width not in loss[projection]:
                    return None
                total += loss[projection][width][expert]
    return total if plan.linears is None else _with_linears(total, plan.linears, factors)


def _with_linears(experts: float, linears: Mapping[str, int], factors: Factors) -> float | None:
    if factors.linears is None:
        return None
    total = experts
    for module in factors.linears.modules:
        width = linears.get(module.names[0])
        if width != 16 and width not in module.loss_increase:
            return None
        total += module.loss_increase.get(width, 0.0)
    return total
