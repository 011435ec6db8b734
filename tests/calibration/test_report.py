"""The report: one page that needs nothing but itself, of what a checkpoint's files say, and the pictures beside it."""

import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.calibration.browser import browser
from tests.calibration.conftest import QUICK
from tests.calibration.test_allocation import random_factors
from tests.calibration.test_size import with_linears
from tests.tiny_models import make_tiny
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.allocate.sweep import point_of, sweep
from vllm_mcmoe.calibration.checkpoint.report import QuantizationReport
from vllm_mcmoe.calibration.measure.factors import Factors
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.prune.points import PrunedPoint, load_points, save_points
from vllm_mcmoe.calibration.recipes import find_recipe
from vllm_mcmoe.calibration.report.contents import Contents, read_contents
from vllm_mcmoe.calibration.report.page import make_report, write_report
from vllm_mcmoe.calibration.report.size_chart import sweep_file
from vllm_mcmoe.calibration.report.trade_off import TradeOff, trade_off
from vllm_mcmoe.calibration.report.width_map import layer_labels, width_map_file
from vllm_mcmoe.checkpoint import CheckpointConfig, ExpertBits
from vllm_mcmoe.errors import FormatError

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta"}  # the only element without an end tag that the page has


class Page(HTMLParser):
    """Raises AssertionError where an element ends that is not the last one begun."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def factors_of(layers: int, experts: int) -> Factors:
    """Random ones, of layers named as models name them."""
    factors = random_factors(layers, experts, widths=(1, 2, 3, 4))
    factors.layers = {f"model.layers.{i + 3}.mlp.experts": f for i, f in enumerate(factors.layers.values())}
    return factors


def never_written(plan: Plan, factors: Factors) -> Contents:
    config = CheckpointConfig({n: ExpertBits(tuple(w["gate_up"]), tuple(w["down"])) for n, w in plan.layers.items()})
    return Contents("made", "MadeForCausalLM", config, plan, factors, None, None)


def contents_of(layers: int, experts: int, **changes) -> Contents:
    """Of a checkpoint at 2.3 bits by random factors."""
    factors = factors_of(layers, experts)
    return dataclasses.replace(never_written(allocate(factors, bits=2.3), factors), **changes)


def large_contents(layers: int, experts: int) -> Contents:
    """Of a model too large to look for its best plan in a test: widths as they come, and no curve of sizes."""
    factors = factors_of(layers, experts)
    for layer in factors.layers.values():
        layer.shapes = None
    row = [1 + i * i % 5 % 4 for i in range(experts)]
    return never_written(Plan(layers={name: {"gate_up": row, "down": row[::-1]} for name in factors.layers}), factors)


@pytest.fixture(scope="module")
def quick_checkpoint(reference_model, calibration_files, tmp_path_factory) -> Path:
    """A random model at 3 bits of 2 and 4, measured, allocated, quantised and evaluated."""
    folder = tmp_path_factory.mktemp("quick")
    model, out = make_tiny("mixtral", folder / "model", reference_model), folder / "checkpoint"
    options = {"recipe": QUICK, "sequences": 5, "length": 64, "show_progress": False}
    quantize(model, out, calibration_files, bits=3.0, evaluation_data=calibration_files[:1], **options)
    return out


@pytest.fixture
def finished(quick_checkpoint, tmp_path) -> Path:
    """A copy with a rule of pruning, and what it was measured to cost."""
    copy = Path(shutil.copytree(quick_checkpoint, tmp_path / "finished"))
    config = json.loads((copy / "config.json").read_text())
    rule = {"method": "otp", "target": 0.25, "top_k": 2, "levels": [0, 0.25, 0.5], "sha256": "ab" * 32}
    config["quantization_config"]["pruning"] = rule
    (copy / "config.json").write_text(json.dumps(config))
    points = [PrunedPoint(0.0, 0.0, 21.0, 0.0), PrunedPoint(0.25, 0.24, 21.5, 0.0123)]
    save_points(copy, rule["sha256"], points)
    return copy


def test_the_page_is_well_formed_and_refers_to_nothing_outside_it(finished):
    (page, *pictures), _ = write_report(finished, show_progress=False)
    assert page == finished / "report.html"
    text = page.read_text()
    parsed = Page(text)
    assert {"script", "link", "img", "iframe", "a", "object"}.isdisjoint(parsed.tags)
    assert {"href", "src", "xlink:href", "srcset"}.isdisjoint(name for name, _ in parsed.attributes)
    assert re.findall(r"https?:|url\(|@import", text) == []
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for picture in pictures:  # an SVG file's namespace is a name, not a reference
        assert re.findall(r"https?:(?!//www\.w3\.org/2000/svg\")|url\(|href", picture.read_text()) == []


def test_the_page_shows_widths_losses_loads_sizes_pruning_and_scores(finished):
    (page, *_), missing = write_report(finished, show_progress=False)
    text, contents = page.read_text(), read_contents(finished)
    assert missing == []
    for heading in ("Bit-widths", "Quality against size", "Loss against bits", "Routing load", "Online pruning"):
        assert f"<h2>{heading}</h2>" in text
    layer = next(iter(contents.factors.layers))
    width, count = contents.widths[layer]["down"][3], contents.factors.layers[layer].activation_count[3]
    assert f"<title>layer 0, expert 3: {width} bit" in text
    assert f", {count:,.0f} times, " in text
    assert f"{contents.config.average_bits['experts']:.3f}" in text
    scores = contents.report.evaluation
    assert f"{scores.mean_kl:.4f}" in text and f"{scores.top1_agreement:.1%}" in text
    assert "24.0% dropped: KL 0.01230" in text
    assert f"{contents.report.total_bytes:,}" in text  # this checkpoint among the points
    assert "100 kB more is beyond what these widths allow" in text  # of experts this small


def test_pictures_are_svg_files_that_say_what_they_show(finished):
    (_, *pictures), _ = write_report(finished, show_progress=False)
    assert [path.name for path in pictures] == ["expert_widths.svg", "size_and_quality.svg"]
    for path in pictures:
        svg = ET.parse(path).getroot()
        assert svg.tag == f"{SVG}svg" and svg.get("role") == "img"
        assert svg.find(f"{SVG}title").text and svg.find(f"{SVG}desc").text
        style = svg.find(f"{SVG}style").text
        assert "prefers-color-scheme:dark" in style
        ground = svg.find(f"{SVG}rect")  # legible on a page of either theme
        assert ground.get("class") == "panel" and ground.get("width") == svg.get("width")


def test_the_width_map_has_a_cell_for_every_expert_with_its_bits():
    widths = {"model.layers.0.experts": {"gate_up": [1, 2, 3], "down": [4, 8, 1]}}
    svg = ET.fromstring(width_map_file(widths))
    notes = [cell.find(f"{SVG}title").text for cell in svg.iter(f"{SVG}g") if cell.find(f"{SVG}title") is not None]
    assert notes == [f"layer 0, expert {e}: {w}" for w, e in zip(
        ["1 bit", "2 bits", "3 bits", "4 bits", "8 bits", "1 bit"], [0, 1, 2, 0, 1, 2], strict=True
    )]  # fmt: skip


def area(path: str) -> int:
    """Cells that a path of runs covers."""
    return sum(int(run) for run in re.findall(r"h(\d+)v1", path))


@pytest.mark.parametrize(("layers", "experts"), [(94, 128), (58, 256), (48, 512)])
def test_maps_of_large_models_cover_every_expert_in_less_than_a_megabyte(layers, experts):
    row = {"gate_up": [1 + i * i % 4 for i in range(experts)], "down": [2 + i % 3 for i in range(experts)]}
    widths = {f"model.layers.{i}.mlp.experts": row for i in range(layers)}
    text = width_map_file(widths)
    assert len(text) < 1e6
    panels = [panel for panel in ET.fromstring(text).iter(f"{SVG}g") if panel.get("shape-rendering")]
    for panel, part in zip(panels, ("gate_up", "down"), strict=True):
        drawn = {path.get("fill"): area(path.get("d")) for path in panel}
        assert sorted(drawn.values()) == sorted(layers * row[part].count(w) for w in set(row[part]))


def test_the_scores_of_quantising_are_kept_and_the_model_card_shows_the_map(quick_checkpoint, calibration_files):
    report = QuantizationReport.load(quick_checkpoint / "quantization_report.json")
    card = (quick_checkpoint / "README.md").read_text()
    assert list(report.evaluation.perplexity) == [calibration_files[0].name]
    assert not report.evaluation.held_out
    assert f"KL to the original {report.evaluation.mean_kl:.4f} nats per token" in card
    assert "](expert_widths.svg)" in card
    assert (quick_checkpoint / "expert_widths.svg").read_text() == width_map_file(
        read_contents(quick_checkpoint).widths
    )


@pytest.mark.parametrize(("layers", "experts"), [(94, 128), (58, 256)])
def test_a_page_of_a_large_model_stays_small(layers, experts):
    text = make_report(large_contents(layers, experts), show_progress=False).html
    Page(text)
    assert len(text) < 2e6
    assert f"layer {layers + 2}: 1 bit: experts " in text


def test_layers_are_labelled_by_their_numbers_where_these_tell_them_apart():
    assert layer_labels(["model.layers.3.mlp.experts", "model.layers.12.mlp.experts"]) == ["3", "12"]
    assert layer_labels(["a.1.experts", "b.1.experts"]) == layer_labels(["first", "second"]) == ["0", "1"]


def test_the_checkpoints_own_point_is_what_its_plan_predicts_and_more_bytes_predict_less():
    contents = contents_of(4, 8)
    found = trade_off(contents, show_progress=False)
    assert isinstance(found, TradeOff)
    assert found.here.predicted_kl == pytest.approx(contents.plan.objective, rel=1e-9)
    kl = [point.predicted_kl for point in found.points]
    assert kl == sorted(kl, reverse=True) and kl[0] > 2 * kl[-1]
    assert found.less.predicted_kl > found.here.predicted_kl > found.more.predicted_kl
    # sizes are whole matrices: at most one of them is left over
    assert 0 <= found.here.expert_bytes + found.step - found.more.expert_bytes <= 1024 * 256 / 8 * 2
    text = make_report(contents, show_progress=False).html
    for word, point in (("more", found.more), ("less", found.less)):
        assert f"100 kB {word} would bring a predicted KL of {point.predicted_kl:.4g} instead of" in text


def test_a_plan_by_hand_is_priced_beside_what_the_program_would_have_made():
    contents = contents_of(2, 4)
    by_hand = Plan(layers={name: {"gate_up": [2] * 4, "down": [2] * 4} for name in contents.widths})
    found = trade_off(dataclasses.replace(contents, plan=by_hand), show_progress=False)
    layers = contents.factors.layers.values()
    expected = sum(sum(layer.loss_increase[part][2]) for layer in layers for part in ("gate_up", "down"))
    assert found.here.predicted_kl == pytest.approx(expected, rel=1e-12)
    best = sweep(contents.factors, [{"bits": found.here.bits}], show_progress=False)[0]
    assert best.predicted_kl < expected


def test_old_checkpoints_are_reported_as_far_as_they_go(quick_checkpoint, tmp_path):
    """No factors, no plan, a report from before tuning and scores were kept."""
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(quick_checkpoint / "config.json", old)
    report = json.loads((quick_checkpoint / "quantization_report.json").read_text())
    (old / "quantization_report.json").write_text(
        json.dumps({k: v for k, v in report.items() if k not in ("tuning", "evaluation", "linears")})
    )
    (page, *pictures), missing = write_report(old, show_progress=False)
    text = page.read_text()
    Page(text)
    assert [path.name for path in pictures] == ["expert_widths.svg"]
    assert "<h2>Routing load</h2>" in text  # quantising counted tokens, too
    assert "<h2>Quality against size</h2>" not in text
    for word in ("plan.json", "factors.json", "no scores", "mcmoe prune"):
        assert any(word in line for line in missing), word
        assert word in text


def test_a_config_alone_is_enough_for_the_map(quick_checkpoint, tmp_path):
    shutil.copy(quick_checkpoint / "config.json", tmp_path)
    _, missing = write_report(tmp_path, show_progress=False)
    assert any("quantization_report.json is not there" in line for line in missing)
    assert "layer 1, expert 3" in (tmp_path / "report.html").read_text()


def test_factors_without_loss_increase_show_the_error_of_outputs():
    contents = contents_of(2, 4)
    for layer in contents.factors.layers.values():
        layer.loss_increase = None
    pages = make_report(contents, show_progress=False)
    assert "error of the layer's output" in pages.html
    assert "Quality against size" not in pages.html and any("no predicted loss" in line for line in pages.missing)


def test_names_are_escaped():
    text = make_report(contents_of(2, 4, name="<b>&amp;"), show_progress=False).html
    Page(text)
    assert "&lt;b&gt;&amp;amp;" in text and "<b>&amp;" not in text


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("plan.json", lambda d: d["layers"].popitem(), "plan.json: its bit-widths are not those of config.json"),
        ("factors.json", lambda d: d["layers"].popitem(), "factors.json: its layers and experts"),
        ("quantization_report.json", lambda d: d["layers"].popitem(), "quantization_report.json: its layers and"),
        ("quantization_report.json", lambda d: d.pop("recipe"), "not a report of `mcmoe quantize`"),
        ("pruning_report.json", lambda d: d["points"][0].pop("mean_kl"), r"pruning_report.json: points\[0\]: mean_kl"),
    ],
)
def test_files_of_another_checkpoint_are_refused_by_name(finished, file, change, message):
    document = json.loads((finished / file).read_text())
    change(document)
    (finished / file).write_text(json.dumps(document))
    with pytest.raises(FormatError, match=message):
        read_contents(finished)


def test_layers_are_drawn_in_the_models_order_whatever_that_of_the_plan(finished):
    plan = json.loads((finished / "plan.json").read_text())
    plan["layers"] = dict(reversed(plan["layers"].items()))
    (finished / "plan.json").write_text(json.dumps(plan))
    contents = read_contents(finished)
    assert layer_labels(list(contents.widths)) == [str(i) for i in range(len(plan["layers"]))] != ["0"]
    assert (finished / "expert_widths.svg").read_text() == width_map_file(contents.widths)


def test_what_was_measured_of_an_earlier_pruning_rule_is_not_shown(finished):
    save_points(finished, "cd" * 32, [PrunedPoint(0.0, 0.0, 21.0, 0.0)])
    contents = read_contents(finished)
    assert contents.pruned is None
    assert any("was not measured" in line for line in contents.missing)


def test_points_of_pruning_come_back_as_they_were_kept_infinite_ones_too(tmp_path):
    points = [PrunedPoint(0.0, 0.0, 21.0, 0.0), PrunedPoint(0.5, 0.5, float("inf"), 3.0)]
    save_points(tmp_path, "rule", points)
    assert load_points(tmp_path, "rule") == points


def test_a_sweeps_picture_has_all_its_points():
    factors = random_factors(2, 4, widths=(1, 2, 3, 4))
    points = sweep(factors, [{"bits": bits} for bits in (1.5, 2.0, 3.0)], show_progress=False)
    svg = ET.fromstring(sweep_file(points))
    notes = [dot.find(f"{SVG}title").text for dot in svg.iter(f"{SVG}circle") if dot.find(f"{SVG}title") is not None]
    assert [f"{p.predicted_kl:.4g} nats" in note for p, note in zip(points, notes, strict=True)] == [True] * 3


def test_a_point_of_a_size_plan_counts_the_linears_of_the_plan():
    factors = with_linears(random_factors(2, 4, widths=(1, 2, 3, 4)))
    plan = allocate(factors, size="18%")
    point = point_of(plan, factors, find_recipe("mcmoe"), {}, None)
    assert point.checkpoint_bytes == plan.extra["planned_bytes"]
    assert point.predicted_kl == pytest.approx(plan.objective, rel=1e-9)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_the_page_in_both_themes_and_on_a_phone_and_asks_for_nothing(finished, tmp_path):
    page = tmp_path / "large.html"
    page.write_text(make_report(large_contents(58, 256), show_progress=False).html)
    write_report(finished, show_progress=False)
    with browser(CHROMIUM, tmp_path / "profile") as chromium:
        for file in (finished / "report.html", page):
            for width in (1200, 390):
                views = [chromium.view(file, width=width, dark=dark) for dark in (False, True)]
                assert [view.requests for view in views] == [[file.resolve().as_uri()]] * 2
                assert [view.complaints for view in views] == [[], []]
                assert all(view.scroll_width <= width and view.wide == [] for view in views)
                assert all(view.font >= 9 - 0.1 for view in views)  # CSS pixels, of the smallest text in a picture
                assert [view.background for view in views] == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]
