"""What a checkpoint's directory says of itself: its JSON files, of which config.json alone must be there."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.checkpoint.report import QuantizationReport
from vllm_mcmoe.calibration.checkpoint.writer import FACTORS_FILE, PLAN_FILE, REPORT_FILE
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors
from vllm_mcmoe.calibration.prune.points import PrunedPoint, load_points
from vllm_mcmoe.checkpoint import CheckpointConfig, read_checkpoint_config
from vllm_mcmoe.errors import FormatError


@dataclass(frozen=True)
class Contents:
    """Of one checkpoint.

    name          of the directory
    architecture  as config.json names it
    plan          from config.json's widths where there is no plan.json
    factors, report, pruned   None where the checkpoint has none; pruned: measured with its rule of today
    missing       what is not there, and what would bring it, for people
    """

    name: str
    architecture: str
    config: CheckpointConfig
    plan: Plan
    factors: Factors | None
    report: QuantizationReport | None
    pruned: list[PrunedPoint] | None
    missing: list[str] = field(default_factory=list)

    @property
    def widths(self) -> dict[str, dict[str, list[int]]]:
        return self.plan.layers

    @property
    def num_experts(self) -> int:
        return max(len(widths["down"]) for widths in self.widths.values())


def read_contents(checkpoint: Path) -> Contents:
    """Raises FormatError where config.json is not a checkpoint's or another file is not what it should be."""
    config = read_checkpoint_config(checkpoint)
    missing: list[str] = []
    plan = _plan(checkpoint, config, missing)
    factors, report = _factors(checkpoint, config, missing), _report(checkpoint, config, missing)
    rule = config.pruning
    pruned = None if rule is None else load_points(checkpoint, rule.sha256)
    if rule is None:
        missing.append("No rule of online pruning: `mcmoe prune CHECKPOINT --table` adds one, and measures it.")
    elif pruned is None:
        missing.append(
            f"What the pruning rule ({rule.method}, {rule.target:.0%} of the expert activations) costs was not "
            "measured, or by a version that kept no numbers: `mcmoe prune CHECKPOINT --table` measures it."
        )
    document = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture = ", ".join(map(str, document.get("architectures") or ["unknown architecture"]))
    return Contents(checkpoint.resolve().name, architecture, config, plan, factors, report, pruned, missing)


def _plan(checkpoint: Path, config: CheckpointConfig, missing: list[str]) -> Plan:
    of_config = {name: {p: list(getattr(bits, p)) for p in PROJECTIONS} for name, bits in config.experts.items()}
    path = checkpoint / PLAN_FILE
    if not path.is_file():
        missing.append(f"{PLAN_FILE} is not there: how its budget was asked for is not known.")
        return Plan(layers=of_config)
    plan = Plan.load(path)
    if plan.layers != of_config:
        raise FormatError(f"{path}: its bit-widths are not those of config.json: it is another checkpoint's.")
    return replace(plan, layers=of_config)  # in the model's order, which a plan by hand may not have


def _factors(checkpoint: Path, config: CheckpointConfig, missing: list[str]) -> Factors | None:
    path = checkpoint / FACTORS_FILE
    if not path.is_file():
        missing.append(
            f"{FACTORS_FILE} is not there, as where the bit-widths came from a plan: what other widths and sizes would "
            "cost is not known. `mcmoe quantize --plan plan.json --factors factors.json` keeps it."
        )
        return None
    factors = Factors.load(path)
    if {n: layer.num_experts for n, layer in factors.layers.items()} != _experts(config):
        raise FormatError(f"{path}: its layers and experts are not those of config.json: it is another model's.")
    if any(layer.loss_increase is None for layer in factors.layers.values()):
        missing.append("The loss increase of single experts was not measured: recipe mcmoe does that.")
    return factors


def _report(checkpoint: Path, config: CheckpointConfig, missing: list[str]) -> QuantizationReport | None:
    path = checkpoint / REPORT_FILE
    if not path.is_file():
        missing.append(f"{REPORT_FILE} is not there: bytes and what was measured while quantising are not known.")
        return None
    report = QuantizationReport.load(path)
    if {name: len(experts) for name, experts in report.layers.items()} != _experts(config):
        raise FormatError(f"{path}: its layers and experts are not those of config.json: it is another checkpoint's.")
    if report.evaluation is None:
        missing.append(
            f"{REPORT_FILE} has no scores of the whole checkpoint: it was not evaluated when it was made, or by a "
            "version that kept them in the model card alone. `mcmoe evaluate CHECKPOINT --against ORIGINAL --data "
            "TEXT` has them."
        )
    return report


def _experts(config: CheckpointConfig) -> dict[str, int]:
    return {name: bits.num_experts for name, bits in config.experts.items()}
