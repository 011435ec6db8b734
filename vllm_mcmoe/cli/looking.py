"""`mcmoe evaluate`, `mcmoe inspect` and `mcmoe plan-resources`: what changes nothing."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_mcmoe.cli.console import log, print_json
from vllm_mcmoe.cli.options import (
    Activations,
    AsJson,
    Data,
    Device,
    Effort,
    EffortName,
    Length,
    LinearBits,
    Recipe,
    RecipeName,
    Sequences,
    Size,
    parse_size,
)


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A model as released, or a quantised checkpoint.", show_default=False),
    ],
    data: Data,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Compare with this model: mean and quantiles of KL, top-1 agreement, perplexity ratio.",
            show_default=False,
        ),
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
    """Measure perplexity per file, bytes and average bits; with --against, also how far it is from another model.

    Example: `mcmoe evaluate mixtral-2.5bit/ --against mixtral/ --data wikitext.txt --json`
    """
    from vllm_mcmoe.calibration.evaluate.scores import evaluate as run
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


def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A quantised checkpoint, or a model as released, of which config.json is enough.",
            show_default=False,
        ),
    ],
    bits: Annotated[
        float,
        typer.Option(help="Of a model as released: bits of an expert weight to estimate the checkpoint's size for."),
    ] = 2.5,
    as_json: AsJson = False,
) -> None:
    """Show what a model directory holds.

    Of a checkpoint: the bit-width of every expert, bytes by kind of tensor, and anything wrong with the files. Of a
    model as released: whether it can be quantised, its sizes and the checkpoint's; with exit code 1 and the reason
    where it cannot. Nothing but its config.json need be downloaded for that.

    Example: `mcmoe inspect mixtral-2.5bit/`
    """
    from vllm_mcmoe.calibration.evaluate.inspection import inspect_checkpoint, inspect_model
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


def plan_resources(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A directory with the model's config.json, as released.", show_default=False
        ),
    ],
    bits: Annotated[
        float | None,
        typer.Option(help="Average bits of an expert weight, scales and zeros included.", show_default="2.5"),
    ] = None,
    size: Size = None,
    linear_bits: LinearBits = None,
    recipe: Recipe = RecipeName.mcmoe,
    effort: Effort = EffortName.normal,
    sequences: Sequences = 128,
    length: Length = 2048,
    kv_tokens: Annotated[
        int, typer.Option(help="Tokens in the KV cache while serving, of all requests together.", min=1)
    ] = 65536,
    as_json: AsJson = False,
) -> None:
    """Say what quantising and serving a model take: memory, disk, time, GPUs, vLLM's options. Reads only config.json.

    With --size, what experts can get in it, and the least and largest checkpoint there can be.

    Example: `mcmoe plan-resources deepseek-v3/ --bits 2.5`
    """
    if bits is not None and size is not None:
        raise typer.BadParameter("give one of --bits and --size")
    size = parse_size(size)
    from vllm_mcmoe.calibration.evaluate.resources import flops_per_second
    from vllm_mcmoe.calibration.evaluate.resources import plan_resources as plan
    from vllm_mcmoe.reporting import print_resources

    result = plan(
        model,
        bits=bits,
        size=size,
        linear_bits=linear_bits,
        recipe=recipe.value,
        effort=effort.value,
        sequences=sequences,
        length=length,
        kv_tokens=kv_tokens,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print_resources(result, flops_per_second())
