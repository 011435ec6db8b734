"""What a model holds, without loading a tensor.

A checkpoint is read from config.json and the safetensors headers; whether a 16-bit model can be quantised, and what it
will take then, from its config.json alone, which may be all that has been downloaded. Where the model is on the hub,
headers are fetched to be checked, too.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_mcmoe.calibration.checkpoint.report import QuantizationReport, TuningReport
from vllm_mcmoe.calibration.checkpoint.writer import REPORT_FILE
from vllm_mcmoe.calibration.evaluate.resources import plan_resources
from vllm_mcmoe.calibration.matrix.linears import PACKED, linear_widths
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.folder import ModelFolder, find_model
from vllm_mcmoe.calibration.model.weight_files import TensorFiles, TensorInfo
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.checkpoint import QWEIGHT, CheckpointConfig, read_checkpoint_config, tensor_dtypes, tensor_shape
from vllm_mcmoe.kernels.packing import Code

# Kinds of tensors in the order a reader wants them; the first pattern that matches a name decides.
KINDS = (
    ("expert codes", re.compile(r"\.experts\.\d+\..*\.qweight$")),
    ("expert scales and zeros", re.compile(r"\.experts\.\d+\..*\.(scales|zeros|exponents)$")),
    ("expert biases", re.compile(r"\.experts\.\d+\..*\.bias$")),
    ("experts, not quantised", re.compile(r"\.experts\.\d+\..*\.weight$")),
    ("other linears, quantised", re.compile(r"\.weight_(packed|scale|shape|zero_point|g_idx)$")),
    ("embeddings and output head", re.compile(r"(embed_tokens|\.embeddings|lm_head)\.")),
    ("attention, router, norms", re.compile(r"")),
)

GATES = ("w1", "gate_proj")  # projections that experts without a gate lack


@dataclass(frozen=True)
class CheckpointSummary:
    """bytes_by_kind sums to the safetensors' tensor bytes; average bits count scales and zeros.

    linears   on-disk name -> width, of the linears that are packed and, where plan.json decided them, of those left
    tuning    of norms, by quantization_report.json; None without
    """

    config: CheckpointConfig
    bytes_by_kind: dict[str, int]
    expert_parameters: int
    expert_bits: float
    linears: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    tuning: TuningReport | None = None

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_kind.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "quantization_config": self.config.to_dict(),
            "bytes_by_kind": self.bytes_by_kind,
            "total_bytes": self.total_bytes,
            "expert_parameters": self.expert_parameters,
            "expert_bits": self.expert_bits,
            "linears": self.linears,
            "warnings": self.warnings,
            "tuning": None if self.tuning is None else vars(self.tuning),
        }


@dataclass(frozen=True)
class ModelSummary:
    """A 16-bit model that can be quantised.

    experts, top_k, hidden, intermediate   of each of the moe_layers
    parameters, expert_parameters, active_parameters   the last: those a token is multiplied with
    source             what its weights are in
    model_bytes        of its files
    checkpoint_bytes   at `bits` per expert weight, linears at the default recipe's width
    headers            safetensors files on the hub whose headers were found to have what config.json says; None where
                       they were not looked at
    notes              what to know of this architecture
    """

    architecture: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    parameters: int
    expert_parameters: int
    active_parameters: int
    source: str
    model_bytes: int
    bits: float
    checkpoint_bytes: int
    headers: int | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_model(model: str | Path | ModelFolder, bits: float) -> ModelSummary:
    """Summarise a 16-bit model from its config.json. bits: of expert weights in the checkpoint whose size is wanted.

    Raises UnsupportedModelError, with the reason, for a model that cannot be quantised; of one on the hub FormatError
    and HubError, too.
    """
    description = describe_model(model)
    resources = plan_resources(description.folder, bits=bits)
    return ModelSummary(
        architecture=description.architecture,
        layers=description.num_layers,
        moe_layers=len(description.moe_layers),
        experts=description.num_experts,
        top_k=description.top_k,
        hidden=description.hidden,
        intermediate=description.intermediate,
        parameters=resources.parameters.total,
        expert_parameters=resources.parameters.experts,
        active_parameters=resources.parameters.active,
        source=description.source_format.label,
        model_bytes=resources.quantization.model_bytes,
        bits=bits,
        checkpoint_bytes=resources.serving.checkpoint_bytes,
        headers=len(WeightFiles(description).files.files) if description.folder.can_fetch else None,
        notes=list(description.family.notes),
    )


def inspect_checkpoint(checkpoint: str | Path | ModelFolder) -> CheckpointSummary:
    """Summarise a quantised checkpoint; faults that serving would refuse come back as warnings.

    Raises FormatError where config.json is not of this format or a file cannot be read, HubError where that is because
    it cannot be fetched.
    """
    folder = find_model(checkpoint)
    config = read_checkpoint_config(folder.path)
    headers = TensorFiles(folder).info
    by_kind: Counter[str] = Counter()
    for name, info in headers.items():
        by_kind[next(kind for kind, pattern in KINDS if pattern.search(name))] += info.nbytes
    parameters, warnings = _check_experts(config, headers)
    expert_bytes = by_kind["expert codes"] + by_kind["expert scales and zeros"]
    return CheckpointSummary(
        config=config,
        bytes_by_kind={kind: by_kind[kind] for kind, _ in KINDS if by_kind[kind]},
        expert_parameters=parameters,
        expert_bits=8 * expert_bytes / parameters if parameters else 0.0,
        linears=_linears(config, headers),
        warnings=warnings,
        tuning=_tuning(folder),
    )


def _tuning(folder: ModelFolder) -> TuningReport | None:
    """A checkpoint is served without its report, which may be missing. Raises FormatError for one that is none."""
    return QuantizationReport.load(folder.fetch(REPORT_FILE)).tuning if folder.has(REPORT_FILE) else None


def _linears(config: CheckpointConfig, headers: dict[str, TensorInfo]) -> dict[str, int]:
    """Of the packed ones their widths; 16 of those that the config leaves by their full names."""
    if config.linear is None:
        return {}
    width = linear_widths(config.linear)
    packed = [name.removesuffix(f".{PACKED}") for name in headers if name.endswith(f".{PACKED}")]
    found = {name: width(name) for name in packed}
    left = [name for name in config.linear.get("ignore", ()) if f"{name}.weight" in headers]
    return dict(sorted({**found, **dict.fromkeys(left, 16)}.items(), key=_by_number))


def _by_number(item: tuple[str, int]) -> list[int | str]:
    """Layer 2 before layer 10, and the head last."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", item[0])]


