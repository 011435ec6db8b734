"""Quantising one decoder layer: a unit of work that ends with the layer's shard on the disk.

Attention and dense linears first, then every expert's gate_up from the tokens routed to it, then its down projection
from the intermediate the quantised gate_up gives. The loaded layer is left with its weights as they were quantised, so
that it computes the inputs of the next one; restore() brings a layer of an earlier run into the same state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import nn

from vllm_mcmoe.calibration.checkpoint.report import ExpertReport
from vllm_mcmoe.calibration.checkpoint.writer import Shard
from vllm_mcmoe.calibration.common.progress import Log
from vllm_mcmoe.calibration.common.threads import side_by_side
from vllm_mcmoe.calibration.matrix.gptq import HessianFactor, quantize_gptq
from vllm_mcmoe.calibration.matrix.linears import (
    SUFFIXES,
    LinearShape,
    dequantize_linear,
    quantize_linear,
    tensor_parallel_sizes,
)
from vllm_mcmoe.calibration.matrix.second_moment import SecondMoment
from vllm_mcmoe.calibration.matrix.two_sided import OutputHessian
from vllm_mcmoe.calibration.measure.expert_tokens import (
    MoeInputs,
    build_factor,
    calibration_tokens,
    experts_at_once,
    hessian_weights,
    moe_inputs,
    tokens_of,
)
from vllm_mcmoe.calibration.measure.output_gradients import OutputGradients, output_hessians
from vllm_mcmoe.calibration.model.activations import Activations, ActivationStore
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer, LayerwiseModel
from vllm_mcmoe.calibration.recipes import Recipe
from vllm_mcmoe.checkpoint import matrix_of
from vllm_mcmoe.kernels.packing import Kind, StoredMatrix

ERROR_TOKENS = 2048  # tokens an expert's output error is measured on; more change its second digit only


@dataclass(frozen=True)
class LayerOptions:
    """How one layer is quantised.

    bits            part -> width of each expert; None for a layer without experts
    linear_bits     width asked for of every linear: on-disk name -> 4, 8 or 16
    linear_group    inputs that share a scale in linears of 4 and 8 bits
    gradient_norms  float32 [tokens], for recipes that weight Hessians by them
    gradients       for recipes that look at the Hessians of outputs
    """

    recipe: Recipe
    bits: dict[str, list[int]] | None
    linear_bits: Mapping[str, int]
    linear_group: int
    gradient_norms: torch.Tensor | None
    gradients: OutputGradients | None


@dataclass(frozen=True)
class QuantizedLayer:
    """What is known of a layer whose shard is written.

    experts              one per expert; empty for a layer without any
    linears              on-disk names of those quantised
    unquantized_linears  on-disk name -> why not
    nbytes               tensor name -> bytes
    """

    experts: list[ExpertReport]
    linears: list[str]
    unquantized_linears: dict[str, str]
    nbytes: dict[str, int]

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "experts": [vars(expert) for expert in self.experts]}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        return cls(**{**document, "experts": [ExpertReport(**expert) for expert in document["experts"]]})


def quantize_layer(
    model: LayerwiseModel,
    index: int,
    layer: DecoderLayer,
    hidden: Activations,
    store: ActivationStore,
    options: LayerOptions,
    shard: Path,
    log: Log,
) -> QuantizedLayer:
    """Quantise a loaded layer on its inputs and write all its tensors to the shard."""
    job = _LayerJob(model, index, layer, hidden, options, log)
    job.quantize_linears()
    if options.bits is not None:
        job.quantize_experts(moe_inputs(layer, hidden, store))
    job.add_unquantized()
    job.shard.write(shard)
    return QuantizedLayer(job.experts, job.linears, job.unquantized_linears, job.shard.nbytes)


@dataclass(frozen=True)
class _QuantizedExpert:
    """matrices: on-disk name of each projection, without a suffix, to what is written."""

    report: ExpertReport
    matrices: dict[str, StoredMatrix]


class _LayerJob:
    """State of one quantize_layer."""

    def __init__(
        self,
        model: LayerwiseModel,
        index: int,
        layer: DecoderLayer,
        hidden: Activations,
        options: LayerOptions,
        log: Log,
    ):
        self.model, self.index, self.layer, self.hidden, self.options = model, index, layer, hidden, options
        self.log = log
        self.shard = Shard()
        self.experts: list[ExpertReport] = []
        self.linears: list[str] = []
        self.unquantized_linears: dict[str, str] = {}
        self._quantized: set[str] = set()  # on-disk names whose quantised form is in the shard

    @property
    def description(self) -> MoeModel:
        return self.model.description

    def quantize_linears(self) -> None:
        """Stage by stage: the linears of a stage share their input, which the stages before have changed."""
        for stage in self.description.family.linears:
            modules = {}
            for name in stage:
                module, on_disk = self.layer.linear(name), f"{self.description.layer_prefix}{self.index}.{name}"
                if module is not None and self.options.linear_bits.get(on_disk, 16) != 16:
                    modules[on_disk] = module
            if not modules:
                continue
            in_features, group_size = next(iter(modules.values())).in_features, self.options.linear_group
            # those of a stage share their inputs, so that all of them can be packed, or none
            ranks = tensor_parallel_sizes(self.description.config.num_attention_heads)
            if not LinearShape(stage[0], 0, in_features, ranks).can_be_packed(group_size):
                reason = f"tensor parallel ranks would not get whole groups of {group_size} of {in_features} inputs"
                if in_features % group_size:
                    reason = f"in_features {in_features} is not divisible by {group_size}"
                self.unquantized_linears.update(dict.fromkeys(modules, reason))
                self.log(f"{', '.join(modules)}: left in 16 bits, {reason}")
                continue
            moment = _linear_input_moment(self.layer, next(iter(modules.values())), self.hidden)
            factor = HessianFactor.build(moment, name=next(iter(modules)))
            for name, module in modules.items():
                self._quantize_linear(name, module, factor)

    def _quantize_linear(self, name: str, module: nn.Linear, factor: HessianFactor) -> None:
        stored_dtype = self.model.source.read(f"{name}.weight").dtype
        bits, group_size = self.options.linear_bits[name], self.options.linear_group
        weight, tensors = quantize_linear(module.weight, factor, bits, group_size, stored_dtype)
        module.weight.data.copy_(weight)
        for suffix, tensor in tensors.items():
            self.shard.add(f"{name}.{suffix}", tensor)
        self.linears.append(name)
        self._quantized.add(f"{name}.weight")

    def quantize_experts(self, inputs: MoeInputs) -> None:
        name, count = self.description.moe_layers[self.index], self.description.num_experts

        def quantized(expert: int) -> _QuantizedExpert:
            with torch.no_grad():
                return self._quantize_expert(name, expert, inputs)

        at_once = experts_at_once(self.description, self.layer.device, self.layer.nbytes)
        for expert in side_by_side(quantized, range(count), at_once):
            self.experts.append(expert.report)
            for matrix_name, matrix in expert.matrices.items():
                self.shard.add_matrix(matrix_name, matrix, self.options.recipe.format_version)
                self._quantized.add(f"{matrix_name}.weight")
        pooled = [expert for expert, r in enumerate(self.experts) if r.pooled_hessian]
        if pooled:
            self.log(f"{name}: too few tokens for experts {pooled}; calibrated on the layer's tokens instead")

    def _output_hessians(self, layer_name: str, expert: int, inputs: MoeInputs) -> Mapping[str, OutputHessian]:
        """Empty where nothing, or too little, is known of the outputs."""
        gradients = self.options.gradients
        if gradients is None:
            return {}
        return output_hessians(self.layer.expert(expert), expert, inputs, gradients, f"{layer_name}.{expert}") or {}

    def _quantize_expert(self, layer_name: str, expert: int, inputs: MoeInputs) -> _QuantizedExpert:
        """Quantise gate_up, then down on the intermediate it now gives; the layer keeps the dequantised weights."""
        layer, recipe = self.layer, self.options.recipe
        tokens, own = calibration_tokens(inputs, expert), tokens_of(inputs, expert)
        sample = own.at_most(ERROR_TOKENS)
        before = layer.expert(expert)(sample.x)
        bits = {part: self.options.bits[part][expert] for part in ("gate_up", "down")}
        outputs = self._output_hessians(layer_name, expert, inputs)
        weights = hessian_weights(tokens, recipe.hessian_weighting, self.options.gradient_norms)
        transforms = {"gate_up": None, "down": layer.expert(expert).intermediate}
        matrices: dict[str, StoredMatrix] = {}
        kinds: dict[str, Kind] = {}
        for part, stack in (("gate_up", layer.gate_up), ("down", layer.down)):
            name = f"{layer_name}.{expert}.{part}"
            factor = build_factor(tokens, weights, transforms[part], recipe, name)
            matrix = quantize_gptq(stack[expert], factor, bits[part], recipe.gptq, outputs=outputs.get(part), name=name)
            stack[expert] = matrix.dequantize()
            all_rows = self.description.projection_rows(part)
            for projection, rows in zip(self.description.projections(part), all_rows, strict=True):
                packed = matrix.part(rows).pack()
                matrices[self.description.expert_tensor(layer_name, expert, projection)] = packed
                kinds[f"{part}_kind"] = packed.code.kind
        after = layer.expert(expert)(sample.x)
        error = float((after - before).norm() / before.norm().clamp_min(1e-30)) if len(own) else None
        report = ExpertReport(**bits, **kinds, tokens=len(own), output_error=error, pooled_hessian=tokens.pooled)
        return _QuantizedExpert(report, matrices)

    def add_unquantized(self) -> None:
        """Norms, the router, and linears that were left alone, as they are stored."""
        for name in self.model.layer_tensors(self.index):
            if name not in self._quantized:
                self.shard.add(name, self.model.source.read(name))


def restore(
    model: LayerwiseModel,
    index: int,
    layer: DecoderLayer,
    quantized: QuantizedLayer,
    linear_bits: Mapping[str, int],
    version: int,
    shard: Path,
) -> None:
    """Give a loaded layer the weights its shard has, exactly those quantize_layer left it with. linear_bits: as in
    LayerOptions."""
    description = model.description
    with safe_open(shard, framework="pt") as file:
        for name in quantized.linears:
            module = layer.linear(name.removeprefix(f"{description.layer_prefix}{index}."))
            tensors = {suffix: file.get_tensor(f"{name}.{suffix}") for suffix in SUFFIXES}
            module.weight.data.copy_(dequantize_linear(tensors, linear_bits[name]))
        for expert, report in enumerate(quantized.experts):
            for part, stack in (("gate_up", layer.gate_up), ("down", layer.down)):
                all_rows = description.projection_rows(part)
                for projection, rows in zip(description.projections(part), all_rows, strict=True):
                    name = description.expert_tensor(description.moe_layers[index], expert, projection)
                    matrix = matrix_of(
                        report.code(part), version, lambda suffix, name=name: file.get_tensor(f"{name}.{suffix}")
                    )
                    stack[expert, rows] = matrix.dequantize(in_features=stack.shape[2])


def _linear_input_moment(layer: DecoderLayer, linear: nn.Linear, hidden: Activations) -> torch.Tensor:
    """Second moment of a linear's input over all tokens, float32 [in, in]; the experts are not computed."""
    moment = SecondMoment()

    def accumulate(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        moment.add(args[0].flatten(0, -2))

    handle = linear.register_forward_pre_hook(accumulate)
    try:
        with layer.experts_forward(lambda x, topk_ids, topk_weights: torch.zeros_like(x)):
            for batch in hidden:
                layer(batch)
    finally:
        handle.remove()
    return moment.matrix()
