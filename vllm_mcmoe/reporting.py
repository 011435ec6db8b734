"""Tables and heat maps of the command line, for people; programs read `--json`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vllm_mcmoe.calibration.allocate.ranges import show_budget
from vllm_mcmoe.calibration.allocate.size import short_size
from vllm_mcmoe.calibration.allocate.sweep import SweepPoint
from vllm_mcmoe.calibration.common.progress import show_duration
from vllm_mcmoe.calibration.evaluate.inspection import CheckpointSummary, ModelSummary
from vllm_mcmoe.calibration.evaluate.resources import ResourcePlan
from vllm_mcmoe.calibration.evaluate.scores import Evaluation
from vllm_mcmoe.calibration.prune.points import PrunedPoint
from vllm_mcmoe.checkpoint import describe_kinds

console = Console()

# cold to hot, so that a layer's important experts stand out
WIDTH_STYLES = {
    1: "white on blue",
    2: "black on cyan",
    3: "black on green",
    4: "black on yellow",
    8: "white on red",
    16: "bold",
}
BAR_WIDTH = 28  # of a sweep's plot, at most: its numbers leave it 18 columns on an 80-column terminal
LONGEST_STEPS = 4  # of quantising, that are named
WIDTHS_PER_LINE = 32  # 128 experts in four lines, beside the layer's name on an 80-column terminal


def print_widths(layers: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> None:
    """One row per layer: a digit per expert, gate_up above down where they differ."""
    table = Table(title="Bit-width of every expert", box=None, pad_edge=False)
    table.add_column("layer", style="bold")
    table.add_column("part")
    table.add_column("experts in order")
    for name, (gate_up, down) in layers.items():
        if list(gate_up) == list(down):
            table.add_row(name, "all", _width_map(gate_up))
        else:
            table.add_row(name, "gate_up", _width_map(gate_up))
            table.add_row("", "down", _width_map(down))
    console.print(table)


def print_sweep(points: Sequence[SweepPoint], by_size: bool) -> None:
    """by_size: whether sizes were asked for, so that linears are in what is predicted, too."""
    of = "experts and linears" if by_size else "experts"
    table = Table(title=f"Size and predicted KL to the original, of {of}", box=None, pad_edge=False)
    for column in ("asked for", "expert bits", "experts", "checkpoint", "KL, nats/token"):
        table.add_column(column, justify="right")
    table.add_column("")
    highest = max(point.predicted_kl for point in points)
    for point in points:
        table.add_row(
            show_budget(point.budget),
            f"{point.bits:.3f}",
            short_size(point.expert_bytes),
            "?" if point.checkpoint_bytes is None else short_size(point.checkpoint_bytes),
            f"{point.predicted_kl:.4g}",
            Bar(highest or 1.0, 0, max(point.predicted_kl, 0.0), width=BAR_WIDTH),
        )
    console.print(table)
    if points[0].checkpoint_bytes is None:
        console.print(
            "The checkpoint's size is not known: the factors have no table of linears. `mcmoe calibrate` writes one."
        )


def print_linears(linears: Mapping[str, int]) -> None:
    """On-disk name -> width: one row per decoder layer, or for neighbours that are alike."""
    table = Table(title="Bit-width of other linears", box=None, pad_edge=False)
    table.add_column("where", style="bold")
    table.add_column("linears")
    rows: list[tuple[str, str, dict[str, int]]] = []
    for where, widths in _by_layer(linears).items():
        if rows and rows[-1][2] == widths:
            rows[-1] = (rows[-1][0], where, widths)
        else:
            rows.append((where, where, widths))
    for first, last, widths in rows:
        row = Text()
        for position, (name, width) in enumerate(widths.items()):
            row.append(f"{', ' if position else ''}{name} ").append(str(width), style=WIDTH_STYLES[width])
        table.add_row(first if first == last else f"{first} to {last.rpartition('.')[2]}", row)
    console.print(table)


def _by_layer(linears: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """ "model.layers.3.self_attn.q_proj" is self_attn.q_proj in model.layers.3; the head is in nothing."""
    found: dict[str, dict[str, int]] = {}
    for name, width in linears.items():
        match = re.match(r"(.*\.\d+)\.(.*)", name)
        where, relative = match.groups() if match else ("", name)
        found.setdefault(where, {})[relative] = width
    return found


def _width_map(widths: Sequence[int]) -> Text:
    text = Text()
    for position, width in enumerate(widths):
        if position and position % WIDTHS_PER_LINE == 0:
            text.append("\n")
        text.append(str(width), style=WIDTH_STYLES[width])
    return text


def print_summary(checkpoint: Path | str, summary: CheckpointSummary) -> None:
    print_widths({name: (bits.gate_up, bits.down) for name, bits in summary.config.experts.items()})
    if summary.linears:
        print_linears(summary.linears)
    table = Table(title=f"{checkpoint}: bytes by kind of tensor", box=None, pad_edge=False)
    table.add_column("kind")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for kind, size in summary.bytes_by_kind.items():
        table.add_row(kind, f"{size:,}", f"{size / summary.total_bytes:.1%}")
    table.add_row("total", f"{summary.total_bytes:,}", "", style="bold")
    console.print(table)
    kinds = describe_kinds(summary.config.codes)
    console.print(f"Experts: {summary.expert_bits:.3f} bits per weight, scales and zeros included; codes: {kinds}.")
    if summary.tuning is not None:
        done = "Tuned" if summary.tuning.kept else "Tuning was tried and not kept"
        console.print(f"{done}: {summary.tuning.describe()}.")
    if summary.config.pruning is not None:
        rule = summary.config.pruning
        console.print(f"Online pruning: {rule.method}, {rule.target:.0%} of the expert activations when served.")
    for warning in summary.warnings:
        console.print(f"[bold yellow]Warning:[/] {escape(warning)}", highlight=False)


def print_model(model: Path | str, summary: ModelSummary) -> None:
    table = Table(title=f"{model}: {summary.architecture}, supported", box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("layers, with experts", f"{summary.layers}, {summary.moe_layers}")
    table.add_row("experts per layer, per token", f"{summary.experts}, {summary.top_k}")
    table.add_row("hidden, intermediate size of an expert", f"{summary.hidden}, {summary.intermediate}")
    table.add_row("parameters", f"{summary.parameters:,}")
    table.add_row("of them in experts", f"{summary.expert_parameters / summary.parameters:.1%}")
    table.add_row("active per token", f"{summary.active_parameters:,}")
    table.add_row(f"bytes in {summary.source}", f"{summary.model_bytes:,}")
    table.add_row(f"bytes at {summary.bits:g} bits, about", f"{summary.checkpoint_bytes:,}", style="bold")
    if summary.headers is not None:
        table.add_row("files whose headers agree", f"{summary.headers}")
    console.print(table)
    for note in summary.notes:
        console.print(f"[bold]Note:[/] {escape(note)}", highlight=False)


def print_evaluation(result: Evaluation) -> None:
    table = Table(title=str(result.model), box=None, pad_edge=False)
    table.add_column("text")
    table.add_column("perplexity", justify="right")
    for name, perplexity in result.perplexity_by_file.items():
        table.add_row(name, f"{perplexity:.3f}")
    table.add_row("geometric mean", f"{result.geometric_mean_perplexity:.3f}", style="bold")
    console.print(table)
    if result.mean_kl is not None:
        console.print(result.distance(result.against))
    if result.pruned:
        console.print(f"Online pruning dropped {result.pruned:.1%} of the expert activations.")
    if result.total_bytes is not None:
        console.print(
            f"{result.total_bytes:,} bytes, {result.average_bits['model']:.3f} bits per weight; "
            f"experts {result.expert_bytes:,} bytes, {result.average_bits['experts']:.3f} bits per weight."
        )


def print_pruning(points: Sequence[PrunedPoint]) -> None:
    table = Table(title="Online pruning", box=None, pad_edge=False)
    for column in ("target", "pruned", "perplexity", "against unpruned", "KL to unpruned, nats per token"):
        table.add_column(column, justify="right")
    unpruned = points[0].perplexity
    for point in points:
        table.add_row(
            f"{point.target:.0%}",
            f"{point.pruned:.1%}",
            f"{point.perplexity:.3f}",
            f"{point.perplexity / unpruned - 1:+.2%}",
            f"{point.mean_kl:.5f}",
        )
    console.print(table)


def print_resources(plan: ResourcePlan, times: Mapping[str, Mapping[str, float]], effort: str) -> None:
    """times: effort -> step -> seconds on this machine. effort: what the plan is for."""
    weights, quantization, serving = plan.parameters, plan.quantization, plan.serving
    at = f"{plan.bits:g} bits" if plan.size is None else _gigabytes(plan.size.requested_bytes)
    table = Table(title=f"{plan.architecture} at {at}", box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("parameters", f"{weights.total / 1e9:.1f} B", f"{weights.experts / weights.total:.1%} in experts")
    table.add_row("active per token", f"{weights.active / 1e9:.1f} B")
    table.add_row("codes of experts", plan.codes)
    if plan.size is not None:
        range_ = f"possible: {_gigabytes(plan.size.least_bytes)} to {_gigabytes(plan.size.largest_bytes)}"
        table.add_row("size asked for", _gigabytes(plan.size.requested_bytes), range_)
        bits = f"{plan.size.least_expert_bits:.2f} to {plan.size.most_expert_bits:.2f}"
        table.add_row("bits of an expert weight", bits, "with linears and output head at 16 bits, and at 4")
    table.add_section()
    table.add_row("the model's files", _gigabytes(quantization.model_bytes), "read layer by layer")
    table.add_row("memory to quantise", _gigabytes(quantization.memory_bytes), "two layers in float32, and 2 GiB")
    table.add_row("activations", _gigabytes(quantization.activation_bytes), "in memory where they fit, else on disk")
    table.add_row("disk beside the model", _gigabytes(quantization.disk_bytes), "checkpoint and activations")
    total = {name: show_duration(sum(steps.values())) for name, steps in times.items()}
    others = ", ".join(f"{name} {duration}" for name, duration in total.items() if name != effort)
    table.add_row("time to quantise", total[effort], f"by this machine's CPU; --effort {others}; resumable")
    longest = sorted(times[effort].items(), key=lambda step: -step[1])[:LONGEST_STEPS]
    shown = ", ".join(f"{name.replace('_', ' ')} {show_duration(seconds)}" for name, seconds in longest if seconds)
    table.add_row("", "", f"most of it: {shown}")
    table.add_section()
    table.add_row("checkpoint", _gigabytes(serving.checkpoint_bytes))
    table.add_row("KV cache", _gigabytes(serving.kv_bytes), f"of {serving.kv_tokens} tokens")
    table.add_row(
        "read per token", _gigabytes(serving.step_bytes), "one stream; bandwidth / this bounds tokens per second"
    )
    console.print(table)
    devices = Table(title="Serving with vLLM", box=None, pad_edge=False)
    for heading in ("devices", "weights and KV cache on each", "vllm serve CHECKPOINT ..."):
        devices.add_column(heading)
    for placement in serving.placements:
        count = f"{placement.devices} x {placement.device}"
        devices.add_row(count, _gigabytes(placement.per_device_bytes), placement.options)
    console.print(devices)


def _gigabytes(size: int) -> str:
    if size < 1e8:
        return f"{size / 1e6:.3g} MB"
    return f"{size / 1e9:.3g} GB" if size < 1e11 else f"{size / 1e9:.0f} GB"
