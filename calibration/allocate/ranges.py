"""Ranges of budgets as people give them: "1.5:3.5:0.1" bits, "10GB:20GB:1GB"."""

import math
import re
from collections.abc import Sequence
from typing import Any

from vllm_mcmoe.calibration.allocate.size import parse_size, short_size, size_in_bytes
from vllm_mcmoe.errors import PlanError

Budget = dict[str, Any]  # keywords of allocate: {"bits": 2.5}, {"size": 13_500_000_000} or {"size": "45%"}

DEFAULT_STEPS = 10
MOST_POINTS = 200  # a step of a thousandth is a slip of the pen


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


def show_budget(budget: Budget) -> str:
    """For people."""
    if "bits" in budget:
        return f"{budget['bits']:g} bits"
    return short_size(budget["size"]) if isinstance(budget["size"], int) else budget["size"]
