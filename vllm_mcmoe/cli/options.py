"""Options that several commands share, declared once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class RecipeName(StrEnum):
    """Named sets of choices, see calibration/recipes.py."""

    mcmoe = "mcmoe"
    paper_code = "paper-code"
    uniform = "uniform"


class EffortName(StrEnum):
    fast = "fast"
    normal = "normal"
    best = "best"


class CodesName(StrEnum):
    trellis = "trellis"
    scalar = "scalar"


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
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hugging Face model: a directory, or ORG/NAME on the hub, from where files are fetched into its cache as "
        "they are needed. Safetensors in 16 bits, FP8 in blocks, MXFP4 or packed INT4.",
        show_default=False,
    ),
]

Revision = Annotated[
    str | None,
    typer.Option(
        help="Of a MODEL on the hub: branch, tag or commit. Which commit a branch is at is asked once, and kept.",
        show_default="main",
    ),
]

Data = Annotated[
    list[Path],
    typer.Option(
        metavar="FILE...",
        help="Text files, .jsonl files with `text` or chat `messages`, or directories of them. One file is one domain: "
        "sequences are drawn evenly over the files.",
        show_default=False,
    ),
]

CalibrationData = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="FILE...",
        help="Calibration text: text files, .jsonl files with `text` or chat `messages`, or directories of them. One "
        "file is one domain: sequences are drawn evenly over the files. Left out: a built-in set of nine domains "
        "(prose, documentation, science, code, two sets of languages, chat), enough for the default --sequences and "
        "--length. Text like what the model will be used for is better.",
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
        help="Average bits of an expert weight as written, scales included, so 2-bit codes cost 2.07. "
        "(Recipes paper-code and uniform store 16-bit scales and zeros: 2.25.)",
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

Size = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Instead of --bits: what the whole checkpoint may take, its safetensors files: `13.5GB` (GB, MB: powers "
        "of ten, as disks are sold), `12.5GiB` (powers of two), or `45%` of the model in 16 bits. Attention, shared "
        "experts, dense layers and the output head then get 4, 8 or 16 bits by the same integer program as the "
        "experts get theirs; with --linear-bits they keep that width, the head 16 bits, and experts get the rest. "
        "Embeddings stay in 16 bits.",
        show_default=False,
    ),
]

Effort = Annotated[
    EffortName,
    typer.Option(
        help="How much work goes into a matrix: `best` measures every width on all rows and all of the text; `normal` "
        "on 256 rows of matrices of more than 512 and on 65,536 tokens, and on CPUs with AMX multiplies in bfloat16; "
        "`fast`, for a first look, measures on less of both, and refines less in the end, too."
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
EvaluationData = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE...",
        help="Text to score the model on, before and after; the calibration text, which flatters, if not given.",
        show_default=False,
    ),
]
Evaluate = Annotated[
    bool, typer.Option("--evaluate/--no-evaluate", help="Score the result: two more passes over the model.")
]
Codes = Annotated[
    CodesName | None,
    typer.Option(
        help="What experts of up to 4 bits are written in. `trellis`: a bit counts for several weights, and a third "
        "less is lost at the same size. `scalar`: a code of its own for each weight, quicker to find; recipes "
        "paper-code and uniform have no other.",
        show_default="by recipe; mcmoe trellis",
    ),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune/--no-tune",
        help="After quantising, adjust the norms, which stay in 16 bits, so that the model predicts again what the "
        "original does. Takes as long as four more passes of 65,536 tokens of the calibration text; changes no size. "
        "Recipes paper-code and uniform, and effort fast, do without.",
    ),
]
LinearBits = Annotated[
    int | None,
    typer.Option(
        help="Bits of attention, shared experts and dense layers: 4, 8 or 16.",
        show_default="by recipe; with --size each its own",
    ),
]


def parse_size(size: str | None) -> str | None:
    """As it was given. Raises typer.BadParameter for what is no size."""
    if size is not None:
        from vllm_mcmoe.calibration.allocate.size import parse_size as parse
        from vllm_mcmoe.errors import PlanError

        try:
            parse(size)
        except PlanError as error:
            raise typer.BadParameter(str(error), param_hint="--size") from None
    return size


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
