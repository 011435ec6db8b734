"""What libraries in C print, kept off standard output, which is for what a program might read."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_STDOUT, _STDERR = 1, 2


@contextmanager
def native_output_on_stderr() -> Iterator[None]:
    """Until the block ends, the process's standard output is its standard error, for libraries that do not go through
    sys.stdout, too. What other threads print meanwhile goes there as well."""
    try:
        kept = os.dup(_STDOUT)
    except OSError:  # a daemon has closed it
        yield
        return
    _flush()
    try:
        os.dup2(_STDERR, _STDOUT)
        yield
    finally:
        _flush()
        os.dup2(kept, _STDOUT)
        os.close(kept)


def _flush() -> None:
    """Python's buffer and C's: what is in them belongs to where the descriptor leads now."""
    if sys.stdout is not None:
        sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)
