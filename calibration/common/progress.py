"""What a user sees of long steps: lines of log, and progress bars on standard error, silent where nobody watches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from huggingface_hub.utils import tqdm
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")

Log = Callable[[str], None]  # takes one message for the user

_drawn: Progress | None = None  # a terminal has room for one block of bars, to which a download adds its own


class _CountColumn(MofNCompleteColumn):
    """Items done, or of a download megabytes."""

    def render(self, task: Task) -> Text:
        return DownloadColumn().render(task) if task.fields.get("of_bytes") else super().render(task)


def progress(items: Iterable[Item], description: str, *, total: int | None = None, show: bool = True) -> Iterator[Item]:
    """Yield the items, drawing a bar with their count and the time left. total: how many, of items without a length.

    Nothing is drawn when show is False or standard error is not a terminal (a log file, a pipe, CI).
    """
    global _drawn
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), _CountColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        outer, _drawn = _drawn, _drawn if bar.disable else bar
        try:
            yield from bar.track(items, total=total, description=description)
        finally:
            _drawn = outer


def download_bar() -> type[tqdm] | None:
    """What huggingface_hub is to draw a download with: among the bars that are drawn already, None for its own."""
    return None if _drawn is None else _InnerBar


class _InnerBar(tqdm):
    """tqdm that draws nothing itself: what it counts is shown by a bar below the others, as long as it counts."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{**options, "gui": True})  # tqdm's word for bars that others draw
        self._bars = _drawn
        if not self.disable and self._bars is not None:
            self._task = self._bars.add_task(self.desc or "", total=self.total, completed=self.n, of_bytes=True)

    def display(self, *_: Any, **__: Any) -> None:
        if hasattr(self, "_task"):
            self._bars.update(self._task, total=self.total, completed=self.n)

    def clear(self, *_: Any, **__: Any) -> None:
        pass

    def close(self) -> None:
        super().close()
        if hasattr(self, "_task"):
            self._bars.remove_task(self._task)
            del self._task
