"""Sections of the page: a heading, what is seen, pictures, and their numbers in a table that is folded away."""

import math
import statistics
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence

from vllm_mcmoe.calibration.allocate.size import short_size
from vllm_mcmoe.calibration.common.documents import PerWidth
from vllm_mcmoe.calibration.matrix.linears import count_by_width
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors
from vllm_mcmoe.calibration.report.charts import Axis, Series, chart
from vllm_mcmoe.calibration.report.contents import Contents
from vllm_mcmoe.calibration.report.markup import element
from vllm_mcmoe.calibration.report.size_chart import Mark, describe_point, size_chart
from vllm_mcmoe.calibration.report.trade_off import TradeOff
from vllm_mcmoe.calibration.report.width_map import (
    Classes,
    describe_widths,
    expert_map,
    layer_labels,
    width_maps,
)
from vllm_mcmoe.checkpoint import describe_kinds

# Load of an expert as a multiple of what all would have if they were used alike: up to which, colour, label.
LOADS = (
    (0.0, "#3d4451", "never used"),
    (0.25, "#5a3fa0", "up to \u00bc of the average"),
    (0.5, "#93409b", "\u00bc to \u00bd"),
    (1.0, "#c64a7d", "\u00bd to 1"),
    (2.0, "#ee7458", "1 to 2 times"),
    (4.0, "#fcb256", "2 to 4 times"),
    (math.inf, "#f7f06b", "more"),
)
LOAD_CLASSES = Classes(
    {i: colour for i, (_, colour, _) in enumerate(LOADS)}, {i: label for i, (_, _, label) in enumerate(LOADS)}, {}
)


def widths_section(contents: Contents) -> ET.Element:
    labels = layer_labels(list(contents.widths))
    used = sorted({w for widths in contents.widths.values() for p in PROJECTIONS for w in widths[p]})
    rows = []
    for label, widths in zip(labels, contents.widths.values(), strict=True):
        counts = [Counter(widths[p]) for p in PROJECTIONS]
        means = [statistics.mean(widths[p]) for p in PROJECTIONS]
        rows.append(
            [label, *(cell for count, mean in zip(counts, means, strict=True)
                      for cell in (*(str(count[w]) for w in used), f"{mean:.2f}"))]
        )  # fmt: skip
    heads = ["layer", *(f"{p} {text}" for p in PROJECTIONS for text in (*(f"at {w}" for w in used), "mean"))]
    text = (
        "Every expert has one width for its gate and up projections, and one for its down projection. The integer "
        "program gives bits to those that lower the loss most. "
        + describe_widths(contents.widths)
        + f" Codes: {describe_kinds(contents.config.codes)}."
    )
    held = {name: ids for name, ids in contents.plan.forced_experts.items() if ids}
    if held:
        listed = "; ".join(f"{name}: {', '.join(map(str, ids))}" for name, ids in held.items())
        text += f" Held at the top width, for their rare extreme activations: {listed}."
    if contents.plan.linears is not None:
        text += f" Other linears: {count_by_width(contents.plan.linears)}."
    elif contents.report is not None and contents.report.linear_bits is not None:
        text += f" Attention and other linears: {contents.report.linear_bits} bits."
    return _section(
        "Bit-widths", text, width_maps(contents.widths).values(), "Experts of each width, by layer", heads, rows
    )


def trade_off_chart(contents: Contents, found: TradeOff) -> ET.Element:
    """The sweep, and where in it the checkpoint is: as predicted and, where it was evaluated, as measured."""
    at, here = found.nbytes(found.here), found.here
    marks = [Mark("this checkpoint, predicted", at, here.predicted_kl, describe_point(here, at), "diamond")]
    evaluation = contents.report and contents.report.evaluation
    if evaluation:
        tuned = contents.report.tuning is not None and contents.report.tuning.kept
        label = f"this checkpoint, measured{' after tuning' if tuned else ''}"
        note = f"measured on {evaluation.tokens:,} tokens: {evaluation.mean_kl:.4f} nats per token"
        marks.append(Mark(label, at, evaluation.mean_kl, note, "dot"))
    points = [(found.nbytes(point), point) for point in found.points]
    whole = bool(found.other) or here.checkpoint_bytes is not None
    return size_chart(points, "checkpoint" if whole else "experts", marks)


