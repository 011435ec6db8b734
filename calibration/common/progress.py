"""What a user sees of long steps: lines of log, and progress bars on standard error, silent where nobody watches."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

Log = Callable[[str], None]  # takes one message for the user


def progress(items: Sequence[Item], description: str, *, show: bool = True) -> Iterator[Item]:
    """Yield the items, drawing a bar with their count and the time left.

    Nothing is drawn when show is False or standard error is not a terminal (a log file, a pipe, CI).
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        yield from bar.track(items, description=description)
