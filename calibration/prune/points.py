"""pruning_report.json: what the pruning rule of a checkpoint was measured to drop and to cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_mcmoe.calibration.checkpoint.writer import PRUNING_REPORT
from vllm_mcmoe.calibration.common.documents import FORMAT_VERSION, Reader, read_document, save_document


@dataclass(frozen=True)
class PrunedPoint:
    """One line of the table.

    target, pruned   the fraction of expert activations asked for, and dropped on the evaluation text
    perplexity       geometric mean over the files
    mean_kl          nats per token, from the same checkpoint unpruned
    """

    target: float
    pruned: float
    perplexity: float
    mean_kl: float


def save_points(checkpoint: Path, rule: str, points: Sequence[PrunedPoint]) -> None:
    """rule: sha256 of the rule measured, as config.json names it."""
    lines = [{key: value if math.isfinite(value) else None for key, value in vars(p).items()} for p in points]
    save_document({"format_version": FORMAT_VERSION, "rule": rule, "points": lines}, checkpoint / PRUNING_REPORT)


def forget_points(checkpoint: Path) -> None:
    """Of a rule that was replaced."""
    (checkpoint / PRUNING_REPORT).unlink(missing_ok=True)


def load_points(checkpoint: Path, rule: str) -> list[PrunedPoint] | None:
    """None where nothing was kept of this rule. Raises FormatError for a file that is not what save_points writes."""
    path = checkpoint / PRUNING_REPORT
    if not path.is_file():
        return None
    reader = Reader(str(path))
    top = reader.header(read_document(path), "report of pruning")
    points = []
    for number, document in enumerate(reader.instance(top.get("points"), list, "points")):
        at = reader.within(f"points[{number}]")
        point = {key: math.inf if value is None else value for key, value in at.mapping(document, "point").items()}
        points.append(PrunedPoint(*(_number(at, point.get(field.name), field.name) for field in fields(PrunedPoint))))
    return points if top.get("rule") == rule else None


def _number(reader: Reader, value: Any, key: str) -> float:
    """A broken model's perplexity exceeds every float, which JSON has no number for."""
    return value if value == math.inf else reader.number(value, key)
