"""report.html: one page, with nothing outside it, of what a checkpoint is and of what else it could have been."""

import statistics
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_mcmoe.calibration.allocate.size import short_size
from vllm_mcmoe.calibration.checkpoint.writer import WIDTH_MAP, write_text
from vllm_mcmoe.calibration.report.contents import Contents, read_contents
from vllm_mcmoe.calibration.report.markup import COLOURS, element, picture_style, standing_alone, themed
from vllm_mcmoe.calibration.report.sections import (
    loads_section,
    losses_section,
    pruning_section,
    trade_off_chart,
    trade_off_section,
    widths_section,
)
from vllm_mcmoe.calibration.report.trade_off import TradeOff, trade_off
from vllm_mcmoe.calibration.report.width_map import width_map_file

PAGE, TRADE_OFF_FILE = "report.html", "size_and_quality.svg"

_PAGE_RULES = """
body{{background:{panel};color:{ink}}} .note,th,.tile span{{color:{muted}}}
.tile,details{{border:1px solid {grid}}} td,th{{border-bottom:1px solid {grid}}}
"""
_PAGE_TEXT = """
*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1040px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0;overflow-wrap:anywhere} h2{font-size:1.2rem;margin:2.2rem 0 .4rem}
p{max-width:46rem;margin:.4rem 0 .9rem;overflow-wrap:anywhere} li{overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tile{border-radius:8px;padding:10px 12px} .tile b{display:block;font-size:1.25rem} .tile span{font-size:.85rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px;align-items:start}
figure{margin:0;min-width:0} svg{display:block;width:100%;max-width:640px;height:auto}
details{border-radius:8px;padding:6px 12px;margin:10px 0} summary{cursor:pointer}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-size:.85rem}
td,th{padding:3px 10px 3px 0;text-align:right;white-space:nowrap} td:first-child,th:first-child{text-align:left}
"""


@dataclass(frozen=True)
class Pages:
    """What a report consists of. pictures: file name -> text of an SVG for a model card; missing: for people."""

    html: str
    pictures: dict[str, str]
    missing: list[str]


def write_report(checkpoint: Path, out: Path | None = None, show_progress: bool = True) -> tuple[list[Path], list[str]]:
    """Write the page, by default into the checkpoint, and pictures beside it.

    Returns the files, and what the page does not show, with the reasons. Raises FormatError where a file of the
    checkpoint is not what it should be, OSError where one cannot be read or written.
    """
    page = Path(checkpoint) / PAGE if out is None else out
    pages = make_report(read_contents(Path(checkpoint)), show_progress)
    texts = {page: pages.html, **{page.with_name(name): text for name, text in pages.pictures.items()}}
    for path, text in texts.items():
        write_text(path, text)
    return list(texts), pages.missing


def make_report(contents: Contents, show_progress: bool = True) -> Pages:
    """The page and its pictures as text. On models of many experts the trade-off takes some 15 seconds."""
    found = trade_off(contents, show_progress)
    missing = list(contents.missing)
    pictures = {WIDTH_MAP: width_map_file(contents.widths)}
    sections = [_header(contents), widths_section(contents)]
    if isinstance(found, TradeOff):
        drawn = trade_off_chart(contents, found)
        pictures[TRADE_OFF_FILE] = standing_alone(drawn)
        sections.append(trade_off_section(contents, found, drawn))
    else:
        missing.append(f"What other sizes would bring is not shown: {found}")
    sections += [
        section
        for section in (losses_section(contents), loads_section(contents), pruning_section(contents))
        if section is not None
    ]
    sections.append(_footer(missing))
    return Pages(_document(contents, sections), pictures, missing)


def _document(contents: Contents, sections: Sequence[ET.Element]) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # The page needs nothing from outside, and says so to the browser.
        ET.Element(
            "meta",
            {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"},
        ),
        element("title", f"{contents.name}: quantised experts"),
        element("style", _PAGE_TEXT + themed(_PAGE_RULES, COLOURS) + picture_style()),
    )
    html = element("html", head, element("body", element("main", *sections)), lang="en")
    return "<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html") + "\n"


def _header(contents: Contents) -> ET.Element:
    experts, layers = contents.num_experts, len(contents.widths)
    intro = element(
        "p", f"{contents.architecture}: {layers} MoE layers of {experts} experts, quantised by vllm-mcmoe, "
        f"{_recipe_name(contents)}."
    )  # fmt: skip
    tiles = [
        element("div", element("b", value), element("span", label), class_="tile") for value, label in _facts(contents)
    ]
    return element("section", element("h1", contents.name), intro, element("div", *tiles, class_="tiles"))


def _recipe_name(contents: Contents) -> str:
    recipe = contents.plan.recipe if contents.report is None else contents.report.recipe
    asked = contents.plan.requested_bits
    size = contents.plan.extra.get("requested_bytes")
    if size is not None:
        return f"recipe {recipe}, asked for {short_size(size)}"
    return f"recipe {recipe}" + ("" if asked is None else f", asked for {asked:g} bits")


def _facts(contents: Contents) -> Iterator[tuple[str, str]]:
    report, bits = contents.report, contents.config.average_bits
    if "experts" in bits:
        yield f"{bits['experts']:.3f}", "bits per expert weight, scales included"
    if "model" in bits:
        yield f"{bits['model']:.3f}", "bits per weight of the whole model"
    if report is None:
        return
    share = report.total_bytes / report.original_total_bytes
    yield short_size(report.total_bytes), f"of tensors, {share:.0%} of the model in 16 bits"
    if report.evaluation is not None:
        scores = report.evaluation
        text = "held-out text" if scores.held_out else "the calibration text"
        yield f"{scores.mean_kl:.4f}", f"KL to the original, nats per token, on {text}"
        yield f"{scores.top1_agreement:.1%}", "same first choice as the original"
        by_file = scores.original_perplexity, scores.perplexity
        before, after = (statistics.geometric_mean(perplexities.values()) for perplexities in by_file)
        yield f"{after:.3f}", f"perplexity; {before:.3f} in 16 bits"


def _footer(missing: Sequence[str]) -> ET.Element:
    lines = element("ul", *(element("li", line) for line in missing)) if missing else element("p", "Nothing.")
    files = "config.json, plan.json, factors.json, quantization_report.json and pruning_report.json"
    sources = element("p", f"Drawn from {files} by mcmoe report.", class_="note")
    return element("section", element("h2", "What is not shown, and why"), lines, sources)
