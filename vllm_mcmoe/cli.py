"""The `mcmoe` command: one subcommand per arrow of

    model --calibrate--> factors.json --allocate--> plan.json --quantize--> checkpoint --serve--> vLLM

Exit codes: 0 success, 1 an error this program explains (bad input, unsupported model), 2 wrong usage.
Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vllm_mcmoe.errors import McmoeError

app = typer.Typer(
    name="mcmoe",
    help="Quantise mixture-of-experts models to 1.5-3 bits, every expert with its own bit-width, for vLLM.\n\n"
    "Most people need one command: `mcmoe quantize MODEL OUT --bits 2.5 --data TEXT`, then `vllm serve OUT`. "
    "`calibrate` and `allocate` are its first two steps, to look at or change what lies between.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
messages = Console(stderr=True)  # everything but results; stdout is for what a program might read


class RecipeName(StrEnum):
    """Named sets of choices, see calibration/recipes.py."""

    mcmoe = "mcmoe"
    paper_code = "paper-code"
    uniform = "uniform"


class Scope(StrEnum):
    layer = "layer"
    model = "model"


class Granularity(StrEnum):
    expert = "expert"
    projection = "projection"


class Budget(StrEnum):
    at_most = "<="
    exactly = "="


class PruningMethod(StrEnum):
    odp = "odp"
    otp = "otp"


class Storage(StrEnum):
    auto = "auto"
    memory = "memory"
    disk = "disk"


class Activations(StrEnum):
    floating = "float"
    int8 = "int8"


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Hugging Face model directory, 16-bit safetensors.", show_default=False)
]
Data = Annotated[
    list[Path],
    typer.Option(
        metavar="FILE...",
        help="Text files, .jsonl files with a `text` field, or directories of them. One file is one domain: "
        "sequences are drawn evenly over the files.",
        show_default=False,
    ),
]
Sequences = Annotated[int, typer.Option(min=1, help="Token sequences to draw; fewer if the data has no more.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per sequence; shortened to what model and data have.")]
Recipe = Annotated[
    RecipeName,
    typer.Option(
        help="`mcmoe`: predicted loss increase, one budget for the whole model, GPTQ with refinement. "
        "`paper-code`: what the authors of MC-MoE published. `uniform`: the same width everywhere."
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Average bits of an expert weight as written: a group's scale and zero included, "
        "so 2-bit codes cost 2.25 and 1-bit codes 1.125.",
        show_default=False,
    ),
]
BitsPerLayer = Annotated[
    int | None,
    typer.Option(
        help="Instead of --bits: the sum of plain code widths over a layer's experts, as the paper counts "
        "(Mixtral at 20 is its '2.54 bits').",
        show_default=False,
    ),
]
Widths = Annotated[
    str | None, typer.Option(help="Bit-widths an expert may get, for example 1,2,3.", show_default="by recipe")
]
ActivationStorage = Annotated[
    Storage,
    typer.Option(
        help="Where hidden states and gradients of the calibration tokens are kept: `memory`, `disk` (beside OUT, "
        "deleted in the end), or `auto`: memory if they fit there with two layers and 2 GB to spare. "
        "The result is the same."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="What computes: `cpu`, `cuda`, `cuda:N`, or `auto`: a GPU (NVIDIA, or AMD with torch's ROCm build) if "
        "torch finds one, `cpu` else. A GPU holds one decoder layer in float32; hidden states stay where "
        "--activations says. It rounds differently: unfinished work is continued on the kind of device it began on. "
        "How long things take on a GPU has not been measured.",
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an unfinished run has left in OUT.partial.")]
Method = Annotated[
    PruningMethod,
    typer.Option(
        help="`odp`: drop experts whose routing weight is a small part of the token's largest. `otp`: drop those a "
        "small router, trained on the calibration text, predicts to cost least."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")]


def parse_widths(widths: str | None) -> tuple[int, ...] | None:
    """ "1,2,3" -> (1, 2, 3). Raises typer.BadParameter for anything but a list of widths the format has."""
    if widths is None:
        return None
    from vllm_mcmoe.kernels.packing import WIDTHS

    try:
        parsed = tuple(sorted({int(width) for width in widths.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{widths!r} is not a list of numbers like 1,2,3", param_hint="--widths") from None
    unknown = [width for width in parsed if width not in WIDTHS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is not one of {WIDTHS}", param_hint="--widths")
    return parsed


def print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


@app.command()
def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Where to write the factors.")] = Path("factors.json"),
    recipe: Recipe = RecipeName.mcmoe,
    widths: Widths = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    activations: ActivationStorage = Storage.auto,
    device: Device = "auto",
    restart: Restart = False,
) -> None:
    """Measure every expert: how often it is used, its routing weight, and what each bit-width would cost.

    Writes factors.json, which `mcmoe allocate` reads. The same command continues a run that was interrupted or killed.

    Example: `mcmoe calibrate mixtral/ --data c4.jsonl --out factors.json`
    """
    from vllm_mcmoe.calibration.statistics import calibrate as run

    run(
        model,
        data,
        out,
        recipe=recipe.value,
        widths=parse_widths(widths),
        sequences=sequences,
        length=length,
        activations=activations.value,
        device=device,
        restart=restart,
        log=log,
    )
    log(f"Wrote {out}. Next: mcmoe allocate {out} --bits 2.5 --out plan.json")


@app.command()
def allocate(
    factors: Annotated[
        Path, typer.Argument(metavar="FACTORS", help="factors.json of `mcmoe calibrate`.", show_default=False)
    ],
    bits: Bits = None,
    bits_per_layer: BitsPerLayer = None,
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
    as_json: AsJson = False,
) -> None:
    """Give every expert its bit-width by an exact integer program, and write plan.json.

    Example: `mcmoe allocate factors.json --bits 2.5 --out plan.json`
    """
    if (bits is None) == (bits_per_layer is None):
        raise typer.BadParameter("give one of --bits and --bits-per-layer")
    allowed_widths = parse_widths(widths)
    from vllm_mcmoe.calibration.allocation import allocate as solve
    from vllm_mcmoe.calibration.artifacts import Factors
    from vllm_mcmoe.reporting import print_widths

    plan = solve(
        Factors.load(factors),
        recipe=recipe.value,
        bits=bits,
        bits_per_layer=bits_per_layer,
        widths=allowed_widths,
        scope=scope and scope.value,
        granularity=granularity and granularity.value,
        budget=budget and budget.value,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
    )
    plan.save(out)
    if as_json:
        print_json(json.loads(out.read_text()))
    else:
        print_widths({name: (layer["gate_up"], layer["down"]) for name, layer in plan.layers.items()})
        log(f"Wrote {out}: {plan.average_bits:.3f} bits per expert weight. Next: mcmoe quantize MODEL OUT --plan {out}")


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.", show_default=False)],
    data: Data,
    bits: Bits = None,
    bits_per_layer: BitsPerLayer = None,
    plan: Annotated[
        Path | None, typer.Option(help="Use this plan.json instead of measuring and allocating.", show_default=False)
    ] = None,
    factors: Annotated[
        Path | None, typer.Option(help="Use this factors.json instead of measuring again.", show_default=False)
    ] = None,
    recipe: Recipe = RecipeName.mcmoe,
    widths: Widths = None,
    linear_bits: Annotated[
        int | None,
        typer.Option(help="Bits of attention and shared experts: 4, 8 or 16.", show_default="by recipe"),
    ] = None,
    evaluation_data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...",
            help="Text to score original and checkpoint on, for the model card; the calibration text if not given.",
            show_default=False,
        ),
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Score the result, which runs both models once more.")
    ] = True,
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

    Example: `mcmoe quantize mixtral/ mixtral-2.5bit/ --bits 2.5 --data c4.jsonl`
    """
    if sum(option is not None for option in (bits, bits_per_layer, plan)) != 1:
        raise typer.BadParameter("give one of --bits, --bits-per-layer and --plan")
    from vllm_mcmoe.calibration.artifacts import Factors, Plan
    from vllm_mcmoe.calibration.device import choose_device
    from vllm_mcmoe.calibration.models import describe_model
    from vllm_mcmoe.calibration.pipeline import quantize as run
    from vllm_mcmoe.calibration.pruning.prune import prune as add_pruning
    from vllm_mcmoe.calibration.pruning.rules import check_request

    chosen = choose_device(device, log)
    if prune_target is not None:
        check_request(prune_method.value, prune_target, describe_model(model))
    run(
        model,
        out,
        data,
        plan=Plan.load(plan) if plan else None,
        factors=Factors.load(factors) if factors else None,
        bits=bits,
        bits_per_layer=bits_per_layer,
        recipe=recipe.value,
        widths=parse_widths(widths),
        linear_bits=linear_bits,
        sequences=sequences,
        length=length,
        evaluation_data=(evaluation_data or data) if evaluation else None,
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


@app.command()
def prune(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A quantised checkpoint; changed in place.", show_default=False)
    ],
    data: Data,
    method: Method = PruningMethod.otp,
    target: Annotated[float, typer.Option(help="Fraction of expert activations to drop when served.")] = 0.25,
    evaluation_data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...",
            help="Text to measure perplexity and KL on, unpruned and at the target; the calibration text if not given.",
            show_default=False,
        ),
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure the result, two passes over the model.")
    ] = True,
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

    Example: `mcmoe prune mixtral-2.5bit/ --target 0.25 --data c4.jsonl`
    """
    from vllm_mcmoe.calibration.pruning.prune import prune as run
    from vllm_mcmoe.reporting import print_pruning

    points = run(
        checkpoint,
        data,
        method=method.value,
        target=target,
        evaluation_data=(evaluation_data or data) if evaluation else None,
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


@app.command()
def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A 16-bit model or a quantised checkpoint.", show_default=False)
    ],
    data: Data,
    against: Annotated[
        Path | None,
        typer.Option(help="Compare with this model: mean KL divergence and top-1 agreement.", show_default=False),
    ] = None,
    activations: Annotated[
        Activations, typer.Option(help="Expert activations of a checkpoint: `int8` as the kernels compute, or `float`.")
    ] = Activations.int8,
    pruning: Annotated[
        str, typer.Option(metavar="off|on|TARGET", help="Online pruning of a checkpoint that has a rule.")
    ] = "on",
    sequences: Sequences = 128,
    length: Length = 2048,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity per file, bytes and average bits; with --against, also KL and top-1 agreement.

    Example: `mcmoe evaluate mixtral-2.5bit/ --against mixtral/ --data wikitext.txt --json`
    """
    from vllm_mcmoe.calibration.evaluate import evaluate as run
    from vllm_mcmoe.reporting import print_evaluation

    result = run(
        model,
        data,
        against=against,
        activations=activations.value,
        pruning=pruning,
        sequences=sequences,
        length=length,
        device=device,
        log=log,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print_evaluation(result)


@app.command()
def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A quantised checkpoint, or a 16-bit model, of which config.json is enough.",
            show_default=False,
        ),
    ],
    bits: Annotated[
        float, typer.Option(help="Of a 16-bit model: bits of an expert weight to estimate the checkpoint's size for.")
    ] = 2.5,
    as_json: AsJson = False,
) -> None:
    """Show what a model directory holds.

    Of a checkpoint: the bit-width of every expert, bytes by kind of tensor, and anything wrong with the files. Of a
    16-bit model: whether it can be quantised, its sizes and the checkpoint's; with exit code 1 and the reason where it
    cannot. Nothing but its config.json need be downloaded for that.

    Example: `mcmoe inspect mixtral-2.5bit/`
    """
    from vllm_mcmoe.calibration.inspection import inspect_checkpoint, inspect_model
    from vllm_mcmoe.checkpoint import is_mcmoe_checkpoint
    from vllm_mcmoe.reporting import print_model, print_summary

    quantised = is_mcmoe_checkpoint(model)
    summary = inspect_checkpoint(model) if quantised else inspect_model(model, bits)
    if as_json:
        print_json(summary.to_dict())
    elif quantised:
        print_summary(model, summary)
    else:
        print_model(model, summary)


