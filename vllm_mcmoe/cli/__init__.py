"""The `mcmoe` command: one subcommand per arrow of

    model --calibrate--> factors.json --allocate--> plan.json --quantize--> checkpoint --serve--> vLLM

Exit codes: 0 success, 1 an error this program explains (bad input, unsupported model), 2 wrong usage.
Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import sys

import typer
from rich.markup import escape

from vllm_mcmoe.cli.console import messages
from vllm_mcmoe.cli.demonstration import demo
from vllm_mcmoe.cli.doctoring import doctor
from vllm_mcmoe.cli.looking import evaluate, inspect, plan_resources, report
from vllm_mcmoe.cli.measuring import allocate, calibrate
from vllm_mcmoe.cli.pushing import push
from vllm_mcmoe.cli.quantizing import prune, quantize
from vllm_mcmoe.errors import McmoeError

app = typer.Typer(
    name="mcmoe",
    help="Quantise mixture-of-experts models to 1.5-3 bits, every expert with its own bit-width, for vLLM.\n\n"
    "Most people need one command: `mcmoe quantize MODEL OUT --bits 2.5`, then `vllm serve OUT`. "
    "`calibrate` and `allocate` are its first two steps, to look at or change what lies between.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    calibrate,
    allocate,
    quantize,
    prune,
    evaluate,
    inspect,
    report,
    plan_resources,
    push,
    demo,
    doctor,
):
    app.command()(command)


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
