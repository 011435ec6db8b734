"""What quantisation did, expert by expert: the content of quantization_report.json."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import Code, Kind

FORMAT_VERSION = 1


@dataclass
class ExpertReport:
    """One expert.

    gate_up, down   bit-widths
    tokens          calibration tokens routed to it
    output_error    relative change (Frobenius norms) of its output on them, on the inputs the quantised layers below
                    give; None without tokens
    pooled_hessian  it had too few tokens and was calibrated on the layer's (experts.calibration_tokens)
    gate_up_kind, down_kind   of their codes
    """

    gate_up: int
    down: int
    tokens: int
    output_error: float | None
    pooled_hessian: bool
    gate_up_kind: Kind = "scalar"
    down_kind: Kind = "scalar"

    def code(self, part: str) -> Code:
        """Of gate_up or down."""
        return Code(getattr(self, part), getattr(self, f"{part}_kind"))


@dataclass(frozen=True)
class TuningReport:
    """What tuning did after quantisation (tune/tuning.py).

    tokens         of calibration that it was done on, in so many
    steps
    before, after  KL to the 16-bit model on other calibration tokens, nats per token
    kept           whether the tuned values were written
    """

    tokens: int
    steps: int
    before: float
    after: float
    kept: bool

    def describe(self) -> str:
        """For people."""
        return f"KL on held-out calibration text {self.before:.4f} before, {self.after:.4f} after"


@dataclass(frozen=True)
class EvaluationReport:
    """What original and checkpoint scored on the same text when the checkpoint was made (evaluate/scores.py has the
    words).

    tokens         predicted
    held_out       whether the text was kept out of calibration
    activations    of the checkpoint's experts, "int8" or "float"
    original_perplexity, perplexity   of either, by file
    mean_kl, kl_quantiles, top1_agreement   of the checkpoint against the original
    """

    tokens: int
    held_out: bool
    activations: str
    original_perplexity: dict[str, float]
    perplexity: dict[str, float]
    mean_kl: float
    kl_quantiles: dict[str, float]
    top1_agreement: float


@dataclass
class QuantizationReport:
    """One checkpoint.

    linear_bits           of all linears that could be packed; None where `linears` has a width of each
    linears               on-disk name of a linear, or of the output head -> width, where a plan decides them
    layers                layer name -> one ExpertReport per expert
    super_experts         layer name -> ids, from the factors the plan was made with
    unquantized_linears   linear layers left in 16 bits though fewer were asked for -> the reason
    expert_bytes, total_bytes   of the tensors written; original_...: of the model they were made from
    average_bits          {"experts", "model"}: bits per weight as written, scales and zeros included
    tuning                of norms, afterwards; None without
    evaluation            None where it was not evaluated, or by a version that did not keep the scores here
    seconds, peak_memory  of the process that finished the checkpoint; not in its files, which depend on the arguments
                          alone. peak_memory: the most bytes it had resident
    """

    recipe: str
    linear_bits: int | None
    calibration_tokens: int
    linears: dict[str, int] = field(default_factory=dict)
    layers: dict[str, list[ExpertReport]] = field(default_factory=dict)
    super_experts: dict[str, list[int]] = field(default_factory=dict)
    unquantized_linears: dict[str, str] = field(default_factory=dict)
    expert_bytes: int = 0
    total_bytes: int = 0
    original_expert_bytes: int = 0
    original_total_bytes: int = 0
    average_bits: dict[str, float] = field(default_factory=dict)
    tuning: TuningReport | None = None
    evaluation: EvaluationReport | None = None
    seconds: float = 0.0
    peak_memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = {name: [vars(expert) for expert in experts] for name, experts in self.layers.items()}
        document = {"format_version": FORMAT_VERSION, **vars(self), "layers": layers}
        for key in ("tuning", "evaluation"):
            document[key] = document[key] and vars(document[key])
        del document["seconds"], document["peak_memory"]
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """The report of to_dict's document; keys of a later version are passed over."""
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in document.items() if key in known}
        given["layers"] = {name: [ExpertReport(**e) for e in experts] for name, experts in given["layers"].items()}
        for key, kind in (("tuning", TuningReport), ("evaluation", EvaluationReport)):
            given[key] = given.get(key) and kind(**given[key])
        return cls(**given)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises FormatError for a file that is no report, OSError for one that cannot be read."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"{path}: not a report of `mcmoe quantize`: {error!r}") from None
