"""What a user sees of long steps: lines of log, and progress bars on standard error, silent where nobody watches.

with whole_run([Phase("Measuring layers", 32, 100.0), Phase("Quantising layers", 32, 300.0)], log):
    for layer in progress(layers, "Measuring layers"):   # its own bar, and what is left of both
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub.utils import tqdm
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from vllm_mcmoe.calibration.common.terminal import bars_drawn_by

Item = TypeVar("Item")

Log = Callable[[str], None]  # takes one message for the user

SPEED_PERIOD = 24 * 3600.0  # seconds over which the time left is estimated: a layer of a large model takes minutes
REPORT_EVERY = 600.0  # seconds between two lines that say how much is left, where no bars are drawn
SOONEST = 10.0  # seconds after which something can be said of it: what is begun takes longest at first

_drawn: Progress | None = None  # a terminal has room for one block of bars, to which all others add their own
_whole: "_WholeRun | None" = None


class _CountColumn(MofNCompleteColumn):
    """Items done, or of a download megabytes, or of the whole run its share."""

    def render(self, task: Task) -> Text:
        if "left" in task.fields:
            return Text(f"{task.percentage:.0f}%", style="progress.download")
        return DownloadColumn().render(task) if task.fields.get("of_bytes") else super().render(task)


class _LeftColumn(TimeRemainingColumn):
    """The time left."""

    def render(self, task: Task) -> Text:
        if "left" not in task.fields:
            return super().render(task)
        left = task.fields["left"]
        return Text("" if left is None else show_duration(left), style="progress.remaining")


def show_duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3.4 h", "5.2 days"."""
    units = ((1, "s", 100), (60, "min", 6000), (3600, "h", 48 * 3600), (86400, "days", float("inf")))
    size, unit = next((size, unit) for size, unit, limit in units if seconds < limit)
    return f"{seconds / size:.{int(size > 60)}f} {unit}"


def progress(items: Iterable[Item], description: str, *, total: int | None = None, show: bool = True) -> Iterator[Item]:
    """Yield the items, drawing a bar with their count and the time left. total: how many, of items without a length.

    Nothing is drawn when show is False or standard error is not a terminal (a log file, a pipe, CI).
    """
    count = len(items) if isinstance(items, Sized) else total
    with _bars(show) as bars:
        task = None if bars is None else bars.add_task(description, total=count)
        if _whole is not None:
            _whole.begin(description, count)
        for item in items:
            yield item
            if bars is not None:
                bars.advance(task)
            if _whole is not None:
                _whole.advance(description)


@contextmanager
def _bars(show: bool) -> Iterator[Progress | None]:
    """Those that are drawn, or new ones, as long as the block lasts; None where there are to be none."""
    global _drawn
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield None
    elif _drawn is not None:
        yield _drawn
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), _CountColumn(), _LeftColumn())
        with Progress(*columns, console=console, speed_estimate_period=SPEED_PERIOD) as bars, bars_drawn_by(console):
            _drawn = bars
            try:
                yield bars
            finally:
                _drawn = None


@dataclass(frozen=True)
class Phase:
    """A bar that a run will draw. seconds: of one item, above 0, in proportion to those of the run's other phases."""

    description: str
    items: int
    seconds: float


@contextmanager
def whole_run(phases: Sequence[Phase], log: Log, *, show: bool = True) -> Iterator[None]:
    """Within the block it is said how much is left of all these phases, which follow each other: in a bar above theirs,
    or where none are drawn in a line of log in every phase, as soon as an item of it is done, and every REPORT_EVERY
    seconds."""
    global _whole
    if not show:
        yield
        return
    with _bars(show) as bars:
        _whole = _WholeRun(phases, log, bars)
        try:
            yield
        finally:
            _whole = None


class _WholeRun:
    """What is done took as long as it took, and what is left takes as long in proportion. Items that an earlier run has
    done are in no bar, and neither done nor left."""

    def __init__(self, phases: Sequence[Phase], log: Log, bars: Progress | None):
        self._phases, self._log, self._bars = list(phases), log, bars
        self._started = self._reported = time.monotonic()
        self._current, self._item, self._items = -1, 0, 0
        self._reported_of = -1  # the phase
        self._done = 0.0
        self._task = None if bars is None else bars.add_task("In all", total=self._left, left=None)

    @property
    def _left(self) -> float:
        of_current = self._phases[self._current].seconds * (self._items - self._item) if self._current >= 0 else 0.0
        return of_current + sum(phase.items * phase.seconds for phase in self._phases[self._current + 1 :])

    def begin(self, description: str, items: int | None) -> None:
        later = range(self._current + 1, len(self._phases))
        index = next((i for i in later if self._phases[i].description == description), None)
        if index is None:  # a bar that is no phase
            return
        self._current, self._item = index, 0
        self._items = self._phases[index].items if items is None else items

    def advance(self, description: str) -> None:
        if self._current < 0 or self._phases[self._current].description != description:
            return
        self._item += 1
        self._done += self._phases[self._current].seconds
        now = time.monotonic()
        if now - self._started < SOONEST:
            return
        left = self._left * (now - self._started) / self._done
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, total=self._done + self._left, left=left)
        elif self._left > 0 and (self._reported_of < self._current or now - self._reported >= REPORT_EVERY):
            self._reported, self._reported_of = now, self._current
            self._log(f"{description}: {self._item} of {self._items}; about {show_duration(left)} left in all.")


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
