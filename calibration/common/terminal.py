"""Standard error, which messages and progress bars share."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

messages = Console(stderr=True)
_with_bars: Console | None = None


def console() -> Console:
    """Where messages go. While bars are drawn that is what draws them: it prints above them, where another console's
    lines would be overwritten."""
    return messages if _with_bars is None else _with_bars


@contextmanager
def bars_drawn_by(drawing: Console) -> Iterator[None]:
    """Holds while they are."""
    global _with_bars
    _with_bars = drawing
    try:
        yield
    finally:
        _with_bars = None
