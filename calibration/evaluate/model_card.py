"""README.md of a checkpoint: what it is, what it weighs, what it scores, how to serve it."""

from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCardData, metadata_load

from vllm_mcmoe.calibration.checkpoint.report import QuantizationReport, TuningReport
from vllm_mcmoe.calibration.checkpoint.writer import MODEL_CARD, WIDTH_MAP
from vllm_mcmoe.calibration.evaluate.scores import Evaluation
from vllm_mcmoe.calibration.matrix.linears import count_by_width
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.text import TokenSequences, name_files
from vllm_mcmoe.checkpoint import describe_kinds

HERE = "PATH_TO_THIS_DIRECTORY"  # until it is known: `mcmoe push` writes the name on the hub instead
INHERITED = ("license", "license_name", "license_link", "pipeline_tag")  # from the original's card


def model_card(
    description: MoeModel,
    report: QuantizationReport,
    calibration: TokenSequences,
    evaluation: tuple[Evaluation, Evaluation] | None = None,
    held_out: bool = True,
) -> str:
    """Markdown. calibration: the text it was calibrated on; evaluation: of the original and of the checkpoint, on the
    same text; held_out says whether that text was kept out of calibration."""
    name = description.folder.name
    sections = [
        _metadata(description),
        f"# {name}, experts at {report.average_bits['experts']:.2f} bits",
        f"A quantised copy of `{name}` ({description.architecture}, {len(description.moe_layers)} MoE layers of "
        f"{description.num_experts} experts, top-{description.top_k}). Every expert has its own bit-width. "
        "vLLM serves it where the plugin vllm-mcmoe is installed:",
        f"```\nvllm serve {HERE}\n```",
        "transformers loads it dequantised, in the memory of the 16-bit model, after `import vllm_mcmoe.hf`:",
        "```python\nimport vllm_mcmoe.hf\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{HERE}", dtype="bfloat16")\n```',
        _quantization(description, report, calibration),
        f"![The bit-width of every expert: layers from top to bottom, experts from left to right]({WIDTH_MAP})",
        _quality(evaluation, held_out),
        "Per expert: `quantization_report.json`; the allocation: `plan.json`; `mcmoe report PATH` draws what else "
        "there is to see.",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(description: MoeModel) -> str:
    """What the hub reads of a card: tags, the original where that is on the hub, and its licence."""
    entries = _inherited(description.path / MODEL_CARD) | {"tags": ["mcmoe", "moe", "vllm"]}
    if description.folder.on_hub is not None:
        entries |= {"base_model": description.folder.on_hub, "base_model_relation": "quantized"}
    return f"---\n{ModelCardData(**entries).to_yaml()}\n---"


def _inherited(card: Path) -> dict[str, str]:
    """Nothing of a card that is missing or has no metadata."""
    try:
        found = metadata_load(card) if card.is_file() else None
    except Exception:  # of YAML, or of a file that is no text: nobody but people needs the original's card
        return {}
    return {key: found[key] for key in INHERITED if key in found} if found else {}


def _quantization(description: MoeModel, report: QuantizationReport, calibration: TokenSequences) -> str:
    gate_up_matrices = len(description.projections("gate_up"))
    widths: Counter[int] = Counter()
    for experts in report.layers.values():
        for expert in experts:
            widths.update((*[expert.gate_up] * gate_up_matrices, expert.down))  # all have the same size
    share = ", ".join(f"{bits} bit: {count / widths.total():.0%}" for bits, count in sorted(widths.items()))
    codes = [expert.code(part) for experts in report.layers.values() for expert in experts for part in PROJECTIONS]
    head = None
    if report.linear_bits is None:
        in_layers = {name: bits for name, bits in report.linears.items() if name != description.family.head}
        head = report.linears.get(description.family.head)
        linears = f"{count_by_width(in_layers)} (compressed-tensors)"
    else:
        linears = "16 bits" if report.linear_bits == 16 else f"{report.linear_bits} bits (compressed-tensors)"
    if report.linear_bits != 16 and report.unquantized_linears:
        linears += f", {len(report.unquantized_linears)} of them left at 16"
    rows = [
        ("recipe", report.recipe),
        ("calibration text", name_files(calibration.files)),
        ("calibration tokens", f"{report.calibration_tokens:,}"),
        ("bits per expert weight, scales and zeros included", f"{report.average_bits['experts']:.3f}"),
        ("bits per weight of the whole model", f"{report.average_bits['model']:.3f}"),
        ("expert bytes", f"{report.expert_bytes:,} of {report.original_expert_bytes:,} in 16 bits"),
        ("model bytes", f"{report.total_bytes:,} of {report.original_total_bytes:,} in 16 bits"),
        ("share of expert weights by code width", share),
        ("expert codes", describe_kinds(codes)),
        ("attention and dense linears", linears),
    ]
    if head is not None:
        rows.append(("output head", f"{head} bits" + ("" if head == 16 else " (compressed-tensors)")))
    if report.super_experts:
        listed = "; ".join(f"{layer}: {ids}" for layer, ids in report.super_experts.items())
        rows.append(("super experts (rare extreme activations)", listed))
    if report.tuning is not None:
        rows.append(("tuned afterwards", _tuning(report.tuning)))
    return _table("quantisation", "", rows)


def _tuning(tuning: TuningReport) -> str:
    done = f"norms, on {tuning.tokens:,} of the tokens" if tuning.kept else "nothing"
    return f"{done}: {tuning.describe()}"


def _quality(evaluation: tuple[Evaluation, Evaluation] | None, held_out: bool) -> str:
    if evaluation is None:
        return "Not evaluated. `mcmoe evaluate PATH --against ORIGINAL --data TEXT` measures perplexity and KL."
    before, after = evaluation
    lines = ["| perplexity | original | quantised |", "|---|---|---|"]
    for file, perplexity in after.perplexity_by_file.items():
        lines.append(f"| {file} | {before.perplexity_by_file[file]:.3f} | {perplexity:.3f} |")
    means = before.geometric_mean_perplexity, after.geometric_mean_perplexity
    lines.append(f"| geometric mean | {means[0]:.3f} | {means[1]:.3f} |")
    source = "not used for calibration" if held_out else "of the calibration text, so somewhat flattering"
    distance = after.distance("the original")
    lines.append(f"\n{after.tokens:,} tokens {source}, expert activations {after.activations}. {distance}")
    return "\n".join(lines)


def _table(left: str, right: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
