"""What a user sees of a run: bars among each other and among lines of log, and how much is left of all of it."""

import io
import re

import pytest
from rich.console import Console

from vllm_mcmoe.calibration.common import progress as progress_bars
from vllm_mcmoe.calibration.common import terminal
from vllm_mcmoe.calibration.common.progress import Phase, progress, show_duration, whole_run
from vllm_mcmoe.cli.console import log

PHASES = [Phase("Checking weights", 10, 1.0), Phase("Measuring layers", 4, 10.0), Phase("Quantising layers", 4, 40.0)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_bars, "time", clock)
    return clock


def run(clock: Clock, description: str, count: int, seconds: float) -> None:
    for _ in progress(range(count), description):
        clock.now += seconds


def test_the_time_left_is_known_from_the_first_layer_on(clock):
    """Three times as slow as the phases say, which is found out; a line in ten minutes."""
    lines: list[str] = []
    with whole_run(PHASES, lines.append):
        run(clock, "Checking weights", 10, 3.0)
        run(clock, "Measuring layers", 4, 30.0)
        run(clock, "Something else", 5, 0.0)
        run(clock, "Quantising layers", 4, 120.0)
    assert lines == [
        "Checking weights: 4 of 10; about 10 min left in all.",
        "Measuring layers: 1 of 4; about 10 min left in all.",
        "Quantising layers: 1 of 4; about 6 min left in all.",
    ]


def test_a_line_every_ten_minutes(clock):
    lines: list[str] = []
    with whole_run([Phase("Quantising layers", 40, 1.0)], lines.append):
        run(clock, "Quantising layers", 40, 120.0)
    assert len(lines) == 1 + 39 // 5  # the last layer leaves nothing to tell
    assert lines[0].endswith("1 of 40; about 78 min left in all.")


def test_what_an_earlier_run_has_done_is_not_left(clock):
    """Two of four layers are quantised already, all are measured."""
    lines: list[str] = []
    with whole_run(PHASES, lines.append):
        run(clock, "Quantising layers", 2, 100.0)
    assert lines == ["Quantising layers: 1 of 2; about 2 min left in all."]


def test_nothing_is_said_where_nothing_is_shown(clock):
    lines: list[str] = []
    with whole_run(PHASES, lines.append, show=False):
        run(clock, "Quantising layers", 2, 100.0)
    run(clock, "Quantising layers", 2, 100.0)
    assert lines == []


@pytest.fixture
def screen(monkeypatch):
    """What a terminal of 100 columns is sent."""
    screen = io.StringIO()

    def console(**options) -> Console:
        return Console(file=screen, force_terminal=True, width=100)

    monkeypatch.setattr(progress_bars, "Console", console)
    return screen


def test_a_terminal_shows_the_phase_and_the_whole(clock, screen):
    with whole_run(PHASES, print):
        run(clock, "Checking weights", 10, 3.0)
        run(clock, "Measuring layers", 4, 30.0)
        bars = {task.description: task for task in progress_bars._drawn.tasks}
        assert list(bars) == ["In all", "Checking weights", "Measuring layers"]
        assert bars["In all"].percentage == pytest.approx(100 * 50 / 210)
        assert bars["In all"].fields["left"] == pytest.approx(480.0)
    assert progress_bars._drawn is None
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"In all +\S+ +24% +8 min", text) and re.search(r"Measuring layers +\S+ +4/4", text)


def test_lines_of_log_are_printed_above_the_bars(screen, capsys):
    """By the console that draws them: another's would be overwritten."""
    before = terminal.console()
    for number in progress(range(2), "Quantising layers"):
        log(f"line {number}")
    assert terminal.console() is before
    log("afterwards")
    assert "line 0" in screen.getvalue() and "line 1" in screen.getvalue()
    assert "afterwards" not in screen.getvalue() and "line" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.6, "60 s"), (100, "2 min"), (7200, "2.0 h"), (4.5 * 86400, "4.5 days")]
)
def test_durations(seconds, shown):
    assert show_duration(seconds) == shown
