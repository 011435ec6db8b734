"""`mcmoe evaluate`, `mcmoe inspect`, `mcmoe report` and `mcmoe plan-resources`: what changes no model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_mcmoe.cli.console import log, print_json
from vllm_mcmoe.cli.options import (
    Activations,
    AsJson,
    Codes,
    Data,
    Device,
    Effort,
    EffortName,
    Length,
    LinearBits,
    Recipe,
    RecipeName,
    Revision,
    Sequences,
    Size,
    Tune,
    parse_size,
)

if TYPE_CHECKING:
    from vllm_mcmoe.calibration.model.folder import ModelFolder


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model as released or a quantised checkpoint: a directory, or ORG/NAME on the hub. Or the address "
            "of a server that has one, http://HOST:PORT/v1: `vllm serve` gives the logprobs of prompts that this "
            "needs.",
            show_default=False,
        ),
    ],
    data: Data,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare with this model, a directory, a name on the hub or an address: mean and quantiles of KL, "
            "top-1 agreement, perplexity ratio.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    against_revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="The same of --against.", show_default="main")
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="The server's name of MODEL.", show_default="the only one"),
    ] = None,
    against_served_name: Annotated[
        str | None,
        typer.Option("--against-model", metavar="NAME", help="The same of --against.", show_default="the only one"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_API_KEY", help="What the server asks for, if it does.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ORG/NAME",
            help="Where the served model's tokenizer is, where neither --against nor the server names a directory.",
            show_default=False,
        ),
    ] = None,
    top_logprobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Likeliest tokens to ask a server for. KL over them, all others taken as one, is a lower bound. All "
            "tokens need `vllm serve --max-logprobs -1` and 60 bytes per token and vocabulary entry.",
            show_default="all where the server gives them and answers stay below 600 MB, else 20 or what it gives",
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

    A served one: `mcmoe evaluate http://localhost:8000/v1 --against mixtral/ --data wikitext.txt`
    """
    from vllm_mcmoe.calibration.evaluate.scores import evaluate as evaluate_local
    from vllm_mcmoe.calibration.evaluate.served import evaluate_served, is_endpoint
    from vllm_mcmoe.reporting import print_evaluation

    of_server = {
        "served_name": served_name,
        "against_served_name": against_served_name,
        "tokenizer": tokenizer,
        "top_logprobs": top_logprobs,
    }
    served = is_endpoint(model) or (against is not None and is_endpoint(against))
    if not served and any(value is not None for value in of_server.values()):
        raise typer.BadParameter("--model, --against-model, --tokenizer and --top-logprobs are for a server's address")
    subject = _find_unless_served(model, revision, "--revision")
    options = {
        "against": _find_unless_served(against, against_revision, "--against-revision"),
        "activations": activations.value,
        "pruning": pruning,
        "sequences": sequences,
        "length": length,
        "device": device,
        "log": log,
    }
    if served:
        result = evaluate_served(subject, data, **options, **of_server, api_key=api_key)
    else:
        result = evaluate_local(subject, data, **options)
    if as_json:
        print_json(result.to_dict())
    else:
        print_evaluation(result)