def _check_experts(config: CheckpointConfig, headers: dict[str, TensorInfo]) -> tuple[int, list[str]]:
    """Number of expert weights found, and what is missing, misshapen or not in the config."""
    parameters, warnings = 0, []
    pattern = re.compile(r"^(.*\.experts)\.(\d+)\.([^.]+)\.qweight$")
    found: dict[tuple[str, int], list[str]] = {}
    for name in headers:
        if match := pattern.match(name):
            found.setdefault((match[1], int(match[2])), []).append(match[3])
    gated = any(projection in GATES for projections in found.values() for projection in projections)
    complete = 3 if gated else 2
    for layer, bits in config.experts.items():
        for expert in range(bits.num_experts):
            projections = found.pop((layer, expert), [])
            if len(projections) != complete:
                warnings.append(
                    f"{layer}, expert {expert}: {len(projections)} of {complete} projections have a qweight"
                )
            rows = [headers[f"{layer}.{expert}.{projection}.{QWEIGHT}"].shape[0] for projection in projections]
            # Gate and up have as many rows as the intermediate size, down as the hidden size: columns are padded.
            parameters += len(rows) * min(rows, default=0) * max(rows, default=0)
            for projection in projections:
                base = f"{layer}.{expert}.{projection}"
                codes = bits.down_codes if projection in ("w2", "down_proj") else bits.gate_up_codes
                warnings += _check_matrix(base, codes[expert], config.format_version, headers)
    warnings += [f"{layer}, expert {expert}: stored, but config.json does not list it" for layer, expert in found]
    return parameters, warnings


def _check_matrix(base: str, code: Code, version: int, headers: dict[str, TensorInfo]) -> list[str]:
    rows, groups, _ = headers[f"{base}.{QWEIGHT}"].shape
    warnings = []
    for suffix, dtype in tensor_dtypes(code, version).items():
        info, shape = headers.get(f"{base}.{suffix}"), tensor_shape(suffix, code, rows, groups)
        if info is None:
            warnings.append(f"{base}.{suffix} is missing; experts of {code} have one")
        elif (info.dtype, info.shape) != (dtype, shape):
            warnings.append(
                f"{info.file.name}: {base}.{suffix} is {info.dtype} {list(info.shape)}, "
                f"{code} need {dtype} {list(shape)}"
            )
    return warnings