@app.command()
def plan_resources(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A directory with the 16-bit model's config.json.", show_default=False),
    ],
    bits: Annotated[float, typer.Option(help="Average bits of an expert weight, scales and zeros included.")] = 2.5,
    linear_bits: Annotated[
        int | None, typer.Option(help="Bits of attention and shared experts: 4, 8 or 16.", show_default="by recipe")
    ] = None,
    recipe: Recipe = RecipeName.mcmoe,
    sequences: Sequences = 128,
    length: Length = 2048,
    kv_tokens: Annotated[
        int, typer.Option(help="Tokens in the KV cache while serving, of all requests together.", min=1)
    ] = 65536,
    as_json: AsJson = False,
) -> None:
    """Say what quantising and serving a model take: memory, disk, time, GPUs, vLLM's options. Reads only config.json.

    Example: `mcmoe plan-resources deepseek-v3/ --bits 2.5`
    """
    from vllm_mcmoe.calibration.resources import flops_per_second
    from vllm_mcmoe.calibration.resources import plan_resources as plan
    from vllm_mcmoe.reporting import print_resources

    result = plan(
        model,
        bits=bits,
        linear_bits=linear_bits,
        recipe=recipe.value,
        sequences=sequences,
        length=length,
        kv_tokens=kv_tokens,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print_resources(result, flops_per_second())


@app.command()
def demo(
    bits: Annotated[float, typer.Option(help="Average bits of an expert weight, scales and zeros included.")] = 2.5,
    out: Annotated[Path, typer.Option(help="Where the quantised model and the logs go.")] = Path("build/demo"),
) -> None:
    """Quantise the embedded reference model, serve it with vLLM, and compare it with the original.

    Runs from a source checkout, needs vLLM, takes a few minutes on two cores.
    """
    from vllm_mcmoe.demo import run

    run(bits, out)


def log(message: str) -> None:
    messages.print(message, highlight=False, markup=False)


def spread_file_options(arguments: list[str]) -> list[str]:
    """`--data A B` -> `--data A --data B`: click's options take one value, shells expand globs to many."""
    spread: list[str] = []
    option = None
    for position, argument in enumerate(arguments):
        if argument.startswith("-"):
            option = argument if argument in ("--data", "--evaluation-data") else None
        elif option and arguments[position - 1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def main() -> None:
    """Console script `mcmoe`."""
    try:
        app(args=spread_file_options(sys.argv[1:]))
    except (McmoeError, OSError) as error:  # OSError: a file that cannot be read or written; it names the file
        messages.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
