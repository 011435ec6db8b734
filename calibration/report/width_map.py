"""Maps of a model's experts: layers from top to bottom, experts from left to right, one colour per class."""

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

from vllm_mcmoe.calibration.checkpoint.report import ExpertReport
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS
from vllm_mcmoe.calibration.report.markup import element, picture, standing_alone

WidthsByLayer = Mapping[str, Mapping[str, Sequence[int]]]  # layer name -> {"gate_up": [E], "down": [E]}

PANEL_WIDTH = 480  # a phone's width, so that text stays legible there; pages show two panels side by side
LEFT, TOP, GAP = 34, 30, 20
PER_LINE = 256  # experts; more are drawn in several lines per layer
LARGEST_CELL, SMALLEST_ROW, ROWS_HEIGHT = 40, 3.5, 360
DIGITS_FROM = 14  # units of a cell's sides from which its class is written into it
CELLS_WITH_NOTES = 2000  # beyond, a row has one note with all its experts

# The lightness rises from class to class, so that colour-blind readers and printers see their order.
WIDTH_COLOURS = {1: "#6a4fb3", 2: "#3874b8", 3: "#2fae9b", 4: "#9bd35a", 8: "#fbe34b"}
LIGHT_TEXT = ("#6a4fb3", "#3874b8")  # colours that white is legible on


@dataclass(frozen=True)
class Classes:
    """What the cells of a map may be.

    colours  class -> colour, in the order of the legend
    labels   class -> what the legend and notes call it
    digits   class -> what is written into large cells; empty writes nothing
    """

    colours: Mapping[int, str]
    labels: Mapping[int, str]
    digits: Mapping[int, str]


WIDTH_CLASSES = Classes(
    WIDTH_COLOURS,
    {width: f"{width} bit" if width == 1 else f"{width} bits" for width in WIDTH_COLOURS},
    {width: str(width) for width in WIDTH_COLOURS},
)


def widths_of(layers: Mapping[str, Sequence[ExpertReport]]) -> dict[str, dict[str, list[int]]]:
    """Layer -> projection -> widths, of a report's layers."""
    return {name: {p: [getattr(e, p) for e in experts] for p in PROJECTIONS} for name, experts in layers.items()}


def width_maps(widths: WidthsByLayer) -> dict[str, ET.Element]:
    """Projection -> its map, a picture for a page."""
    return {
        part: expert_map(f"widths-{part}", f"{part}: bits of every expert", by_layer, WIDTH_CLASSES)
        for part, by_layer in _by_projection(widths).items()
    }


def width_map_file(widths: WidthsByLayer) -> str:
    """The text of an SVG file with the maps of all projections side by side."""
    panels, height = [], 0.0
    for number, (part, by_layer) in enumerate(_by_projection(widths).items()):
        panel, height = _panel(f"{part}: bits of every expert", by_layer, WIDTH_CLASSES)
        panel.set("transform", f"translate({number * PANEL_WIDTH} 0)")
        panels.append(panel)
    title = "Bit-width of every expert"
    return standing_alone(picture("widths", title, describe_widths(widths), len(panels) * PANEL_WIDTH, height, *panels))


def describe_widths(widths: WidthsByLayer) -> str:
    """For people who do not see the map."""
    parts = []
    for part, by_layer in _by_projection(widths).items():
        count = Counter(width for row in by_layer.values() for width in row)
        shares = ", ".join(f"{count[w] / count.total():.0%} at {w}" for w in sorted(count))
        parts.append(f"{part}: {shares} bits")
    return f"{len(widths)} layers of {len(next(iter(widths.values()))['down'])} experts. " + "; ".join(parts) + "."


def _by_projection(widths: WidthsByLayer) -> dict[str, dict[str, Sequence[int]]]:
    return {part: {name: of_layer[part] for name, of_layer in widths.items()} for part in PROJECTIONS}


def layer_labels(names: Sequence[str]) -> list[str]:
    """ "model.layers.12.mlp.experts" is 12; names that this does not tell apart are numbered."""
    found = [match[1] if (match := re.search(r"\.(\d+)(?:\.|$)", name)) else None for name in names]
    return [str(i) for i in range(len(names))] if None in found or len(set(found)) < len(found) else found


