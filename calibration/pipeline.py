"""The story: open a model, measure its experts, allocate bits, quantise, write a checkpoint, evaluate it.

    factors = calibrate(model_dir, ["c4.jsonl"])                                 # measure only, into factors.json
    report = quantize(model_dir, out_dir, bits=2.5)                              # on the built-in calibration text
    report = quantize(model_dir, out_dir, ["c4.jsonl"], bits=2.5)                # measure, allocate, quantise
    report = quantize(model_dir, out_dir, ["c4.jsonl"], plan=Plan.load("plan.json"))

For model_dir there may as well be ORG/NAME on the hub, or what find_model(NAME, REVISION) gives.

Every step is a room, a package beside this file, in the order of docs/design.md. Finished layers are kept in a work
directory beside the output (checkpoint/workdir.py), from which a run that was killed is continued.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.program import allocate, check_budget
from vllm_mcmoe.calibration.checkpoint.identity import (
    identity_of_document,
    identity_of_files,
    identity_of_run,
    identity_of_tensors,
)
from vllm_mcmoe.calibration.checkpoint.report import EvaluationReport, QuantizationReport
from vllm_mcmoe.calibration.checkpoint.size import decided_bytes
from vllm_mcmoe.calibration.checkpoint.workdir import COMPLETE, WorkDirectory, check_output, working_on
from vllm_mcmoe.calibration.checkpoint.writer import (
    MODEL_CARD,
    PLAN_FILE,
    REPORT_FILE,
    WIDTH_MAP,
    write_document,
    write_text,
)
from vllm_mcmoe.calibration.common.device import bfloat16_products, choose_device, multiplies_in_bfloat16
from vllm_mcmoe.calibration.common.memory import peak_resident_bytes
from vllm_mcmoe.calibration.common.progress import Log, whole_run
from vllm_mcmoe.calibration.evaluate.model_card import model_card
from vllm_mcmoe.calibration.evaluate.scores import Evaluation, evaluate
from vllm_mcmoe.calibration.evaluate.times import phases_of
from vllm_mcmoe.calibration.matrix.linears import check_linear_bits, count_by_width
from vllm_mcmoe.calibration.measure.factors import Factors, LinearTable
from vllm_mcmoe.calibration.measure.linear_errors import table_of
from vllm_mcmoe.calibration.measure.output_gradients import OutputGradients
from vllm_mcmoe.calibration.measure.sensitivity import choose_store
from vllm_mcmoe.calibration.measure.statistics import measure
from vllm_mcmoe.calibration.measure.weights_check import check_weights
from vllm_mcmoe.calibration.model.activations import Storage
from vllm_mcmoe.calibration.model.description import MoeModel, describe_model
from vllm_mcmoe.calibration.model.folder import ModelFolder, find_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import (
    DEFAULT_LENGTH,
    DEFAULT_SEQUENCES,
    TokenSequences,
    find_data_files,
    load_calibration_data,
)
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.quantize.checkpoint_run import CheckpointRun
from vllm_mcmoe.calibration.recipes import (
    Effort,
    Recipe,
    find_recipe,
    needs_gradients,
    needs_gradients_to_quantize,
    needs_output_gradients,
)
from vllm_mcmoe.calibration.report.width_map import width_map_file, widths_of
from vllm_mcmoe.calibration.tune.tuning import tune
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import Kind

ALLOCATED = "allocated"  # the unit of work between measuring and quantising


def calibrate(
    model_dir: str | Path | ModelFolder,
    data: Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    *,
    recipe: str | Recipe = "mcmoe",
    effort: Effort = "normal",
    codes: Kind | None = None,
    widths: Sequence[int] | None = None,
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    activations: Storage = "auto",
    device: str | torch.device = "auto",
    restart: bool = False,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> Factors:
    """Measure every expert of a model.

    model_dir    a directory or a name on the hub, as find_model takes it
    data         text files, .jsonl files or directories, as load_sequences takes them; None takes the built-in text
    out          where to write factors.json; with it, measured layers are kept beside it until the file is complete,
                 and the same call goes on from there after having been killed
    effort       how much work goes into each matrix, see recipes.find_recipe; of a recipe by name
    codes        that are measured, "scalar" or "trellis"; None takes the recipe's
    widths       bit-widths to measure; None takes the recipe's
    seed         of the labels sampled for the loss gradient
    activations  "memory", "disk" (beside out, or in the system's temporary directory) or "auto", memory if they fit
    device       what computes, as choose_device takes it
    restart      forget what an earlier run has left

    Raises DeviceError, HubError, UnsupportedModelError, FormatError or DataError before any long work,
    WorkDirectoryError where there is unfinished work of other arguments.
    """
    device = choose_device(device, log)
    recipe = find_recipe(recipe, effort, codes=codes)
    source = WeightFiles(describe_model(find_model(model_dir, log=log)))
    tokens = load_calibration_data(source.model, data, sequences, length, log)
    identity = {
        **identity_of_run(device, source.model, source.files, tokens, recipe),
        "widths": None if widths is None else list(widths),
        "seed": seed,
    }
    with ExitStack() as stack:
        target = Path(stack.enter_context(TemporaryDirectory())) / "factors.json" if out is None else Path(out)
        work = stack.enter_context(working_on(target, identity, restart=restart, log=log))
        stack.enter_context(_products(device, source.model, recipe))
        model = LayerwiseModel(source, device)
        phases = phases_of(model, recipe, *tokens.tokens.shape, recipe.linear_bits, measures=True, quantizes=False)
        stack.enter_context(whole_run(phases, log, show=show_progress))
        check_weights(model, work, show_progress)
        store = choose_store(activations, model, tokens.tokens.numel(), needs_gradients(recipe), work.activations, log)
        options = {"store": store, "work": work, "log": log, "show_progress": show_progress}
        factors = measure(
            model, tokens, recipe=recipe, widths=widths, seed=seed, for_quantizing=False, with_linears=True, **options
        ).factors
        factors.save(target)
        work.remove()
    log(f"At most {peak_resident_bytes() / 1e9:.2f} GB of memory were resident.")
    return factors


def quantize(
    model_dir: str | Path | ModelFolder,
    out_dir: str | Path,
    data: Sequence[str | Path] | None = None,
    *,
    plan: Plan | None = None,
    factors: Factors | None = None,
    bits: float | None = None,
    bits_per_layer: float | None = None,
    size: str | int | None = None,
    recipe: str | Recipe = "mcmoe",
    effort: Effort = "normal",
    codes: Kind | None = None,
    widths: Sequence[int] | None = None,
    linear_bits: int | None = None,
    tuned: bool = True,
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

    model_dir        a directory or a name on the hub, as find_model takes it
    data             calibration text, as load_sequences takes it; None takes the built-in text
    plan             bit-widths; None allocates them for `bits`, `bits_per_layer` or `size` (one of the three, see
                     allocate)
    factors          what calibrate measured; None measures, where the plan or the recipe's Hessians need it
    effort           how much work goes into each matrix, see recipes.find_recipe; of a recipe by name
    codes            that experts are written in, "scalar" or "trellis"; None takes the recipe's
    widths           bit-widths an expert may get; None takes the recipe's
    linear_bits      attention and dense linears: 4, 8 or 16; None takes the recipe's, with `size` and for plans that
                     have them widths of their own
    tuned            whether norms are tuned in the end, if the recipe does that (tune/tuning.py)
    evaluation_data  text to score original and checkpoint on; the scores go into the model card
    activations      where hidden states and gradients of the calibration tokens are kept while the run needs them:
                     "memory", "disk" (beside the output), or "auto", memory if they fit; the result is the same
    device           what computes: "cpu", "cuda", "cuda:N" or "auto", a GPU if there is one; see device.py
    restart          forget what an earlier run has left

    Finished layers are kept in OUT.partial until out_dir is complete: a run that was killed is continued by the same
    call, and the checkpoint is byte for byte that of a run that was not. (GPUs sum in varying order: on one of them the
    last bits, and with them a few codes, may differ from run to run.)

    Raises DeviceError, HubError, UnsupportedModelError, FormatError, DataError or PlanError before any long work where
    possible, and WorkDirectoryError where OUT.partial holds the work of other arguments.
    """
    started = time.monotonic()
    device = choose_device(device, log)
    recipe = find_recipe(recipe, effort, tune=tuned, codes=codes)
    if sum(given is not None for given in (plan, bits, bits_per_layer, size)) != 1:
        raise PlanError("give exactly one of plan, bits, bits_per_layer and size.")
    bits_of_linears = recipe.linear_bits if linear_bits is None else linear_bits
    check_linear_bits(bits_of_linears)
    check_output(Path(out_dir))
    description = describe_model(find_model(model_dir, log=log))
    if plan is not None:
        plan.check_against(description.experts_per_layer())
        _check_plans_linears(plan, linear_bits)
    elif size is None:
        check_budget(description, recipe, bits, bits_per_layer, widths)
    if factors is not None:
        factors.check_against(description.experts_per_layer(), description.part_shapes())
    if evaluation_data is not None:
        find_data_files(evaluation_data)
    source = WeightFiles(description)
    tokens = load_calibration_data(description, data, sequences, length, log)
    model = LayerwiseModel(source, device)
    if size is not None:
        linears = _table_of_linears(model, factors)
        check_budget(
            description, recipe, bits, bits_per_layer, widths, size=size, linear_bits=linear_bits, linears=linears
        )
    elif plan is not None:
        plan.check_linears([group.names for group in decided_bytes(model).groups])
    identity = {
        **identity_of_run(device, description, source.files, tokens, recipe),
        **identity_of_document("plan", plan),
        **identity_of_document("factors", factors),
        "bits": bits,
        "bits_per_layer": bits_per_layer,
        "size": size,
        "widths": None if widths is None else list(widths),
        "linear_bits": linear_bits,
        "seed": seed,
        **identity_of_files("evaluation data", evaluation_data),
        "sequences and length": None if evaluation_data is None else [sequences, length],
    }
    needs_factors = plan is None and factors is None
    measures = needs_factors or needs_gradients_to_quantize(recipe)
    with working_on(out_dir, identity, restart=restart, log=log) as work, ExitStack() as stack:
        if (report := _finished(work)) is not None:
            return report
        original = description.folder.name
        evaluated = () if evaluation_data is None else (original, work.checkpoint.name, original)
        shape = tokens.tokens.shape
        phases = phases_of(model, recipe, *shape, bits_of_linears, measures=measures, evaluated=evaluated)
        stack.enter_context(whole_run(phases, log, show=show_progress))
        check_weights(model, work, show_progress)
        with_gradients = measures and needs_gradients(recipe)
        store = choose_store(activations, model, tokens.tokens.numel(), with_gradients, work.activations, log)
        gradient_norms = output_gradients = None
        if measures:
            experts = f"{description.num_experts} experts in each of {len(description.moe_layers)} layers"
            log(f"Measuring {experts}." if needs_factors else f"Finding the loss gradients that quantise {experts}.")
            with _products(device, description, recipe):
                measured = measure(
                    model,
                    tokens,
                    recipe=recipe,
                    widths=widths if needs_factors else (),
                    seed=seed,
                    store=store,
                    work=work,
                    with_linears=needs_factors and size is not None,
                    log=log,
                    show_progress=show_progress,
                )
            gradient_norms, output_gradients = measured.gradient_norms, measured.output_gradients
            factors = measured.factors if needs_factors else factors
        if plan is None:
            request = {"bits": bits, "bits_per_layer": bits_per_layer, "size": size, "widths": widths}
            if size is not None:
                request["linear_bits"], linear_bits = linear_bits, None  # the plan has them
            plan = _allocated_plan(work, factors, recipe, request)
            log(f"Allocated {plan.average_bits:.3f} bits per expert weight, scales and zeros included.")
            if plan.linears is not None:
                log(f"Other linears: {count_by_width(plan.linears)}.")
        job = CheckpointRun(
            model, work, store, plan, recipe, linear_bits, gradient_norms, output_gradients, factors, log
        )
        report = _write_checkpoint(job, tokens.tokens, show_progress)
        card = model_card(description, report, tokens)
        if evaluation_data is not None:
            held_out = not set(find_data_files(evaluation_data)) & set(find_data_files(data))
            options = {"sequences": sequences, "length": length, "device": device}
            options |= {"log": log, "show_progress": show_progress}
            before = evaluate(description.folder, evaluation_data, **options)
            after = evaluate(work.checkpoint, evaluation_data, against=description.folder, **options)
            card = model_card(description, report, tokens, (before, after), held_out)
            report.evaluation = _scores_to_keep(before, after, held_out)
            write_document(work.checkpoint / REPORT_FILE, report.to_dict())
        return _publish(work, report, card, started, log)


def quantize_model(
    model: LayerwiseModel,
    out_dir: str | Path,
    *,
    plan: Plan,
    sequences: TokenSequences,
    recipe: str | Recipe = "mcmoe",
    effort: Effort = "normal",
    linear_bits: int | None = None,
    gradient_norms: Mapping[str, torch.Tensor] | None = None,
    output_gradients: Mapping[str, OutputGradients] | None = None,
    factors: Factors | None = None,
    activations: Storage = "auto",
    restart: bool = False,
    log: Log = lambda message: None,
    show_progress: bool = True,
) -> QuantizationReport:
    """Write a checkpoint of the model at the plan's bit-widths.

    model                 LayerwiseModel(WeightFiles(describe_model(path)), device)
    linear_bits           4, 8 or 16; None takes the recipe's, or the plan's of each
    gradient_norms        layer name -> float32 [tokens] of the same sequences, as measure returns them; needed by
                          recipes whose hessian_weighting is "gradient"
    output_gradients      layer name -> gradients at the same sequences, from the same; needed by recipes with
                          output_sweeps
    factors               copied into the checkpoint beside the plan
    activations, restart  as in quantize, which also says how an unfinished run is continued

    Raises before any work: FormatError for an output directory in use, PlanError for a plan of another model,
    UnsupportedModelError for linear_bits that are not one of the three, WorkDirectoryError as quantize does.
    """
    started = time.monotonic()
    recipe = find_recipe(recipe, effort)
    bits_of_linears = recipe.linear_bits if linear_bits is None else linear_bits
    check_linear_bits(bits_of_linears)
    check_output(Path(out_dir))
    model.description.folder.fetch_side_files()
    plan.check_against(model.description.experts_per_layer())
    _check_plans_linears(plan, linear_bits)
    plan.check_linears([group.names for group in decided_bytes(model).groups])
    if recipe.hessian_weighting == "gradient" and gradient_norms is None:
        raise PlanError(f"recipe {recipe.name} weights Hessians by loss gradients: pass measure's gradient_norms.")
    if needs_output_gradients(recipe) and output_gradients is None:
        raise PlanError(f"recipe {recipe.name} looks at the Hessians of outputs: pass measure's output_gradients.")
    identity = {
        **identity_of_run(model.device, model.description, model.source.files, sequences, recipe),
        **identity_of_document("plan", plan),
        **identity_of_document("factors", factors),
        **identity_of_tensors("gradient norms", (gradient_norms or {}).items()),
        **identity_of_tensors("output gradients", _tensors(output_gradients)),
        "linear_bits": linear_bits,
    }
    with working_on(out_dir, identity, restart=restart, log=log) as work, ExitStack() as stack:
        if (report := _finished(work)) is not None:
            return report
        phases = phases_of(model, recipe, *sequences.tokens.shape, bits_of_linears, measures=False)
        stack.enter_context(whole_run(phases, log, show=show_progress))
        check_weights(model, work, show_progress)
        store = choose_store(activations, model, sequences.tokens.numel(), False, work.activations, log)
        job = CheckpointRun(
            model, work, store, plan, recipe, linear_bits, gradient_norms, output_gradients, factors, log
        )
        report = _write_checkpoint(job, sequences.tokens, show_progress)
        return _publish(work, report, model_card(model.description, report, sequences), started, log)


def _write_checkpoint(job: CheckpointRun, tokens: torch.Tensor, show_progress: bool) -> QuantizationReport:
    """All files of it but the model card. One that is to be tuned is complete before that."""
    work, tuning = job.work, job.recipe.tuning
    with _products(job.model.device, job.description, job.recipe):
        report = job.write_checkpoint(tokens, show_progress)
    if tuning is not None:
        report.tuning = tune(
            job.model, job.directory, work.checkpoint, tokens, tuning, work, job.store,
            log=job.log, show_progress=show_progress,
        )  # fmt: skip
        write_document(job.directory / REPORT_FILE, report.to_dict())
        for path in job.directory.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy2(path, work.checkpoint / path.name)
    return report


def _products(device: torch.device, description: MoeModel, recipe: Recipe) -> AbstractContextManager[None]:
    return bfloat16_products(recipe.bfloat16_products and multiplies_in_bfloat16(device, description.hidden))


def _tensors(gradients: Mapping[str, OutputGradients] | None) -> Iterator[tuple[str, torch.Tensor]]:
    """One layer's at a time."""
    for name, of_layer in (gradients or {}).items():
        yield from ((f"{name} {key}", tensor) for key, tensor in of_layer.to_tensors().items())


def _finished(work: WorkDirectory) -> QuantizationReport | None:
    """The report of a run that was killed between its last byte and its last clean-up, which is made up for."""
    document = work.load(COMPLETE)
    if document is None:
        return None
    work.publish()
    return QuantizationReport.from_dict(document)


def _scores_to_keep(before: Evaluation, after: Evaluation, held_out: bool) -> EvaluationReport:
    return EvaluationReport(
        tokens=after.tokens,
        held_out=held_out,
        activations=after.activations,
        original_perplexity=before.perplexity_by_file,
        perplexity=after.perplexity_by_file,
        mean_kl=after.mean_kl,
        kl_quantiles=after.kl_quantiles,
        top1_agreement=after.top1_agreement,
    )


def _publish(
    work: WorkDirectory, report: QuantizationReport, card: str, started: float, log: Log
) -> QuantizationReport:
    write_text(work.checkpoint / MODEL_CARD, card)
    write_text(work.checkpoint / WIDTH_MAP, width_map_file(widths_of(report.layers)))
    work.save(COMPLETE, report.to_dict())
    work.publish()
    report.seconds = round(time.monotonic() - started, 1)
    report.peak_memory = peak_resident_bytes()
    log(f"Took {report.seconds:.0f} s and at most {report.peak_memory / 1e9:.2f} GB of resident memory.")
    return report


def _table_of_linears(model: LayerwiseModel, factors: Factors | None) -> LinearTable:
    """Of these factors, which must be this model's; without factors, what will be measured."""
    table = table_of(decided_bytes(model))
    if factors is not None:
        factors.check_linears(table)
    return table


def _check_plans_linears(plan: Plan, linear_bits: int | None) -> None:
    if plan.linears is not None and linear_bits is not None:
        raise PlanError("the plan gives every linear a width of its own: leave linear bits out, or take them out of it")


def _allocated_plan(work: WorkDirectory, factors: Factors, recipe: Recipe, request: Mapping[str, Any]) -> Plan:
    """The plan is a unit of work, too: to be spent exactly, the budget of a model with many experts takes minutes."""
    path = work.path / f"allocated-{PLAN_FILE}"
    if work.load(ALLOCATED) is None:
        plan = allocate(factors, recipe=recipe, **request)
        plan.save(path)
        work.save(ALLOCATED, {}, [path])
    return Plan.load(path)
