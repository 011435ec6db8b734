"""What quantisation did, expert by expert: the content of quantization_report.json."""

from dataclasses import dataclass, field
from typing import Any, Self

FORMAT_VERSION = 1


@dataclass
class ExpertReport:
    """One expert.

    gate_up, down   bit-widths
    tokens          calibration tokens routed to it
    output_error    relative change (Frobenius norms) of its output on them, on the inputs the quantised layers below
                    give; None without tokens
    pooled_hessian  it had too few tokens and was calibrated on the layer's (experts.calibration_tokens)
    """

    gate_up: int
    down: int
    tokens: int
    output_error: float | None
    pooled_hessian: bool


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
    seconds: float = 0.0
    peak_memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = {name: [vars(expert) for expert in experts] for name, experts in self.layers.items()}
        document = {"format_version": FORMAT_VERSION, **vars(self), "layers": layers}
        document["tuning"] = None if self.tuning is None else vars(self.tuning)
        del document["seconds"], document["peak_memory"]
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """The report of to_dict's document."""
        fields = {key: value for key, value in document.items() if key != "format_version"}
        layers = {name: [ExpertReport(**e) for e in experts] for name, experts in fields["layers"].items()}
        tuning = fields.get("tuning")
        return cls(**{**fields, "layers": layers, "tuning": tuning and TuningReport(**tuning)})
