"""`mcmoe calibrate` and `mcmoe allocate`: from a model to factors, from factors to a plan."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_mcmoe.cli.console import log, print_json
from vllm_mcmoe.cli.options import (
    ActivationStorage,
    AsJson,
    Bits,
    BitsPerLayer,
    Budget,
    CalibrationData,
    Codes,
    Device,
    Effort,
    EffortName,
    Granularity,
    Length,
    LinearBits,
    Model,
    Recipe,
    RecipeName,
    Restart,
    Revision,
    Scope,
    Sequences,
    Size,
    Storage,
    Widths,
    parse_size,
    parse_widths,
)


def calibrate(
    model: Model,
    data: CalibrationData = None,
    out: Annotated[Path, typer.Option(help="Where to write the factors.")] = Path("factors.json"),
    revision: Revision = None,
    recipe: Recipe = RecipeName.mcmoe,
    effort: Effort = EffortName.normal,
    codes: Codes = None,
    widths: Widths = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    activations: ActivationStorage = Storage.auto,
    device: Device = "auto",
    restart: Restart = False,
) -> None:
    """Measure every expert: how often it is used, its routing weight, and what each bit-width would cost.

    Writes factors.json, which `mcmoe allocate` reads. The same command continues a run that was interrupted or killed.

    Example: `mcmoe calibrate mixtral/ --out factors.json`
    """
    from vllm_mcmoe.calibration.model.folder import find_model
    from vllm_mcmoe.calibration.pipeline import calibrate as run

    run(
        find_model(model, revision, log),
        data,
        out,
        recipe=recipe.value,
        effort=effort.value,
        codes=codes and codes.value,
        widths=parse_widths(widths),
        sequences=sequences,
        length=length,
        activations=activations.value,
        device=device,
        restart=restart,
        log=log,
    )
    log(f"Wrote {out}. Next: mcmoe allocate {out} --bits 2.5 --out plan.json")


def allocate(
    factors: Annotated[
        Path, typer.Argument(metavar="FACTORS", help="factors.json of `mcmoe calibrate`.", show_default=False)
    ],
    bits: Bits = None,
    bits_per_layer: BitsPerLayer = None,
    size: Size = None,
    linear_bits: LinearBits = None,
    out: Annotated[Path, typer.Option(help="Where to write the plan.")] = Path("plan.json"),
    recipe: Recipe = RecipeName.mcmoe,
    widths: Widths = None,
    scope: Annotated[
        Scope | None, typer.Option(help="One budget per layer, or one for the model.", show_default="by recipe")
    ] = None,
    granularity: Annotated[
        Granularity | None,
        typer.Option(help="One width per expert, or one each for gate_up and down.", show_default="by recipe"),
    ] = None,
    budget: Annotated[
        Budget | None, typer.Option(help="Spend at most, or exactly, the bits asked for.", show_default="by recipe")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Exponent of access frequency.", show_default="by recipe")] = None,
    beta: Annotated[float | None, typer.Option(help="Exponent of routing weight.", show_default="by recipe")] = None,
    gamma: Annotated[float | None, typer.Option(help="Exponent of the error.", show_default="by recipe")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO[:STEP]",
            help="Instead of a budget, and of writing a plan: what many would bring, as a table of size and predicted "
            "KL. `1.5:3.5` or `1.5:3.5:0.1` are bits, `10GB:20GB:1GB` or `20%:40%` sizes as --size takes them. Without "
            "a step, eleven points.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Also draw the sweep into this file.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give every expert its bit-width by an exact integer program, and write plan.json; with --size, the other linears
    and the output head, too.

    Example: `mcmoe allocate factors.json --bits 2.5 --out plan.json`

    To choose a budget by looking: `mcmoe allocate factors.json --sweep 1.5:3.5` shows what each would cost in predicted
    KL to the original, before anything is quantised.
    """
    if sum(option is not None for option in (bits, bits_per_layer, size, sweep)) != 1:
        raise typer.BadParameter("give one of --bits, --bits-per-layer, --size and --sweep")
    if linear_bits is not None and size is None and sweep is None:
        raise typer.BadParameter("--linear-bits goes with --size here; with --bits, give it to `mcmoe quantize`")
    if plot is not None and sweep is None:
        raise typer.BadParameter("--plot draws a --sweep")
    size = parse_size(size)
    options = {
        "recipe": recipe.value,
        "linear_bits": linear_bits,
        "widths": parse_widths(widths),
        "scope": scope and scope.value,
        "granularity": granularity and granularity.value,
        "budget": budget and budget.value,
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
    }
    if sweep is not None:
        _sweep(factors, sweep, options, plot, as_json)
        return
    from vllm_mcmoe.calibration.allocate.program import allocate as solve
    from vllm_mcmoe.calibration.measure.factors import Factors
    from vllm_mcmoe.reporting import print_linears, print_widths

    plan = solve(Factors.load(factors), bits=bits, bits_per_layer=bits_per_layer, size=size, **options)
    plan.save(out)
    if as_json:
        print_json(json.loads(out.read_text()))
    else:
        print_widths({name: (layer["gate_up"], layer["down"]) for name, layer in plan.layers.items()})
        if plan.linears is not None:
            print_linears(plan.linears)
        log(f"Wrote {out}: {plan.average_bits:.3f} bits per expert weight. Next: mcmoe quantize MODEL OUT --plan {out}")


def _sweep(factors_path: Path, text: str, options: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    from vllm_mcmoe.calibration.allocate.ranges import parse_sweep
    from vllm_mcmoe.errors import PlanError

    try:
        budgets = parse_sweep(text)
    except PlanError as error:
        raise typer.BadParameter(str(error), param_hint="--sweep") from None
    from vllm_mcmoe.calibration.allocate.sweep import sweep
    from vllm_mcmoe.calibration.checkpoint.writer import write_text
    from vllm_mcmoe.calibration.measure.factors import Factors
    from vllm_mcmoe.calibration.report.size_chart import sweep_file
    from vllm_mcmoe.reporting import print_sweep

    factors = Factors.load(factors_path)
    points = sweep(factors, budgets, log=log, **options)
    if plot is not None:
        write_text(plot, sweep_file(points))
        log(f"Wrote {plot}.")
    if as_json:
        print_json({"model": factors.model, "points": [vars(point) for point in points]})
    else:
        by_size = "size" in budgets[0]
        print_sweep(points, by_size)
        flag = "--size" if by_size else "--bits"
        log(f"Next, with the budget you choose: mcmoe allocate {factors_path} {flag} ... --out plan.json")
