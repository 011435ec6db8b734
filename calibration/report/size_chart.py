"""Predicted KL against size: the plans of a sweep, and what else is to be seen beside them."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_mcmoe.calibration.allocate.size import short_size, unit_for
from vllm_mcmoe.calibration.allocate.sweep import SweepPoint
from vllm_mcmoe.calibration.report.charts import Axis, Series, chart
from vllm_mcmoe.calibration.report.markup import standing_alone


@dataclass(frozen=True)
class Mark:
    """A single point: label in the legend, bytes, nats per token, tooltip."""

    label: str
    nbytes: int
    kl: float
    note: str
    shape: Literal["dot", "diamond"]


def size_chart(points: Sequence[tuple[int, SweepPoint]], what: str, marks: Sequence[Mark] = ()) -> ET.Element:
    """A picture for a page. points: bytes and plans; what: of which these are the bytes.

    The axis of KL is logarithmic: plans and marks of no KL at all are not on it.
    """
    unit, name = unit_for(max(nbytes for nbytes, _ in points))
    drawn = [(nbytes, point) for nbytes, point in points if point.predicted_kl > 0]
    series = [
        Series(
            "plans of the integer program, predicted",
            [(nbytes / unit, point.predicted_kl) for nbytes, point in drawn],
            [describe_point(point, nbytes) for nbytes, point in drawn],
        )
    ]
    for mark in (mark for mark in marks if mark.kl > 0):
        series.append(
            Series(mark.label, [(mark.nbytes / unit, mark.kl)], [mark.note], "orange", mark.shape, line=False)
        )
    described = "; ".join(f"{nbytes / unit:.3g} {name}: {point.predicted_kl:.3g}" for nbytes, point in points)
    described += "".join(f"; {mark.label}: {mark.kl:.3g} at {mark.nbytes / unit:.3g} {name}" for mark in marks)
    title = "KL to the original against size"
    x, y = Axis(f"{what}, {name}"), Axis("KL, nats per token", log=True)
    return chart("size", title, f"Nats per token. {described}.", x, y, series)


def sweep_file(points: Sequence[SweepPoint]) -> str:
    """The text of an SVG file."""
    whole = points[0].checkpoint_bytes is not None
    return standing_alone(size_chart([(point.nbytes, point) for point in points], "checkpoint" if whole else "experts"))


def describe_point(point: SweepPoint, nbytes: int) -> str:
    """For people."""
    return f"{short_size(nbytes)}, {point.bits:.2f} bits per expert weight: {point.predicted_kl:.4g} nats per token"
