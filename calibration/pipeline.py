"""Quantising a model: a 16-bit directory and a plan in, a checkpoint directory out.

    report = quantize_model(model_dir, out_dir, plan=plan, sequences=load_sequences(...), recipe="mcmoe")

Layers are quantised one after another. The inputs of each are what the already quantised layers below produce, so
later layers make up for part of the earlier ones' errors. Inside a layer: attention linears first, then every expert's
gate_up from the tokens routed to it, then its down projection from the intermediate the quantised gate_up gives.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_mcmoe.calibration.artifacts import Factors, Plan
from vllm_mcmoe.calibration.data import TokenSequences
from vllm_mcmoe.calibration.experts import (
    Activation,
    ExpertTokens,
    build_factor,
    calibration_tokens,
    hessian_weights,
    intermediate,
    moe_inputs,
    tokens_of,
)
from vllm_mcmoe.calibration.gptq import HessianFactor, quantize_gptq
from vllm_mcmoe.calibration.layerwise import DecoderLayer, LayerwiseModel, WeightFiles
from vllm_mcmoe.calibration.linears import check_linear_bits, linear_config, quantize_linear
from vllm_mcmoe.calibration.models import LAYER_PREFIX, MoeModel, activation_function, describe_model
from vllm_mcmoe.calibration.progress import progress
from vllm_mcmoe.calibration.quantizers import QuantizedMatrix
from vllm_mcmoe.calibration.recipes import Recipe, find_recipe
from vllm_mcmoe.calibration.writer import CheckpointWriter, check_output, writing_checkpoint
from vllm_mcmoe.checkpoint import CheckpointConfig, ExpertBits
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import GROUP_SIZE

Log = Callable[[str], None]

REPORT_FILE, PLAN_FILE, FACTORS_FILE = "quantization_report.json", "plan.json", "factors.json"

ERROR_TOKENS = 2048  # tokens an expert's output error is measured on; more change its second digit only


@dataclass
class ExpertReport:
    """tokens: routed to the expert. output_error: relative change of its output on them, None without tokens.
    pooled_hessian: it had too few tokens and was calibrated on the layer's (experts.calibration_tokens)."""

    gate_up: int
    down: int
    tokens: int
    output_error: float | None
    pooled_hessian: bool


@dataclass
class QuantizationReport:
    """What quantize_model did; quantization_report.json holds the same.

    layers            layer name -> one ExpertReport per expert
    unquantized_linears   linears left in 16 bits though linear_bits asked for fewer, with the reason
    average_bits      {"experts", "model"}, from the written bytes, scales and zeros included
    """

    recipe: str
    linear_bits: int
    calibration_tokens: int
    layers: dict[str, list[ExpertReport]] = field(default_factory=dict)
    super_experts: dict[str, list[int]] = field(default_factory=dict)
    unquantized_linears: dict[str, str] = field(default_factory=dict)
    expert_bytes: int = 0
    total_bytes: int = 0
    average_bits: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        layers = {name: [vars(expert) for expert in experts] for name, experts in self.layers.items()}
        return {"format_version": 1, **vars(self), "layers": layers}


