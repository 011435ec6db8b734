"""`mcmoe quantize` and `mcmoe prune`: what writes a checkpoint, and what adds a pruning rule to one."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_mcmoe.cli.console import log, print_json
from vllm_mcmoe.cli.options import (
    ActivationStorage,
    AsJson,
    Bits,
    BitsPerLayer,
    CalibrationData,
    Codes,
    Device,
    Effort,
    EffortName,
    Evaluate,
    EvaluationData,
    Length,
    LinearBits,
    Method,
    Model,
    PruningMethod,
    Recipe,
    RecipeName,
    Restart,
    Revision,
    Sequences,
    Size,
    Storage,
    Tune,
    Widths,
    parse_size,
    parse_widths,
)


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.", show_default=False)],
    data: CalibrationData = None,
    revision: Revision = None,
    bits: Bits = None,
    bits_per_layer: BitsPerLayer = None,
    size: Size = None,
    plan: Annotated[
        Path | None, typer.Option(help="Use this plan.json instead of measuring and allocating.", show_default=False)
    ] = None,
    factors: Annotated[
        Path | None, typer.Option(help="Use this factors.json instead of measuring again.", show_default=False)
    ] = None,
    recipe: Recipe = RecipeName.mcmoe,
    effort: Effort = EffortName.normal,
    codes: Codes = None,
    widths: Widths = None,
    linear_bits: LinearBits = None,
    tune: Tune = True,
    evaluation_data: EvaluationData = None,
    evaluation: Evaluate = True,
    sequences: Sequences = 128,
    length: Length = 2048,
    prune_target: Annotated[
        float | None,
        typer.Option("--prune", help="Then add online pruning of this fraction, as `mcmoe prune` does."),
    ] = None,
    prune_method: Method = PruningMethod.otp,
    activations: ActivationStorage = Storage.auto,
    device: Device = "auto",
    restart: Restart = False,
) -> None:
    """Quantise a model: measure its experts, allocate bits, run GPTQ, write a checkpoint vLLM can serve.

    Needs memory for two decoder layers, not for the model. Finished layers are kept in OUT.partial until OUT is
    complete; the same command continues a run that was interrupted or killed.

    Example: `mcmoe quantize Qwen/Qwen3-30B-A3B qwen3-2.5bit/ --bits 2.5`, or `--size 10GB` instead of the bits
    """
    if sum(option is not None for option in (bits, bits_per_layer, size, plan)) != 1:
        raise typer.BadParameter("give one of --bits, --bits-per-layer, --size and --plan")
    size = parse_size(size)
    from vllm_mcmoe.calibration.allocate.plan import Plan
    from vllm_mcmoe.calibration.common.device import choose_device
    from vllm_mcmoe.calibration.measure.factors import Factors
    from vllm_mcmoe.calibration.model.description import describe_model
    from vllm_mcmoe.calibration.model.folder import find_model
    from vllm_mcmoe.calibration.model.text import BUILTIN_TEXT
    from vllm_mcmoe.calibration.pipeline import quantize as run
    from vllm_mcmoe.calibration.prune.prune import prune as add_pruning
    from vllm_mcmoe.calibration.prune.rules import check_request

    chosen = choose_device(device, log)
    folder = find_model(model, revision, log)
    if prune_target is not None:
        check_request(prune_method.value, prune_target, describe_model(folder))
    run(
        folder,
        out,
        data,
        plan=Plan.load(plan) if plan else None,
        factors=Factors.load(factors) if factors else None,
        bits=bits,
        bits_per_layer=bits_per_layer,
        size=size,
        recipe=recipe.value,
        effort=effort.value,
        codes=codes and codes.value,
        widths=parse_widths(widths),
        linear_bits=linear_bits,
        tuned=tune,
        sequences=sequences,
        length=length,
        evaluation_data=(evaluation_data or data or [BUILTIN_TEXT]) if evaluation else None,
        activations=activations.value,
        device=chosen,
        restart=restart,
        log=log,
    )
    if prune_target is not None:
        add_pruning(
            out,
            data,
            method=prune_method.value,
            target=prune_target,
            sequences=sequences,
            length=length,
            activations=activations.value,
            device=chosen,
            log=log,
        )
    log(f"Wrote {out}. Serve it: vllm serve {out}")


def prune(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A quantised checkpoint; changed in place.", show_default=False)
    ],
    data: CalibrationData = None,
    method: Method = PruningMethod.otp,
    target: Annotated[float, typer.Option(help="Fraction of expert activations to drop when served.")] = 0.25,
    evaluation_data: EvaluationData = None,
    evaluation: Evaluate = True,
    table: Annotated[bool, typer.Option("--table", help="Measure at 10, 20, ... 50% as well.")] = False,
    sequences: Sequences = 128,
    length: Length = 2048,
    activations: ActivationStorage = Storage.auto,
    device: Device = "auto",
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Let tokens skip the experts they need least: add a pruning rule to a checkpoint, and measure what it costs.

    A token always keeps its first expert. The same command continues a run that was interrupted or killed.

    The rule holds for every target: when serving, choose another one with `--hf-overrides '{"mcmoe_pruning": 0.1}'`
    ("off" and "on" work, too) or the environment variable VLLM_MCMOE_PRUNING=0.1.

    Example: `mcmoe prune mixtral-2.5bit/ --target 0.25`
    """
    from vllm_mcmoe.calibration.model.text import BUILTIN_TEXT
    from vllm_mcmoe.calibration.prune.prune import prune as run
    from vllm_mcmoe.reporting import print_pruning

    points = run(
        checkpoint,
        data,
        method=method.value,
        target=target,
        evaluation_data=(evaluation_data or data or [BUILTIN_TEXT]) if evaluation else None,
        table=table,
        sequences=sequences,
        length=length,
        activations=activations.value,
        device=device,
        restart=restart,
        log=log,
    )
    if as_json:
        print_json({"method": method.value, "target": target, "points": [vars(point) for point in points]})
    elif points:
        print_pruning(points)