def expert_map(
    name: str,
    title: str,
    rows: Mapping[str, Sequence[int]],
    classes: Classes,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> ET.Element:
    """A picture for a page. rows: layer -> class of every expert; notes: layer -> what a cell's tooltip adds."""
    panel, height = _panel(title, rows, classes, notes)
    count = Counter(value for row in rows.values() for value in row)
    shares = ", ".join(f"{classes.labels[c]} {count[c] / count.total():.0%}" for c in classes.colours if count[c])
    return picture(name, title, f"{len(rows)} layers. Share of the experts: {shares}.", PANEL_WIDTH, height, panel)


def _panel(
    title: str,
    rows: Mapping[str, Sequence[int]],
    classes: Classes,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> tuple[ET.Element, float]:
    """A map with its title, axes and legend, and the height it takes."""
    experts = max(map(len, rows.values()))
    grid = _Grid.of(len(rows), experts)
    panel = element("g", element("text", title, x=LEFT, y=18, class_="ink strong"))
    if experts * len(rows) <= CELLS_WITH_NOTES:
        panel.extend(_cells_with_notes(rows, classes, notes or {}, grid))
    else:
        panel.extend(_cells_by_class(rows, classes, grid))
    panel.extend(_axes(layer_labels(list(rows)), grid))
    legend, height = _legend(rows, classes, grid.y(len(rows)) + 34)
    panel.extend(legend)
    return panel, height


@dataclass(frozen=True)
class _Grid:
    """Where cells are: a layer has so many lines of so many columns; width and height are a cell's."""

    columns: int
    lines: int
    width: float
    height: float

    @classmethod
    def of(cls, layers: int, experts: int) -> Self:
        lines = -(-experts // PER_LINE)
        columns = -(-experts // lines)
        width = min((PANEL_WIDTH - LEFT - 8) / columns, LARGEST_CELL)
        height = max(SMALLEST_ROW, ROWS_HEIGHT / (layers * lines))
        return cls(columns, lines, width, min(height, max(22, width * 0.6)))

    def y(self, layer: int, line: float = 0) -> float:
        """Of the upper end of a layer's line."""
        return TOP + (layer * self.lines + line) * self.height


def _cells_with_notes(
    rows: Mapping[str, Sequence[int]], classes: Classes, notes: Mapping[str, Sequence[str]], grid: _Grid
) -> list[ET.Element]:
    """One group per expert: its cell, what is written into it, and a tooltip."""
    made, gap = [], min(1.0, grid.width / 10)
    for row, (label, (name, values)) in enumerate(zip(layer_labels(list(rows)), rows.items(), strict=True)):
        for expert, value in enumerate(values):
            x, y = LEFT + expert % grid.columns * grid.width, grid.y(row, expert // grid.columns)
            added = f", {notes[name][expert]}" if name in notes else ""
            title = element("title", f"layer {label}, expert {expert}: {classes.labels[value]}{added}")
            colour = classes.colours[value]
            square = element("rect", x=x, y=y, width=grid.width - gap, height=grid.height - gap, fill=colour)
            digit = None
            if classes.digits and min(grid.width, grid.height) >= DIGITS_FROM:
                ink = "#ffffff" if colour in LIGHT_TEXT else "#14181d"
                x, y = x + grid.width / 2, y + grid.height / 2 + 4
                digit = element("text", classes.digits[value], x=x, y=y, text_anchor="middle", fill=ink)
            made.append(element("g", title, square, digit))
    return made


def _cells_by_class(rows: Mapping[str, Sequence[int]], classes: Classes, grid: _Grid) -> list[ET.Element]:
    """One path per class, runs of equal cells as one, and a tooltip per layer: tens of thousands of cells in some
    hundred kilobytes."""
    paths: dict[int, list[str]] = defaultdict(list)
    for row, values in enumerate(rows.values()):
        for first in range(0, len(values), grid.columns):
            x, y = 0, row * grid.lines + first // grid.columns
            for value, run in groupby(values[first : first + grid.columns]):
                length = len(list(run))
                paths[value].append(f"M{x} {y}h{length}v1h-{length}z")
                x += length
    place = f"translate({LEFT} {TOP}) scale({grid.width:.5f} {grid.height:.5f})"
    scaled = element("g", transform=place, shape_rendering="crispEdges")  # no seams between rows
    scaled.extend(element("path", d="".join(paths[c]), fill=classes.colours[c]) for c in classes.colours if c in paths)
    size = {"width": grid.columns * grid.width, "height": grid.lines * grid.height}
    covers = []
    for row, (label, values) in enumerate(zip(layer_labels(list(rows)), rows.values(), strict=True)):
        title = element("title", f"layer {label}: {_experts_by_class(values, classes)}")
        covers.append(element("rect", title, x=LEFT, y=grid.y(row), class_="hover", **size))
    return [scaled, *covers]


def _experts_by_class(values: Sequence[int], classes: Classes) -> str:
    """ "1 bit: experts 0, 3-5; 2 bits: ..." """
    parts = []
    for value in classes.colours:
        members = [expert for expert, other in enumerate(values) if other == value]
        if members:
            parts.append(f"{classes.labels[value]}: experts {_ranges(members)}")
    return "; ".join(parts)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _axes(labels: Sequence[str], grid: _Grid) -> list[ET.Element]:
    """Numbers of layers at the left, of experts below, as many as there is room for."""
    texts = []
    for row in range(0, len(labels), math.ceil(13 / (grid.lines * grid.height))):
        y = grid.y(row, grid.lines / 2) + 4
        texts.append(element("text", labels[row], x=LEFT - 6, y=y, text_anchor="end", class_="muted small"))
    bottom = grid.y(len(labels))
    step = next((step for step in (1, 2, 4, 8, 16) if step * grid.width >= 18), 32)
    for expert in range(0, grid.columns, step):
        x = LEFT + (expert + 0.5) * grid.width
        texts.append(element("text", str(expert), x=x, y=bottom + 13, text_anchor="middle", class_="muted small"))
    wrapped = f" (each layer in {grid.lines} lines of {grid.columns})" if grid.lines > 1 else ""
    texts.append(element("text", f"layer \u2193, expert \u2192{wrapped}", x=LEFT, y=bottom + 27, class_="muted small"))
    return texts


def _legend(rows: Mapping[str, Sequence[int]], classes: Classes, top: float) -> tuple[list[ET.Element], float]:
    """Of the classes there are, with their shares, and where it ends."""
    count = Counter(value for row in rows.values() for value in row)
    made, x, y = [], float(LEFT), top
    for value in classes.colours:
        if not count[value]:
            continue
        text = f"{classes.labels[value]} ({count[value] / count.total():.0%})"
        width = 20 + 6.4 * len(text) + 14
        if x + width > PANEL_WIDTH and x > LEFT:
            x, y = float(LEFT), y + 18
        made.append(element("rect", x=x, y=y, width=12, height=12, rx=2, fill=classes.colours[value]))
        made.append(element("text", text, x=x + 17, y=y + 10, class_="ink"))
        x += width
    return made, y + 24