def trade_off_section(contents: Contents, found: TradeOff, drawn: ET.Element) -> ET.Element:
    decided = "experts' and other linears' widths" if contents.plan.linears is not None else "experts' widths"
    text = (
        f"Each point is the plan that the integer program makes for that size; {decided} change, everything else "
        "stays. The prediction is the sum of what was measured of each alone, on calibration text and before tuning. "
    )
    step = short_size(found.step)
    for point, word in ((found.more, "more"), (found.less, "less")):
        if point is None:
            text += f"{step} {word} is beyond what these widths allow. "
        else:
            change = point.predicted_kl / found.here.predicted_kl - 1 if found.here.predicted_kl > 0 else math.nan
            text += (
                f"{step} {word} would bring a predicted KL of {point.predicted_kl:.4g} instead of "
                f"{found.here.predicted_kl:.4g} nats per token ({change:+.0%}), at {point.bits:.2f} bits per expert "
                "weight. "
            )
    listed = [(p, "") for p in found.points] + [(found.here, "this checkpoint")]
    listed += [(p, f"{step} {w}") for p, w in ((found.less, "less"), (found.more, "more")) if p is not None]
    rows = [
        [f"{found.nbytes(p):,}", f"{p.expert_bytes:,}", f"{p.bits:.3f}", f"{p.predicted_kl:.5g}", note]
        for p, note in sorted(listed, key=lambda each: found.nbytes(each[0]))
    ]
    heads = ["bytes", "of experts", "bits per expert weight", "predicted KL", ""]
    return _section("Quality against size", text, [drawn], "The points", heads, rows)


LossTable = dict[str, dict[int, float]]  # label of a layer -> width -> sum over its experts


def losses_section(contents: Contents) -> ET.Element | None:
    """What a layer's experts cost at each width: predicted loss where it was measured, else the output's error."""
    if contents.factors is None:
        return None
    tables, unit, what = _loss_tables(contents.factors)
    values = [v for table in tables.values() for row in table.values() for v in row.values() if v > 0]
    if not values:
        return None
    widths = sorted({w for table in tables.values() for row in table.values() for w in row})
    frame = [(float(widths[0]), v) for v in (min(values), max(values))]  # both pictures have the same axis
    drawn = [_loss_chart(part, table, unit, frame) for part, table in tables.items()]
    rows = [
        [label, *(f"{table[label][w]:.3g}" if w in table[label] else "" for table in tables.values() for w in widths)]
        for label in layer_labels(list(contents.factors.layers))
    ]
    text = (
        f"The {what} if all of a layer's experts had that width and everything else its 16 bits: the sum over the "
        f"experts, in {unit}. One line per layer, from the first, violet, to the last, yellow; the dashed one is the "
        "median."
    )
    heads = ["layer", *(f"{part} at {w}" for part in tables for w in widths)]
    return _section("Loss against bits", text, drawn, "By layer", heads, rows)


def _loss_tables(factors: Factors) -> tuple[dict[str, LossTable], str, str]:
    """Part of the experts -> its table, their unit, and what is in them."""

    def summed(per_width: Sequence[PerWidth]) -> LossTable:
        sums = [{width: sum(values) for width, values in each.items()} for each in per_width]
        return dict(zip(layer_labels(list(factors.layers)), sums, strict=True))

    layers = list(factors.layers.values())
    if any(layer.loss_increase is None for layer in layers):
        errors = {"experts": summed([layer.quantization_error for layer in layers])}
        return errors, "Frobenius norm", "error of the layer's output"
    tables = {part: summed([layer.loss_increase[part] for layer in layers]) for part in PROJECTIONS}
    return tables, "nats per token", "increase of the loss, predicted from measured errors and the loss's gradient,"


def _loss_chart(part: str, table: LossTable, unit: str, frame: Sequence[tuple[float, float]]) -> ET.Element:
    widths = sorted({width for row in table.values() for width in row})
    series = []
    for number, (label, row) in enumerate(table.items()):
        points = [(float(w), row[w]) for w in sorted(row) if row[w] > 0]
        if points:
            note = f"layer {label}: " + ", ".join(f"{w:g} bits {v:.3g}" for w, v in points)
            series.append(Series("", points, [note], _depth_colour(number, len(table)), ""))
    medians = [(float(w), statistics.median(row[w] for row in table.values() if w in row)) for w in widths]
    medians = [(w, v) for w, v in medians if v > 0]
    if medians:
        notes = [f"median of the layers at {w:g} bits: {v:.3g}" for w, v in medians]
        series.append(Series("median of the layers", medians, notes, "ink", "dot", dashed=True))
    described = ", ".join(f"{v:.3g} at {w:g} bits" for w, v in medians)
    title = f"{part}: loss against bits"
    x = Axis("bits of the codes", ticks=[float(w) for w in widths])
    return chart(f"loss-{part}", title, f"Median of the layers: {described}.", x, Axis(unit, log=True), series, frame)


