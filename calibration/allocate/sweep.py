"""What several budgets would bring, before any of them is chosen.

    points = sweep(Factors.load("factors.json"), parse_sweep("1.5:3.5:0.1"))
    points[0].checkpoint_bytes, points[0].predicted_kl

Every point is a plan that allocate made.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_mcmoe.calibration.allocate.bits import average_bits, expert_bytes
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.problem import BudgetError
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.allocate.size import parse_size, short_size, size_in_bytes
from vllm_mcmoe.calibration.common.progress import Log, progress
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors
from vllm_mcmoe.calibration.recipes import Recipe, find_recipe
from vllm_mcmoe.errors import PlanError

Budget = dict[str, Any]  # keywords of allocate: {"bits": 2.5} or {"size": "13.5GB"}

DEFAULT_STEPS = 10
MOST_POINTS = 200  # a step of a thousandth is a slip of the pen


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


def parse_sweep(text: str) -> list[Budget]:
    """ "1.5:3.5" and "1.5:3.5:0.1" -> bits of expert weights; "10GB:20GB:1GB" and "20%:40%:5%" -> sizes of the whole
    checkpoint. Both ends are in it where the step meets them; without a step there are eleven points.

    Raises PlanError for anything else.
    """
    parts = [part.strip() for part in text.split(":")]
    if len(parts) not in (2, 3) or not all(parts):
        raise PlanError(_what_a_sweep_is(text))
    if all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", part) for part in parts):
        return [{"bits": round(value, 6)} for value in _steps(text, [float(part) for part in parts])]
    try:
        sizes = [parse_size(part) for part in parts]
    except PlanError:
        raise PlanError(_what_a_sweep_is(text)) from None
    units = {unit for _, unit in sizes}
    if units == {"%"}:
        return [{"size": f"{value:g}%"} for value in _steps(text, [amount for amount, _ in sizes])]
    if "%" in units:
        raise PlanError(f"{text!r} has sizes in percent beside others; write all of them in percent, or none")
    return [{"size": round(value)} for value in _steps(text, [size_in_bytes(part, 0) for part in parts])]


def _what_a_sweep_is(text: str) -> str:
    return (
        f"{text!r} is not a range like 1.5:3.5 or 1.5:3.5:0.1 (bits per expert weight), 10GB:20GB:1GB or 20%:40% "
        "(sizes of the whole checkpoint)"
    )


def _steps(text: str, numbers: Sequence[float]) -> list[float]:
    start, stop = numbers[:2]
    if not 0 < start < stop:
        raise PlanError(f"{text!r}: a range begins above zero and ends above its beginning")
    step = numbers[2] if len(numbers) == 3 else (stop - start) / DEFAULT_STEPS
    count = math.floor((stop - start) / step * (1 + 1e-9)) + 1 if step else math.inf
    if count > MOST_POINTS:
        raise PlanError(f"{text!r} has more than {MOST_POINTS} points; give a larger step")
    return [start + i * step for i in range(count)]


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


def show_budget(budget: Budget) -> str:
    """For people."""
    if "bits" in budget:
        return f"{budget['bits']:g} bits"
    return short_size(budget["size"]) if isinstance(budget["size"], int) else budget["size"]


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
