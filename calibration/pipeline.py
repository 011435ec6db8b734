"""Quantising a model: a 16-bit directory and a plan in, a checkpoint directory out.

    report = quantize(model_dir, out_dir, ["c4.jsonl"], bits=2.5)                # measure, allocate, quantise
    report = quantize(model_dir, out_dir, ["c4.jsonl"], plan=Plan.load("plan.json"))

Layers are quantised one after another. The inputs of each are what the already quantised layers below produce, so
later layers make up for part of the earlier ones' errors. Every finished layer is kept in a work directory beside the
output (workdir.py), from which a run that was killed is continued.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_mcmoe.calibration.activations import Activations, ActivationStore, Storage
from vllm_mcmoe.calibration.allocation import allocate
from vllm_mcmoe.calibration.artifacts import Factors, Plan
from vllm_mcmoe.calibration.data import DEFAULT_LENGTH, DEFAULT_SEQUENCES, TokenSequences, find_data_files
from vllm_mcmoe.calibration.device import choose_device
from vllm_mcmoe.calibration.evaluate import evaluate
from vllm_mcmoe.calibration.identity import (
    identity_of_device,
    identity_of_document,
    identity_of_files,
    identity_of_model,
    identity_of_program,
    identity_of_recipe,
    identity_of_tensors,
    identity_of_tokens,
)
from vllm_mcmoe.calibration.layer_quantization import LayerOptions, QuantizedLayer, quantize_layer, restore
from vllm_mcmoe.calibration.layerwise import DecoderLayer, LayerwiseModel, WeightFiles
from vllm_mcmoe.calibration.linears import check_linear_bits, choose_group_size, linear_config
from vllm_mcmoe.calibration.memory import peak_resident_bytes
from vllm_mcmoe.calibration.model_card import model_card
from vllm_mcmoe.calibration.models import MoeModel, describe_model, split_layer_name
from vllm_mcmoe.calibration.progress import progress
from vllm_mcmoe.calibration.recipes import Recipe, find_recipe
from vllm_mcmoe.calibration.report import QuantizationReport
from vllm_mcmoe.calibration.sensitivity import choose_store
from vllm_mcmoe.calibration.statistics import check_weights, load_calibration_data, measure, needs_gradients
from vllm_mcmoe.calibration.workdir import COMPLETE, WorkDirectory, check_output, working_on
from vllm_mcmoe.calibration.writer import Shard, copy_side_files, shard_name, write_document, write_index, write_text
from vllm_mcmoe.checkpoint import CheckpointConfig, ExpertBits
from vllm_mcmoe.errors import PlanError

Log = Callable[[str], None]

CONFIG_FILE, REPORT_FILE, PLAN_FILE, FACTORS_FILE, MODEL_CARD = (
    "config.json",
    "quantization_report.json",
    "plan.json",
    "factors.json",
    "README.md",
)

ALLOCATED, REST = "allocated", "rest"  # units of work besides one per layer


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
    activations: Storage = "auto",
    device: str | torch.device = "auto",
    restart: bool = False,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> QuantizationReport:
    """The whole path: measure, allocate, quantise, write. What is given is not computed again.

    data             calibration text, as load_sequences takes it
    plan             bit-widths; None allocates them for `bits` or `bits_per_layer` (one of the two, see allocate)
    factors          what calibrate measured; None measures, where the plan or the recipe's Hessians need it
    widths           bit-widths an expert may get; None takes the recipe's
    linear_bits      attention and dense linears: 4, 8 or 16; None takes the recipe's
    evaluation_data  text to score original and checkpoint on; the scores go into the model card
    activations      where hidden states and gradients of the calibration tokens are kept while the run needs them:
                     "memory", "disk" (beside the output), or "auto", memory if they fit; the result is the same
    device           what computes: "cpu", "cuda", "cuda:N" or "auto", a GPU if there is one; see device.py
    restart          forget what an earlier run has left

    Finished layers are kept in OUT.partial until out_dir is complete: a run that was killed is continued by the same
    call, and the checkpoint is byte for byte that of a run that was not. (GPUs sum in varying order: on one of them the
    last bits, and with them a few codes, may differ from run to run.)

    Raises DeviceError, UnsupportedModelError, FormatError, DataError or PlanError before any long work where possible,
    and WorkDirectoryError where OUT.partial holds the work of other arguments.
    """
    started = time.monotonic()
    device = choose_device(device, log)
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
    source = WeightFiles(description)
    tokens = load_calibration_data(description, data, sequences, length, log)
    identity = {
        **identity_of_program(),
        **identity_of_device(device),
        **identity_of_model(description, source.files),
        **identity_of_tokens(tokens),
        **identity_of_recipe(recipe),
        **identity_of_document("plan", plan),
        **identity_of_document("factors", factors),
        "bits": bits,
        "bits_per_layer": bits_per_layer,
        "widths": None if widths is None else list(widths),
        "linear_bits": linear_bits,
        "seed": seed,
        **identity_of_files("evaluation data", evaluation_data),
        "sequences and length": None if evaluation_data is None else [sequences, length],
    }
    needs_factors = plan is None and factors is None
    needs_norms = recipe.hessian_weighting == "gradient"
    with working_on(out_dir, identity, restart=restart, log=log) as work:
        if (report := _finished(work)) is not None:
            return report
        model = LayerwiseModel(source, device)
        check_weights(model, work, show_progress)
        with_gradients = needs_gradients(recipe) and (needs_factors or needs_norms)
        store = choose_store(activations, model, tokens.tokens.numel(), with_gradients, work.activations, log)
        gradient_norms = None
        if needs_factors or needs_norms:
            log(f"Measuring {description.num_experts} experts in each of {len(description.moe_layers)} layers.")
            measured = measure(
                model,
                tokens,
                recipe=recipe,
                widths=widths if needs_factors else (),
                seed=seed,
                store=store,
                work=work,
                log=log,
                show_progress=show_progress,
            )
            gradient_norms = measured.gradient_norms
            factors = measured.factors if needs_factors else factors
        if plan is None:
            plan = _allocated_plan(work, factors, recipe, bits, bits_per_layer, widths)
            log(f"Allocated {plan.average_bits:.3f} bits per expert weight, scales and zeros included.")
        job = _Run(model, work, store, plan, recipe, linear_bits, gradient_norms, factors, log)
        report = job.write_checkpoint(tokens.tokens, show_progress)
        if evaluation_data is not None:
            held_out = not set(find_data_files(evaluation_data)) & set(find_data_files(data))
            options = {"sequences": sequences, "length": length, "device": device}
            options |= {"log": log, "show_progress": show_progress}
            before = evaluate(model_dir, evaluation_data, **options)
            after = evaluate(work.checkpoint, evaluation_data, against=model_dir, **options)
            card = model_card(description, report, (before, after), held_out)
            write_text(work.checkpoint / MODEL_CARD, card)
        return _publish(work, report, started, log)


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
    activations: Storage = "auto",
    restart: bool = False,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> QuantizationReport:
    """Write a checkpoint of the model at the plan's bit-widths.

    model                 LayerwiseModel(WeightFiles(describe_model(path)), device)
    linear_bits           4, 8 or 16; None takes the recipe's
    gradient_norms        layer name -> float32 [tokens] of the same sequences, as calibrate returns them; needed by
                          recipes whose hessian_weighting is "gradient"
    factors               copied into the checkpoint beside the plan
    activations, restart  as in quantize, which also says how an unfinished run is continued

    Raises before any work: FormatError for an output directory in use, PlanError for a plan of another model,
    UnsupportedModelError for linear_bits that are not one of the three, WorkDirectoryError as quantize does.
    """
    started = time.monotonic()
    recipe = find_recipe(recipe)
    check_linear_bits(recipe.linear_bits if linear_bits is None else linear_bits)
    check_output(Path(out_dir))
    plan.check_against(model.description.experts_per_layer())
    if recipe.hessian_weighting == "gradient" and gradient_norms is None:
        raise PlanError(f"recipe {recipe.name} weights Hessians by loss gradients: pass calibrate's gradient_norms.")
    identity = {
        **identity_of_program(),
        **identity_of_device(model.device),
        **identity_of_model(model.description, model.source.files),
        **identity_of_tokens(sequences),
        **identity_of_recipe(recipe),
        **identity_of_document("plan", plan),
        **identity_of_document("factors", factors),
        **identity_of_tensors("gradient norms", gradient_norms),
        "linear_bits": linear_bits,
    }
    with working_on(out_dir, identity, restart=restart, log=log) as work:
        if (report := _finished(work)) is not None:
            return report
        check_weights(model, work, show_progress)
        store = choose_store(activations, model, sequences.tokens.numel(), False, work.activations, log)
        job = _Run(model, work, store, plan, recipe, linear_bits, gradient_norms, factors, log)
        report = job.write_checkpoint(sequences.tokens, show_progress)
        return _publish(work, report, started, log)


def _finished(work: WorkDirectory) -> QuantizationReport | None:
    """The report of a run that was killed between its last byte and its last clean-up, which is made up for."""
    document = work.load(COMPLETE)
    if document is None:
        return None
    work.publish()
    return QuantizationReport.from_dict(document)


def _publish(work: WorkDirectory, report: QuantizationReport, started: float, log: Log) -> QuantizationReport:
    work.save(COMPLETE, report.to_dict())
    work.publish()
    report.seconds = round(time.monotonic() - started, 1)
    report.peak_memory = peak_resident_bytes()
    log(f"Took {report.seconds:.0f} s and at most {report.peak_memory / 1e9:.2f} GB of resident memory.")
    return report


def _allocated_plan(
    work: WorkDirectory,
    factors: Factors,
    recipe: Recipe,
    bits: float | None,
    bits_per_layer: float | None,
    widths: Sequence[int] | None,
) -> Plan:
    """The plan is a unit of work, too: the integer program of a model with many experts takes minutes."""
    path = work.path / f"allocated-{PLAN_FILE}"
    if work.load(ALLOCATED) is None:
        plan = allocate(factors, recipe=recipe, bits=bits, bits_per_layer=bits_per_layer, widths=widths)
        plan.save(path)
        work.save(ALLOCATED, {}, [path])
    return Plan.load(path)


def _super_experts(factors: Factors | None) -> dict[str, list[int]]:
    if factors is None:
        return {}
    return {name: layer.super_experts for name, layer in factors.layers.items() if layer.super_experts}


class _Run:
    """State of one quantisation."""

    def __init__(
        self,
        model: LayerwiseModel,
        work: WorkDirectory,
        store: ActivationStore,
        plan: Plan,
        recipe: Recipe,
        linear_bits: int | None,
        gradient_norms: Mapping[str, torch.Tensor] | None,
        factors: Factors | None,
        log: Log,
    ):
        self.model, self.work, self.store, self.plan, self.recipe = model, work, store, plan, recipe
        self.linear_bits = recipe.linear_bits if linear_bits is None else linear_bits
        self.linear_group = choose_group_size(_linear_inputs(model))
        self.gradient_norms = gradient_norms or {}
        self.factors = factors
        self.log = log

    @property
    def description(self) -> MoeModel:
        return self.model.description

    def write_checkpoint(self, tokens: torch.Tensor, show_progress: bool) -> QuantizationReport:
        """Everything but the scores of an evaluation, into the work directory."""
        self.work.checkpoint.mkdir(exist_ok=True)
        with torch.no_grad():
            layers = self._quantize_layers(tokens, show_progress)
        rest = self._write_rest()
        shards = {self._shard(i).name: nbytes for i, nbytes in enumerate([*(layer.nbytes for layer in layers), rest])}
        report = self._report(layers, rest, tokens.numel())
        directory = self.work.checkpoint
        write_index(directory, shards)
        write_document(directory / CONFIG_FILE, self._config(report))
        write_text(directory / MODEL_CARD, model_card(self.description, report))
        write_document(directory / REPORT_FILE, report.to_dict())
        self.plan.save(directory / PLAN_FILE)
        if self.factors is not None:
            self.factors.save(directory / FACTORS_FILE)
        copy_side_files(self.description.path, directory)
        return report

    def _shard(self, number: int) -> Path:
        return self.work.checkpoint / shard_name(number, self.model.num_layers + 1)

    def _quantize_layers(self, tokens: torch.Tensor, show_progress: bool) -> list[QuantizedLayer]:
        """First layer first. Layers an earlier run has finished are only run, to get the inputs of those that are
        missing, and only from the last layer whose inputs it has left."""
        finished = [self._load(index) for index in range(self.model.num_layers)]
        missing = [index for index, layer in enumerate(finished) if layer is None]
        if not missing:
            return finished
        if len(missing) < len(finished):
            self.log(f"{len(finished) - len(missing)} of {len(finished)} layers are quantised already.")
        self.model.note_layer_arguments(tokens.shape[1])
        start, hidden = self._last_hidden(missing[0])
        if hidden is None:
            hidden = self.store.collect(_hidden(0), self.model.embedded_batches(tokens), tokens.numel())
        for index in progress(range(start, missing[-1] + 1), "Quantising layers", show=show_progress):
            with self.model.loaded_layer(index) as layer:
                if finished[index] is None:
                    finished[index] = self._quantize_layer(index, layer, hidden)
                else:
                    restore(self.model, index, layer, finished[index], self.linear_bits, self._shard(index))
                if index < missing[-1]:
                    outputs = self.store.collect(_hidden(index + 1), map(layer, hidden), tokens.numel())
                    self.store.drop(_hidden(index))
                    hidden = outputs
        self.store.drop_all()
        return finished

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
        )
        path = self._shard(index)
        quantized = quantize_layer(self.model, index, layer, hidden, self.store, options, path, self.log)
        self.work.save(_unit(index), quantized.to_document(), [path])
        return quantized

    def _write_rest(self) -> dict[str, int]:
        """Embeddings, final norm, lm_head and whatever else lies outside the decoder layers: name -> bytes."""
        nbytes = self.work.load(REST)
        if nbytes is None:
            shard, path = Shard(), self._shard(self.model.num_layers)
            for name in self.model.outer_tensors():
                shard.add(name, self.model.source.read(name))
            shard.write(path)
            nbytes = shard.nbytes
            self.work.save(REST, nbytes, [path])
        return nbytes

    def _report(self, layers: list[QuantizedLayer], rest: Mapping[str, int], tokens: int) -> QuantizationReport:
        """With the bytes that were really written."""
        sizes = dict(rest)
        for layer in layers:
            sizes.update(layer.nbytes)
        files, is_expert = self.model.source.files.info, self.description.is_expert_tensor
        expert_bytes = sum(n for name, n in sizes.items() if is_expert(name))
        total_bytes = sum(sizes.values())
        expert_weights = sum(info.numel for name, info in files.items() if is_expert(name))
        all_weights = sum(info.numel for info in files.values())
        return QuantizationReport(
            recipe=self.recipe.name,
            linear_bits=self.linear_bits,
            calibration_tokens=tokens,
            layers={name: layers[index].experts for index, name in self.description.moe_layers.items()},
            super_experts=_super_experts(self.factors),
            unquantized_linears={name: why for layer in layers for name, why in layer.unquantized_linears.items()},
            expert_bytes=expert_bytes,
            total_bytes=total_bytes,
            original_expert_bytes=sum(info.nbytes for name, info in files.items() if is_expert(name)),
            original_total_bytes=sum(info.nbytes for info in files.values()),
            average_bits={
                "experts": round(8 * expert_bytes / expert_weights, 4),
                "model": round(8 * total_bytes / all_weights, 4),
            },
        )

    def _config(self, report: QuantizationReport) -> dict[str, Any]:
        """The original's config.json with quantization_config."""
        ignore = [*self.description.family.linear_ignore, *report.unquantized_linears]
        config = CheckpointConfig(
            experts={
                name: ExpertBits(tuple(e.gate_up for e in experts), tuple(e.down for e in experts))
                for name, experts in report.layers.items()
            },
            linear=None if self.linear_bits == 16 else linear_config(self.linear_bits, self.linear_group, ignore),
            average_bits=report.average_bits,
        )
        return {**self.description.read_config(), "quantization_config": config.to_dict()}


def _linear_inputs(model: LayerwiseModel) -> set[int]:
    """in_features of the linears that are to be quantised, from the files' headers."""
    linears = {f"{name}.weight" for stage in model.description.family.linears for name in stage}
    splits = {name: split_layer_name(name) for name in model.source.files.info}
    return {model.source.files.info[name].shape[1] for name, split in splits.items() if split and split[1] in linears}


def _unit(index: int) -> str:
    return f"quantized-{index:05d}"


def _hidden(index: int) -> str:
    """Name of the hidden states before a decoder layer, as the quantised layers below give them."""
    return f"hidden-{index:05d}"
