"""Maps of a model's experts: layers from top to bottom, experts from left to right, one colour per class."""

import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

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
LIGHT_TEXT = ("#6a4fb3", "#3874b8", "#3d4451", "#5a3fa0", "#93409b", "#c64a7d")  # colours that white is legible on


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
    lines = -(-experts // PER_LINE)
    columns = -(-experts // lines)
    cell = min((PANEL_WIDTH - LEFT - 8) / columns, LARGEST_CELL)
    line = min(max(SMALLEST_ROW, ROWS_HEIGHT / (len(rows) * lines)), max(22, cell * 0.6), LARGEST_CELL)
    bottom = TOP + line * lines * len(rows)
    panel = element("g", element("text", title, x=LEFT, y=18, class_="ink strong"))
    if experts * len(rows) <= CELLS_WITH_NOTES:
        cells = _cells_with_notes(rows, classes, notes or {}, columns, lines, cell, line)
    else:
        cells = _cells_by_class(rows, classes, columns, lines, cell, line)
    panel.extend([*cells, *_axes(list(rows), experts, columns, lines, cell, line, bottom)])
    legend, height = _legend(rows, classes, bottom + 34)
    panel.extend(legend)
    return panel, height


def _cells_with_notes(
    rows: Mapping[str, Sequence[int]],
    classes: Classes,
    notes: Mapping[str, Sequence[str]],
    columns: int,
    lines: int,
    cell: float,
    line: float,
) -> list[ET.Element]:
    """One group per expert: its cell, what is written into it, and a tooltip."""
    made = []
    for row, (label, (name, values)) in enumerate(zip(layer_labels(list(rows)), rows.items(), strict=True)):
        for expert, value in enumerate(values):
            x, y = LEFT + expert % columns * cell, TOP + (row * lines + expert // columns) * line
            colour, gap = classes.colours[value], min(1.0, cell / 10)
            added = f", {notes[name][expert]}" if name in notes else ""
            note = f"layer {label}, expert {expert}: {classes.labels[value]}{added}"
            square = element("rect", x=x, y=y, width=cell - gap, height=line - gap, fill=colour)
            digit = None
            if classes.digits and min(cell, line) >= DIGITS_FROM:
                ink = "#ffffff" if colour in LIGHT_TEXT else "#14181d"
                digit = element(
                    "text", classes.digits[value], x=x + cell / 2, y=y + line / 2 + 4, text_anchor="middle", fill=ink
                )
            made.append(element("g", element("title", note), square, digit))
    return made


def _cells_by_class(
    rows: Mapping[str, Sequence[int]], classes: Classes, columns: int, lines: int, cell: float, line: float
) -> list[ET.Element]:
    """One path per class, runs of equal cells as one, and a tooltip per layer: tens of thousands of cells in some
    hundred kilobytes."""
    paths: dict[int, list[str]] = defaultdict(list)
    for row, values in enumerate(rows.values()):
        for first in range(0, len(values), columns):
            x, y = 0, row * lines + first // columns
            for value, run in groupby(values[first : first + columns]):
                length = len(list(run))
                paths[value].append(f"M{x} {y}h{length}v1h-{length}z")
                x += length
    place = f"translate({LEFT} {TOP}) scale({cell:.5f} {line:.5f})"
    scaled = element("g", transform=place, shape_rendering="crispEdges")  # no seams between rows
    scaled.extend(element("path", d="".join(paths[c]), fill=classes.colours[c]) for c in classes.colours if c in paths)
    width = columns * cell
    covers = [
        element(
            "rect",
            element("title", f"layer {label}: {_experts_by_class(values, classes)}"),
            x=LEFT,
            y=TOP + row * lines * line,
            width=width,
            height=lines * line,
            class_="hover",
        )
        for row, (label, values) in enumerate(zip(layer_labels(list(rows)), rows.values(), strict=True))
    ]
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


def _axes(
    names: Sequence[str], experts: int, columns: int, lines: int, cell: float, line: float, bottom: float
) -> list[ET.Element]:
    """Numbers of layers at the left, of experts below."""
    texts = []
    every = max(1, round(13 / (line * lines) + 0.49))
    for row, label in enumerate(layer_labels(names)):
        if row % every == 0:
            y = TOP + (row * lines + lines / 2) * line + 4
            texts.append(element("text", label, x=LEFT - 6, y=y, text_anchor="end", class_="muted small"))
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64) if s * cell >= 18 or s == 64)
    for expert in range(0, columns, step):
        x = LEFT + (expert + 0.5) * cell
        texts.append(element("text", str(expert), x=x, y=bottom + 13, text_anchor="middle", class_="muted small"))
    wrapped = f" (each layer in {lines} lines of {columns})" if lines > 1 else ""
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