def quantize_model(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    plan: Plan,
    sequences: TokenSequences,
    recipe: str | Recipe = "mcmoe",
    linear_bits: int | None = None,
    gradient_norms: Mapping[str, torch.Tensor] | None = None,
    factors: Factors | None = None,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> QuantizationReport:
    """Write a checkpoint of the model at the plan's bit-widths.

    linear_bits     4, 8 or 16; None takes the recipe's
    gradient_norms  layer name -> float32 [tokens] of the same sequences, as calibrate returns them; needed by recipes
                    whose hessian_weighting is "gradient"
    factors         copied into the checkpoint beside the plan

    Raises UnsupportedModelError or FormatError before any work for a model that cannot be quantised or an output
    directory in use, PlanError for a plan of another model.
    """
    started = time.monotonic()
    recipe = find_recipe(recipe)
    bits = recipe.linear_bits if linear_bits is None else linear_bits
    check_linear_bits(bits)
    check_output(Path(out_dir))
    description = describe_model(model_dir)
    plan.check_against(description.experts_per_layer())
    if recipe.hessian_weighting == "gradient" and gradient_norms is None:
        raise PlanError(f"recipe {recipe.name} weights Hessians by loss gradients: pass calibrate's gradient_norms.")
    model = LayerwiseModel(WeightFiles(description))
    report = QuantizationReport(recipe.name, bits, sequences.tokens.numel(), super_experts=_super_experts(factors))
    with writing_checkpoint(Path(out_dir)) as writer, torch.no_grad():
        run = _Run(model, writer, plan, recipe, bits, gradient_norms or {}, report, log)
        run.quantize(sequences.tokens, show_progress)
        run.write_config()
        report.seconds = round(time.monotonic() - started, 1)
        writer.add_json(REPORT_FILE, report.to_dict())
        plan.save(writer.directory / PLAN_FILE)
        if factors is not None:
            factors.save(writer.directory / FACTORS_FILE)
        writer.copy_side_files(description.path)
    return report


def _super_experts(factors: Factors | None) -> dict[str, list[int]]:
    if factors is None:
        return {}
    return {name: layer.super_experts for name, layer in factors.layers.items() if layer.super_experts}


@dataclass
class _Run:
    """State of one quantize_model call."""

    model: LayerwiseModel
    writer: CheckpointWriter
    plan: Plan
    recipe: Recipe
    linear_bits: int
    gradient_norms: Mapping[str, torch.Tensor]
    report: QuantizationReport
    log: Log
    written: set[str] = field(default_factory=set)  # on-disk names whose quantised form is in the checkpoint

    @property
    def description(self) -> MoeModel:
        return self.model.description

    def quantize(self, tokens: torch.Tensor, show_progress: bool) -> None:
        hidden = self.model.embed(tokens)
        for index in progress(range(self.model.num_layers), "Quantising layers", show=show_progress):
            with self.model.loaded_layer(index) as layer:
                if self.linear_bits != 16:
                    self._quantize_linears(index, layer, hidden)
                if index in self.description.moe_layers:
                    self._quantize_experts(self.description.moe_layers[index], layer, hidden)
                hidden = [layer(batch) for batch in hidden]
        for name in self.model.source.names():
            if name not in self.written:
                self.writer.add(name, self.model.source.read(name))

    def _quantize_linears(self, index: int, layer: DecoderLayer, hidden: list[torch.Tensor]) -> None:
        """Stage by stage: the linears of a stage share their input, which the stages before have changed."""
        for stage in self.description.family.linears:
            modules = {}
            for name in stage:
                module = _find_linear(layer.module, self.description.module_name(name))
                if module is not None:
                    modules[f"{LAYER_PREFIX}{index}.{name}"] = module
            if not modules:
                continue
            in_features = next(iter(modules.values())).in_features
            if in_features % GROUP_SIZE:
                reason = f"in_features {in_features} is not divisible by {GROUP_SIZE}"
                self.report.unquantized_linears.update(dict.fromkeys(modules, reason))
                self.log(f"{', '.join(modules)}: left in 16 bits, {reason}")
                continue
            moment = _linear_input_moment(layer, next(iter(modules.values())), hidden)
            factor = HessianFactor.build(moment, name=next(iter(modules)))
            for name, module in modules.items():
                self._quantize_linear(name, module, factor)

    def _quantize_linear(self, name: str, module: nn.Linear, factor: HessianFactor) -> None:
        stored_dtype = self.model.source.read(f"{name}.weight").dtype
        weight, tensors = quantize_linear(module.weight, factor, self.linear_bits, stored_dtype)
        module.weight.data.copy_(weight)
        for suffix, tensor in tensors.items():
            self.writer.add(f"{name}.{suffix}", tensor)
        self.written.add(f"{name}.weight")

    def _quantize_experts(self, name: str, layer: DecoderLayer, hidden: list[torch.Tensor]) -> None:
        inputs = moe_inputs(layer, hidden)
        activation = activation_function(self.description)
        reports = []
        for expert in range(self.description.num_experts):
            tokens = calibration_tokens(inputs, expert)
            own = tokens_of(inputs, expert)
            sample = own.at_most(ERROR_TOKENS)
            before = _expert_output(layer, expert, sample, activation)
            bits = {part: self.plan.layers[name][part][expert] for part in ("gate_up", "down")}
            self._quantize_expert(name, expert, layer, tokens, bits, activation)
            after = _expert_output(layer, expert, sample, activation)
            error = float((after - before).norm() / before.norm().clamp_min(1e-30)) if len(own) else None
            reports.append(ExpertReport(**bits, tokens=len(own), output_error=error, pooled_hessian=tokens.pooled))
        self.report.layers[name] = reports
        pooled = [expert for expert, r in enumerate(reports) if r.pooled_hessian]
        if pooled:
            self.log(f"{name}: too few tokens for experts {pooled}; calibrated on the layer's tokens instead")

    def _quantize_expert(
        self,
        layer_name: str,
        expert: int,
        layer: DecoderLayer,
        tokens: ExpertTokens,
        bits: dict[str, int],
        activation: Activation,
    ) -> None:
        """Quantise gate_up, then down on the intermediate it now gives; the layer keeps the dequantised weights."""
        weights = hessian_weights(tokens, self.recipe.hessian_weighting, self.gradient_norms.get(layer_name))
        x = tokens.x
        for part, stack in (("gate_up", layer.gate_up), ("down", layer.down)):
            name = f"{layer_name}.{expert}.{part}"
            factor = build_factor(x, weights, self.recipe, name)
            matrix = quantize_gptq(stack[expert], factor, bits[part], self.recipe.gptq, name=name)
            stack[expert] = matrix.dequantize()
            self._write_part(layer_name, expert, part, matrix)
            if part == "gate_up":
                x = intermediate(x, stack[expert], activation)

    def _write_part(self, layer_name: str, expert: int, part: str, matrix: QuantizedMatrix) -> None:
        projections = self.description.projections(part)
        for projection, rows in zip(projections, split_rows(matrix, len(projections)), strict=True):
            name = self.description.expert_tensor(layer_name, expert, projection)
            self.writer.add_matrix(name, rows.pack())
            self.written.add(f"{name}.weight")

    def write_config(self) -> None:
        """config.json with the bytes that were really written."""
        sizes, files = self.writer.nbytes, self.model.source.files.info
        is_expert = self.description.is_expert_tensor
        self.report.expert_bytes = sum(n for name, n in sizes.items() if is_expert(name))
        self.report.total_bytes = sum(sizes.values())
        expert_weights = sum(info.numel for name, info in files.items() if is_expert(name))
        all_weights = sum(info.numel for info in files.values())
        self.report.average_bits = {
            "experts": round(8 * self.report.expert_bytes / expert_weights, 4),
            "model": round(8 * self.report.total_bytes / all_weights, 4),
        }
        ignore = [*self.description.family.linear_ignore, *self.report.unquantized_linears]
        config = CheckpointConfig(
            experts={
                name: ExpertBits(tuple(e.gate_up for e in experts), tuple(e.down for e in experts))
                for name, experts in self.report.layers.items()
            },
            linear=None if self.linear_bits == 16 else linear_config(self.linear_bits, ignore),
            average_bits=self.report.average_bits,
        )
        document = self.description.read_config()
        document["quantization_config"] = config.to_dict()
        self.writer.add_json("config.json", document)


def _find_linear(layer: nn.Module, name: str) -> nn.Linear | None:
    """The linear of that name where this decoder layer has it (dense layers have other ones than MoE layers)."""
    try:
        module = layer.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None


def _linear_input_moment(layer: DecoderLayer, linear: nn.Linear, hidden: list[torch.Tensor]) -> torch.Tensor:
    """Second moment of a linear's input over all tokens, float32 [in, in]; the experts are not computed."""
    moment = torch.zeros(linear.in_features, linear.in_features)

    def accumulate(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        moment.addmm_(x.t(), x)

    handle = linear.register_forward_pre_hook(accumulate)
    try:
        with layer.experts_forward(lambda x, topk_ids, topk_weights: torch.zeros_like(x)):
            for batch in hidden:
                layer(batch)
    finally:
        handle.remove()
    return moment


def _expert_output(layer: DecoderLayer, expert: int, tokens: ExpertTokens, activation: Activation) -> torch.Tensor:
    """float32 [n, hidden], without routing weights."""
    return intermediate(tokens.x, layer.gate_up[expert], activation) @ layer.down[expert].t()


def split_rows(matrix: QuantizedMatrix, parts: int) -> list[QuantizedMatrix]:
    """Cut a matrix of stacked rows (gate over up) into its parts; each owns its memory."""
    zeros = [None] * parts if matrix.zeros is None else matrix.zeros.chunk(parts)
    pieces = zip(matrix.codes.chunk(parts), matrix.scales.chunk(parts), zeros, strict=True)
    return [
        QuantizedMatrix(matrix.bits, codes, scales.clone(), None if zero is None else zero.clone())
        for codes, scales, zero in pieces
    ]