def _depth_colour(number: int, layers: int) -> str:
    """From violet by blue and green to yellow, lighter with depth, as the widths' colours are."""
    stops = ((138, 111, 214), (74, 136, 204), (47, 174, 155), (155, 211, 90), (214, 178, 40))
    place = number / max(1, layers - 1) * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def loads_section(contents: Contents) -> ET.Element | None:
    """How often each expert was used, by the factors, or by quantising's own count."""
    if contents.factors is not None:
        counts = {name: layer.activation_count for name, layer in contents.factors.layers.items()}
        on = f"{contents.factors.tokens:,} calibration tokens"
    elif contents.report is not None:
        counts = {name: [float(e.tokens) for e in experts] for name, experts in contents.report.layers.items()}
        on = f"{contents.report.calibration_tokens:,} calibration tokens, with the layers below quantised"
    else:
        return None
    loads = {name: _relative(row) for name, row in counts.items()}
    classes = {name: [_load_class(load) for load in row] for name, row in loads.items()}
    notes = {
        name: [f"{count:,.0f} times, {load:.2f} of the average" for count, load in zip(counts[name], row, strict=True)]
        for name, row in loads.items()
    }
    drawn = expert_map("loads", "How often each expert was used", classes, LOAD_CLASSES, notes)
    rows = []
    for label, row in zip(layer_labels(list(loads)), loads.values(), strict=True):
        busiest, rarest = max(range(len(row)), key=row.__getitem__), min(range(len(row)), key=row.__getitem__)
        rows.append(
            [label, str(sum(load == 0 for load in row)), f"{row[rarest]:.2f} ({rarest})",
             f"{statistics.median(row):.2f}", f"{row[busiest]:.2f} ({busiest})"]
        )  # fmt: skip
    text = f"Times that the router chose an expert for one of {on}, as multiples of its layer's average."
    heads = ["layer", "never used", "least (expert)", "median", "most (expert)"]
    return _section("Routing load", text, [drawn], "Least and most used experts, by layer", heads, rows)


def _relative(counts: Sequence[float]) -> list[float]:
    """To their mean."""
    mean = sum(counts) / len(counts)
    return [count / mean if mean else 0.0 for count in counts]


def _load_class(load: float) -> int:
    return next(i for i, (up_to, _, _) in enumerate(LOADS) if load <= up_to)


def pruning_section(contents: Contents) -> ET.Element | None:
    if not contents.pruned:
        return None
    rule, measured = contents.config.pruning, sorted(contents.pruned, key=lambda point: point.pruned)
    points = [(100 * p.pruned, p.mean_kl) for p in measured]
    notes = [f"{p.pruned:.1%} dropped: KL {p.mean_kl:.5f}, perplexity {p.perplexity:.3f}" for p in measured]
    drawn = chart(
        "pruning",
        "KL to the unpruned checkpoint",
        ", ".join(f"{kl:.3g} at {share:.3g}%" for share, kl in points) + ".",
        Axis("expert activations dropped, %"),
        Axis("KL, nats per token"),
        [Series("measured", points, notes)],
    )
    text = f"Rule {rule.method}, which drops {rule.target:.0%} of the expert activations unless told otherwise."
    if len(measured) < 4:
        text += " `mcmoe prune --table` measures more points."
    rows = [[f"{p.target:.0%}", f"{p.pruned:.1%}", f"{p.perplexity:.3f}", f"{p.mean_kl:.5f}"] for p in measured]
    return _section("Online pruning", text, [drawn], "The points", ["target", "dropped", "perplexity", "KL"], rows)


def _section(
    title: str,
    text: str,
    drawn: Iterable[ET.Element],
    table_title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> ET.Element:
    figures = element("div", *(element("figure", each) for each in drawn), class_="figures")
    return element("section", element("h2", title), element("p", text), figures, _table(table_title, heads, rows))


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> ET.Element:
    """The numbers of a picture, folded away."""
    head = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
    body = element("tbody", *(element("tr", *(element("td", text) for text in row)) for row in rows))
    return element(
        "details", element("summary", title), element("div", element("table", head, body), class_="scroll", tabindex=0)
    )
