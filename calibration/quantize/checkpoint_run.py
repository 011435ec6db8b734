"""From a plan to the files of a checkpoint: one decoder layer after another, each kept as soon as it is finished."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.checkpoint.report import QuantizationReport
from vllm_mcmoe.calibration.checkpoint.size import decided_bytes, linear_groups, linear_shapes, weights_of
from vllm_mcmoe.calibration.checkpoint.workdir import WorkDirectory
from vllm_mcmoe.calibration.checkpoint.writer import (
    FACTORS_FILE,
    PLAN_FILE,
    REPORT_FILE,
    Shard,
    copy_side_files,
    shard_name,
    write_document,
    write_index,
)
from vllm_mcmoe.calibration.common.progress import Log, progress
from vllm_mcmoe.calibration.matrix.gptq import HessianFactor
from vllm_mcmoe.calibration.matrix.linears import (
    PACKED_BITS,
    choose_group_size,
    linear_config,
    mixed_linear_config,
    quantize_linear,
)
from vllm_mcmoe.calibration.matrix.second_moment import SecondMoment
from vllm_mcmoe.calibration.measure.factors import Factors
from vllm_mcmoe.calibration.measure.output_gradients import OutputGradients
from vllm_mcmoe.calibration.model.activations import Activations, ActivationStore
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.folder import CONFIG_FILE
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer, LayerwiseModel
from vllm_mcmoe.calibration.quantize.layer import LayerOptions, QuantizedLayer, quantize_layer, restore
from vllm_mcmoe.calibration.recipes import Recipe
from vllm_mcmoe.checkpoint import SCALAR_VERSION, CheckpointConfig, ExpertBits

REST = "rest"  # the unit of work besides one per layer


def _super_experts(factors: Factors | None) -> dict[str, list[int]]:
    if factors is None:
        return {}
    return {name: layer.super_experts for name, layer in factors.layers.items() if layer.super_experts}


class CheckpointRun:
    """State of one quantisation.

    directory   inside the work directory, where the checkpoint is written: its own, or another where it is to be tuned
    """

    def __init__(
        self,
        model: LayerwiseModel,
        work: WorkDirectory,
        store: ActivationStore,
        plan: Plan,
        recipe: Recipe,
        linear_bits: int | None,
        gradient_norms: Mapping[str, torch.Tensor] | None,
        output_gradients: Mapping[str, OutputGradients] | None,
        factors: Factors | None,
        log: Log,
    ):
        self.model, self.work, self.store = model, work, store
        self.plan, self.recipe = plan, recipe
        self.directory = work.checkpoint if recipe.tuning is None else work.untuned
        self.linear_bits, self.linear_group = self._linear_widths(linear_bits)
        self._uniform = None if plan.linears is not None else recipe.linear_bits if linear_bits is None else linear_bits
        self.gradient_norms, self.output_gradients = gradient_norms or {}, output_gradients or {}
        self.factors = factors
        self.log = log

    def _linear_widths(self, linear_bits: int | None) -> tuple[dict[str, int], int]:
        """The width asked for of every linear by on-disk name, and their group size."""
        if self.plan.linears is not None:
            decided = decided_bytes(self.model)
            # the others cannot be packed, which quantising a layer finds and reports
            others = {name: min(PACKED_BITS) for name in self._linear_names()}
            return {**others, **self.plan.linears}, decided.group_size
        bits = self.recipe.linear_bits if linear_bits is None else linear_bits
        shapes = linear_shapes(self.description, weights_of(self.model))
        return dict.fromkeys(self._linear_names(), bits), choose_group_size(shapes, bits)

    def _linear_names(self) -> Iterator[str]:
        """Of all linears in decoder layers that compressed-tensors may pack."""
        for group in linear_groups(self.description, weights_of(self.model)):
            if group.layer is not None:
                yield from group.names

    @property
    def head_bits(self) -> int:
        return self.linear_bits.get(self.description.family.head, 16)

    @property
    def description(self) -> MoeModel:
        return self.model.description

    def write_checkpoint(self, tokens: torch.Tensor, show_progress: bool) -> QuantizationReport:
        """Everything but the model card."""
        self.directory.mkdir(exist_ok=True)
        with torch.no_grad():
            layers, outputs = self._quantize_layers(tokens, show_progress)
            rest = self._write_rest(outputs)
        for index in range(self.model.num_layers + 1):
            self.store.drop(_hidden(index))
        shards = {self._shard(i).name: nbytes for i, nbytes in enumerate([*(layer.nbytes for layer in layers), rest])}
        report = self._report(layers, rest, tokens.numel())
        write_index(self.directory, shards)
        write_document(self.directory / CONFIG_FILE, self._config(report))
        write_document(self.directory / REPORT_FILE, report.to_dict())
        self.plan.save(self.directory / PLAN_FILE)
        if self.factors is not None:
            self.factors.save(self.directory / FACTORS_FILE)
        copy_side_files(self.description.path, self.directory)
        return report

    def _shard(self, number: int) -> Path:
        return self.directory / shard_name(number, self.model.num_layers + 1)

    def _quantize_layers(
        self, tokens: torch.Tensor, show_progress: bool
    ) -> tuple[list[QuantizedLayer], Activations | None]:
        """First layer first. Layers an earlier run has finished are only run, to get the inputs of those that are
        missing, and only from the last layer whose inputs it has left.

        Returns the last layer's outputs, too, where the output head is yet to be quantised on them.
        """
        finished = [self._load(index) for index in range(self.model.num_layers)]
        missing = [index for index, layer in enumerate(finished) if layer is None]
        for_head = self.head_bits != 16 and self.work.load(REST) is None
        if not missing and not for_head:
            return finished, None
        if len(missing) < len(finished):
            self.log(f"{len(finished) - len(missing)} of {len(finished)} layers are quantised already.")
        self.model.note_layer_arguments(tokens.shape[1])
        end = self.model.num_layers if for_head else missing[-1] + 1
        start, hidden = self._last_hidden(missing[0] if missing else end)
        if hidden is None:
            hidden = self.store.collect(_hidden(0), self.model.embedded_batches(tokens), tokens.numel())
        for index in progress(range(start, end), "Quantising layers", show=show_progress):
            with self.model.loaded_layer(index) as layer:
                if finished[index] is None:
                    finished[index] = self._quantize_layer(index, layer, hidden)
                else:
                    version = self.recipe.format_version
                    restore(self.model, index, layer, finished[index], self.linear_bits, version, self._shard(index))
                if index + 1 < end or for_head:
                    outputs = self.store.collect(_hidden(index + 1), map(layer, hidden), tokens.numel())
                    self.store.drop(_hidden(index))
                    hidden = outputs
        return finished, hidden if for_head else None

    def _last_hidden(self, index: int) -> tuple[int, Activations | None]:
        """The layer nearest below (or at) index whose inputs an earlier run has left; (0, None) without one."""
        for layer in range(index, 0, -1):
            hidden = self.store.find(_hidden(layer))
            if hidden is not None:
                return layer, hidden
        return 0, None

    def _load(self, index: int) -> QuantizedLayer | None:
        document = self.work.load(_unit(index))
        return None if document is None else QuantizedLayer.from_document(document)

    def _quantize_layer(self, index: int, layer: DecoderLayer, hidden: Activations) -> QuantizedLayer:
        name = self.description.moe_layers.get(index)
        options = LayerOptions(
            self.recipe,
            self.plan.layers.get(name),
            self.linear_bits,
            self.linear_group,
            self.gradient_norms.get(name),
            self.output_gradients.get(name),
        )
        path = self._shard(index)
        quantized = quantize_layer(self.model, index, layer, hidden, self.store, options, path, self.log)
        self.work.save(_unit(index), quantized.to_document(), [path])
        return quantized

    def _write_rest(self, outputs: Activations | None) -> dict[str, int]:
        """Embeddings, final norm, lm_head and whatever else lies outside the decoder layers: name -> bytes. outputs: of
        the last layer, where lm_head is to be quantised."""
        nbytes = self.work.load(REST)
        if nbytes is None:
            if self.model.left_out:
                shown = ", ".join(self.model.left_out[:3]) + (", ..." if len(self.model.left_out) > 3 else "")
                self.log(f"Left out, since {self.description.architecture} has no such tensors: {shown}")
            shard, path = Shard(), self._shard(self.model.num_layers)
            for name in self.model.outer_tensors():
                if name == f"{self.description.family.head}.weight" and self.head_bits != 16:
                    self._add_head(shard, outputs)
                else:
                    shard.add(name, self.model.source.read(name))
            shard.write(path)
            nbytes = shard.nbytes
            self.work.save(REST, nbytes, [path])
        return nbytes

    def _add_head(self, shard: Shard, outputs: Activations) -> None:
        name, head = self.description.family.head, self.model.head()
        inputs = (self.model.head_inputs(batch).flatten(0, -2) for batch in outputs)
        factor = HessianFactor.build(SecondMoment.of(inputs).matrix(), name=name)
        dtype = self.model.source.read(f"{name}.weight").dtype
        _, tensors = quantize_linear(head.weight, factor, self.head_bits, self.linear_group, dtype)
        self.model.release_head()
        for suffix, tensor in tensors.items():
            shard.add(f"{name}.{suffix}", tensor)

    def _report(self, layers: list[QuantizedLayer], rest: Mapping[str, int], tokens: int) -> QuantizationReport:
        """With the bytes that were really written."""
        sizes = dict(rest)
        for layer in layers:
            sizes.update(layer.nbytes)
        weights, is_expert = self.model.source.weights, self.description.is_expert_weight
        expert_bytes = sum(n for name, n in sizes.items() if is_expert(name))
        total_bytes = sum(sizes.values())
        expert_weights = sum(info.numel for name, info in weights.items() if is_expert(name))
        all_weights = sum(info.numel for info in weights.values())
        return QuantizationReport(
            recipe=self.recipe.name,
            linear_bits=self._uniform,
            linears=self.plan.linears or {},
            calibration_tokens=tokens,
            layers={name: layers[index].experts for index, name in self.description.moe_layers.items()},
            super_experts=_super_experts(self.factors),
            unquantized_linears={name: why for layer in layers for name, why in layer.unquantized_linears.items()},
            expert_bytes=expert_bytes,
            total_bytes=total_bytes,
            original_expert_bytes=sum(info.nbytes for name, info in weights.items() if is_expert(name)),
            original_total_bytes=sum(info.nbytes for info in weights.values()),
            average_bits={
                "experts": round(8 * expert_bytes / expert_weights, 4),
                "model": round(8 * total_bytes / all_weights, 4),
            },
        )

    def _config(self, report: QuantizationReport) -> dict[str, Any]:
        """The original's config.json with quantization_config."""
        ignore = [*self.description.family.linear_ignore, *report.unquantized_linears]
        if self._uniform is not None:
            linear = None if self._uniform == 16 else linear_config(self._uniform, self.linear_group, ignore)
        else:
            linear = self._mixed_config(ignore)
        experts = {
            name: ExpertBits.of_codes([e.code("gate_up") for e in layer], [e.code("down") for e in layer])
            for name, layer in report.layers.items()
        }
        version = self.recipe.format_version
        if not any(layer.has_trellis for layer in experts.values()):
            version = min(version, SCALAR_VERSION)
        config = CheckpointConfig(
            experts=experts,
            linear=linear,
            average_bits=report.average_bits,
            format_version=version,
        )
        return {**self.description.read_config(), "quantization_config": config.to_dict()}

    def _mixed_config(self, ignore: list[str]) -> dict[str, Any] | None:
        packed = {name: bits for name, bits in self.plan.linears.items() if bits != 16}
        left = [name for name, bits in self.plan.linears.items() if bits == 16]
        head = self.description.family.head
        return mixed_linear_config(packed, self.linear_group, [*ignore, *left], head) if packed else None


def _unit(index: int) -> str:
    return f"quantized-{index:05d}"


def _hidden(index: int) -> str:
    """Name of the hidden states before a decoder layer, as the quantised layers below give them."""
    return f"hidden-{index:05d}"