def _find_unless_served(model: str | None, revision: str | None, option: str) -> "str | ModelFolder | None":
    from vllm_mcmoe.calibration.evaluate.served import is_endpoint
    from vllm_mcmoe.calibration.model.folder import find_model

    if model is not None and not is_endpoint(model):
        return find_model(model, revision, log)
    if revision is not None:
        raise typer.BadParameter("goes with a name on the hub", param_hint=option)
    return model


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A quantised checkpoint, or a model as released, of which config.json is enough: a directory, or "
            "ORG/NAME on the hub.",
            show_default=False,
        ),
    ],
    revision: Revision = None,
    bits: Annotated[
        float,
        typer.Option(help="Of a model as released: bits of an expert weight to estimate the checkpoint's size for."),
    ] = 2.5,
    as_json: AsJson = False,
) -> None:
    """Show what a model holds.

    Of a checkpoint: the bit-width of every expert, bytes by kind of tensor, and anything wrong with the files. Of a
    model as released: whether it can be quantised, its sizes and the checkpoint's; with exit code 1 and the reason
    where it cannot. Of a model on the hub, config.json and the headers of its safetensors files are fetched, a few
    megabytes, and no weights.

    Example: `mcmoe inspect Qwen/Qwen3-30B-A3B`
    """
    from vllm_mcmoe.calibration.evaluate.inspection import inspect_checkpoint, inspect_model
    from vllm_mcmoe.calibration.model.folder import find_model
    from vllm_mcmoe.checkpoint import is_mcmoe_checkpoint
    from vllm_mcmoe.reporting import print_model, print_summary

    folder = find_model(model, revision, log)
    quantised = is_mcmoe_checkpoint(folder.path)
    summary = inspect_checkpoint(folder) if quantised else inspect_model(folder, bits)
    if as_json:
        print_json(summary.to_dict())
    elif quantised:
        print_summary(folder.given, summary)
    else:
        print_model(folder.given, summary)


def report(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A quantised checkpoint, of which its JSON files are enough: no weights are read.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Where to write the page.", show_default="CHECKPOINT/report.html"),
    ] = None,
) -> None:
    """Draw what is in a checkpoint, as one HTML page that needs nothing but itself.

    The bit-width of every expert, the loss against size with what a bit more or less of it would bring, the loss of
    every layer at each width, how often each expert was used, and what online pruning costs; with the numbers in
    tables. What the checkpoint does not hold is said on the page. Pictures for a model card are written beside it:
    expert_widths.svg, and size_and_quality.svg. With 58 layers of 256 experts it takes some 15 seconds.

    Example: `mcmoe report mixtral-2.5bit/`
    """
    from vllm_mcmoe.calibration.report.page import write_report

    files, missing = write_report(checkpoint, out)
    for line in missing:
        log(line)
    log(f"Wrote {', '.join(map(str, files))}. In a model card: ![Bit-widths]({files[1].name})")


def plan_resources(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model as released: a directory with its config.json, or ORG/NAME on the hub.",
            show_default=False,
        ),
    ],
    revision: Revision = None,
    bits: Annotated[
        float | None,
        typer.Option(help="Average bits of an expert weight, scales and zeros included.", show_default="2.5"),
    ] = None,
    size: Size = None,
    linear_bits: LinearBits = None,
    recipe: Recipe = RecipeName.mcmoe,
    effort: Effort = EffortName.normal,
    codes: Codes = None,
    tune: Tune = True,
    sequences: Sequences = 128,
    length: Length = 2048,
    kv_tokens: Annotated[
        int, typer.Option(help="Tokens in the KV cache while serving, of all requests together.", min=1)
    ] = 65536,
    as_json: AsJson = False,
) -> None:
    """Say what quantising and serving a model take: memory, disk, time, GPUs, vLLM's options. Reads only config.json.

    Times are of this machine's CPU, at every --effort, from a test of some seconds: let nothing else run beside it.
    With --size, what experts can get in it, and the least and largest checkpoint there can be.

    Example: `mcmoe plan-resources deepseek-ai/DeepSeek-V3 --bits 2.5`
    """
    if bits is not None and size is not None:
        raise typer.BadParameter("give one of --bits and --size")
    size = parse_size(size)
    from vllm_mcmoe.calibration.evaluate.resources import plan_resources as plan
    from vllm_mcmoe.calibration.evaluate.times import predict_times
    from vllm_mcmoe.calibration.model.folder import find_model
    from vllm_mcmoe.reporting import print_resources

    folder = find_model(model, revision, log)
    options = {"linear_bits": linear_bits, "recipe": recipe.value, "tuned": tune}
    options |= {"sequences": sequences, "length": length, "codes": codes and codes.value}
    result = plan(folder, bits=bits, size=size, effort=effort.value, kv_tokens=kv_tokens, **options)
    times = predict_times(folder, log=log, **options)
    if as_json:
        print_json({**result.to_dict(), "seconds": times})
    else:
        print_resources(result, times, effort.value)
