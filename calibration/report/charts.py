"""Charts of lines over two axes, of which the upright one may be logarithmic."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_mcmoe.calibration.report.markup import element, picture

WIDTH, HEIGHT = 480, 300  # a phone's width, so that text stays legible there
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 44
MARGIN = 0.04  # of an axis, beyond the outermost values
LEGEND_LINE = 18

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line, or points alone.

    label   in the legend; empty leaves it out there
    points  (x, y), from left to right
    notes   the points' tooltips; one alone is the line's
    look    colour of the stylesheet, or a colour of its own
    mark    what stands at each point
    """

    label: str
    points: Sequence[Point]
    notes: Sequence[str]
    look: str = "blue"
    mark: Literal["", "dot", "diamond"] = "dot"
    line: bool = True
    dashed: bool = False


def _show_tick(value: float) -> str:
    """0.003, but 3e-4."""
    return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


@dataclass(frozen=True)
class Axis:
    """label: with its unit; ticks: where they are, None for round numbers."""

    label: str
    log: bool = False
    ticks: Sequence[float] | None = None


def chart(
    name: str, title: str, description: str, x: Axis, y: Axis, series: Sequence[Series], frame: Sequence[Point] = ()
) -> ET.Element:
    """A picture for a page. frame: points that both axes reach to, besides those drawn.

    A logarithmic axis has no place for values that are not above zero: they must have been left out.
    """
    points = [*frame, *(point for line in series for point in line.points)]
    across = _Scale(x, [p[0] for p in points], LEFT, WIDTH - RIGHT)
    upwards = _Scale(y, [p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = [element("text", title, x=8, y=18, class_="ink strong"), *_grid(across, upwards)]
    for line in series:
        parts += _drawn(line, across, upwards)
    legend, height = _legend(series)
    return picture(name, title, description, WIDTH, height, *parts, *legend)


class _Scale:
    """Values of one axis -> coordinates between two ends."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float):
        self.axis, self.start, self.end = axis, start, end
        places = [self._place(value) for value in values] or [0.0]
        low, high = min(places), max(places)
        space = MARGIN * (high - low) or abs(high) * 0.1 or 1.0
        self.low, self.high = low - space, high + space
        if not axis.log and low >= 0 > self.low:
            self.low = 0.0

    def _place(self, value: float) -> float:
        return math.log10(value) if self.axis.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._place(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.axis.ticks is not None:
            return list(self.axis.ticks)
        return _log_ticks(self.low, self.high) if self.axis.log else _even_ticks(self.low, self.high)


def _even_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many multiples of 1, 2 or 5 times a power of ten."""
    magnitude = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * magnitude for m in (1, 2, 5, 10, 20) if (high - low) / (m * magnitude) <= most)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """low and high: logarithms. Powers of ten, with 2 and 5 times them where there are few."""
    steps = (1,) if high - low > 4 else (1, 3) if high - low > 2 else (1, 2, 5)
    every = max(1, math.ceil((high - low) / 8))
    powers = range(math.floor(low), math.ceil(high) + 1, every)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _grid(across: _Scale, upwards: _Scale) -> list[ET.Element]:
    made = []
    for value in upwards.ticks():
        y = upwards(value)
        made.append(element("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="grid"))
        made.append(element("text", _show_tick(value), x=LEFT - 6, y=y + 4, text_anchor="end", class_="muted small"))
    for value in across.ticks():
        x = across(value)
        made.append(element("path", d=f"M{x:.1f} {HEIGHT - BOTTOM}v4", class_="grid"))
        made.append(
            element("text", _show_tick(value), x=x, y=HEIGHT - BOTTOM + 16, text_anchor="middle", class_="muted small")
        )
    made.append(element("path", d=f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="grid"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    made.append(element("text", across.axis.label, x=middle, y=HEIGHT - 10, text_anchor="middle", class_="muted"))
    made.append(
        element(
            "text", upwards.axis.label, text_anchor="middle", class_="muted",
            transform=f"translate(13 {(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)",
        )
    )  # fmt: skip
    return made


def _drawn(line: Series, across: _Scale, upwards: _Scale) -> list[ET.Element]:
    placed = [(across(x), upwards(y)) for x, y in line.points]
    made = []
    if line.line and len(placed) > 1:
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        made.append(_stroke(line, d, line.notes[0] if len(line.notes) == 1 else None))
    if line.mark:
        made += [_mark(line, x, y, note) for (x, y), note in zip(placed, line.notes, strict=True)]
    return made


def _stroke(line: Series, d: str, note: str | None = None) -> ET.Element:
    title = element("title", note) if note else None
    if line.look.startswith("#"):
        return element("path", title, d=d, stroke=line.look, fill="none", stroke_width=1.4, opacity=0.9)
    return element("path", title, d=d, class_=f"line-{line.look}" + (" dashed" if line.dashed else ""))


def _mark(line: Series, x: float, y: float, note: str | None) -> ET.Element:
    title = element("title", note) if note else None
    if line.mark == "diamond":
        return element("path", title, d=f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z", class_=f"dot-{line.look}")
    return element("circle", title, cx=x, cy=y, r=4, class_=f"dot-{line.look}")


def _legend(series: Sequence[Series]) -> tuple[list[ET.Element], float]:
    """One line each, below the chart, and the height of all."""
    made, y = [], float(HEIGHT)
    for line in series:
        if not line.label:
            continue
        if line.line:
            made.append(_stroke(line, f"M{LEFT - 26} {y + 6:g}h24"))
        if line.mark:
            made.append(_mark(line, LEFT - 14, y + 6, None))
        made.append(element("text", line.label, x=LEFT + 6, y=y + 10, class_="ink"))
        y += LEGEND_LINE
    return made, y + 6
