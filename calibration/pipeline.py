"""Quantising a model: a 16-bit directory and a plan in, a checkpoint directory out.

    report = quantize(model_dir, out_dir, ["c4.jsonl"], bits=2.5)                # measure, allocate, quantise
    report = quantize(model_dir, out_dir, ["c4.jsonl"], plan=Plan.load("plan.json"))

Layers are quantised one after another. The inputs of each are what the already quantised layers below produce, so
later layers make up for part of the earlier ones' errors. Inside a layer: attention linears first, then every expert's
gate_up from the tokens routed to it, then its down projection from the intermediate the quantised gate_up gives.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from vllm_mcmoe.calibration.allocation import allocate
from vllm_mcmoe.calibration.artifacts import Factors, Plan
from vllm_mcmoe.calibration.data import DEFAULT_LENGTH, DEFAULT_SEQUENCES, TokenSequences, find_data_files
from vllm_mcmoe.calibration.evaluate import evaluate
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
from vllm_mcmoe.calibration.model_card import model_card
from vllm_mcmoe.calibration.models import LAYER_PREFIX, MoeModel, activation_function, describe_model
from vllm_mcmoe.calibration.progress import progress
from vllm_mcmoe.calibration.quantizers import QuantizedMatrix
from vllm_mcmoe.calibration.recipes import Recipe, find_recipe
from vllm_mcmoe.calibration.report import ExpertReport, QuantizationReport
from vllm_mcmoe.calibration.statistics import load_calibration_data, measure
from vllm_mcmoe.calibration.writer import CheckpointWriter, check_output, writing_checkpoint
from vllm_mcmoe.checkpoint import CheckpointConfig, ExpertBits
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import GROUP_SIZE

Log = Callable[[str], None]

REPORT_FILE, PLAN_FILE, FACTORS_FILE, MODEL_CARD = (
    "quantization_report.json",
    "plan.json",
    "factors.json",
    "README.md",
)

ERROR_TOKENS = 2048  # tokens an expert's output error is measured on; more change its second digit only


def quantize(
    model_dir: str | Path,
    out_dir: str | Path,
    data: Sequence[str | Path],
    *,
    plan: Plan | None = None,
    factors: Factors | None = None,
    bits: float | None = None,
    bits_per_layer: float | None = None,
    recipe: str | Recipe = "mcmoe",
    widths: Sequence[int] | None = None,
    linear_bits: int | None = None,
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    evaluation_data: Sequence[str | Path] | None = None,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> QuantizationReport:
    """The whole path: measure, allocate, quantise, write. What is given is not computed again.

    data             calibration text, as load_sequences takes it
    plan             bit-widths; None allocates them for `bits` or `bits_per_layer` (one of the two, see allocate)
    factors          what calibrate measured; None measures, where the plan or the recipe's Hessians need it
    widths           bit-widths an expert may get; None takes the recipe's
    linear_bits      attention and dense linears: 4, 8 (vLLM 0.32 serves these on GPUs only) or 16; None takes the
                     recipe's
    evaluation_data  text to score original and checkpoint on; the scores go into the model card

    Raises UnsupportedModelError, FormatError, DataError or PlanError before any long work where possible; no partial
    output is left behind.
    """
    recipe = find_recipe(recipe)
    if (plan is not None) + (bits is not None) + (bits_per_layer is not None) != 1:
        raise PlanError("give exactly one of plan, bits and bits_per_layer.")
    check_linear_bits(recipe.linear_bits if linear_bits is None else linear_bits)
    check_output(Path(out_dir))
    description = describe_model(model_dir)
    if plan is not None:
        plan.check_against(description.experts_per_layer())
    if evaluation_data is not None:
        find_data_files(evaluation_data)
    model = LayerwiseModel(WeightFiles(description))
    tokens = load_calibration_data(description, data, sequences, length, log)
    needs_factors = plan is None and factors is None
    gradient_norms = None
    if needs_factors or recipe.hessian_weighting == "gradient":
        log(f"Measuring {description.num_experts} experts in each of {len(description.moe_layers)} layers.")
        measured_widths = widths if needs_factors else ()
        measured = measure(
            model, tokens, recipe=recipe, widths=measured_widths, seed=seed, log=log, show_progress=show_progress
        )
        gradient_norms = measured.gradient_norms
        factors = measured.factors if needs_factors else factors
    if plan is None:
        plan = allocate(factors, recipe=recipe, bits=bits, bits_per_layer=bits_per_layer, widths=widths)
        log(f"Allocated {plan.average_bits:.3f} bits per expert weight, scales and zeros included.")
    report = quantize_model(
        model,
        out_dir,
        plan=plan,
        sequences=tokens,
        recipe=recipe,
        linear_bits=linear_bits,
        gradient_norms=gradient_norms,
        factors=factors,
        log=log,
        show_progress=show_progress,
    )
    if evaluation_data is not None:
        held_out = not set(find_data_files(evaluation_data)) & set(find_data_files(data))
        options = {"sequences": sequences, "length": length, "log": log, "show_progress": show_progress}
        before = evaluate(model_dir, evaluation_data, **options)
        after = evaluate(out_dir, evaluation_data, against=model_dir, **options)
        (Path(out_dir) / MODEL_CARD).write_text(
            model_card(description, report, (before, after), held_out), encoding="utf-8"
        )
    return report


def quantize_model(
    model: LayerwiseModel,
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

    model           LayerwiseModel(WeightFiles(describe_model(path)))
    linear_bits     4, 8 or 16; None takes the recipe's
    gradient_norms  layer name -> float32 [tokens] of the same sequences, as calibrate returns them; needed by recipes
                    whose hessian_weighting is "gradient"
    factors         copied into the checkpoint beside the plan

    Raises before any work: FormatError for an output directory in use, PlanError for a plan of another model,
    UnsupportedModelError for linear_bits that are not one of the three.
    """
    started = time.monotonic()
    recipe = find_recipe(recipe)
    bits = recipe.linear_bits if linear_bits is None else linear_bits
    check_linear_bits(bits)
    check_output(Path(out_dir))
    description = model.description
    plan.check_against(description.experts_per_layer())
    if recipe.hessian_weighting == "gradient" and gradient_norms is None:
        raise PlanError(f"recipe {recipe.name} weights Hessians by loss gradients: pass calibrate's gradient_norms.")
    report = QuantizationReport(recipe.name, bits, sequences.tokens.numel(), super_experts=_super_experts(factors))
    with writing_checkpoint(Path(out_dir)) as writer, torch.no_grad():
        run = _Run(model, writer, plan, recipe, bits, gradient_norms or {}, report, log)
        run.quantize(sequences.tokens, show_progress)
        run.write_config()
        report.seconds = round(time.monotonic() - started, 1)
        writer.add_text(MODEL_CARD, model_card(description, report))
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
        transforms = {"gate_up": None, "down": lambda x: intermediate(x, layer.gate_up[expert], activation)}
        for part, stack in (("gate_up", layer.gate_up), ("down", layer.down)):
            name = f"{layer_name}.{expert}.{part}"
            factor = build_factor(tokens, weights, transforms[part], self.recipe, name)
            matrix = quantize_gptq(stack[expert], factor, bits[part], self.recipe.gptq, name=name)
            stack[expert] = matrix.dequantize()
            self._write_part(layer_name, expert, part, matrix)

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
        self.report.original_expert_bytes = sum(info.nbytes for name, info in files.items() if is_expert(name))
        self.report.original_total_bytes = sum(info.nbytes for info in files.values())
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
