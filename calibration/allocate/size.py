"""Sizes of checkpoints as people give them: "13.5GB", "12GiB", "45%" of what the model takes in 16 bits."""

import math
import re

from vllm_mcmoe.errors import PlanError

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%|[A-Za-z]+)\s*")


def parse_size(text: str) -> tuple[float, str]:
    """ "13.5GB" -> (13.5, "GB"), "45%" -> (45.0, "%"). Raises PlanError for anything else."""
    match = _SIZE.fullmatch(text)
    unit = match[2].upper() if match else ""
    if unit not in (*UNITS, "%") or not float(match[1]):
        raise PlanError(
            f"{text!r} is not a size like 13.5GB (10^9 bytes, as disks are sold), 12.5GiB (2^30), 800MB or 45% (of the "
            "model in 16 bits)"
        )
    return float(match[1]), unit


def size_in_bytes(size: str | int, original: int) -> int:
    """size: text as above, or bytes. original: bytes of the model in 16 bits."""
    if isinstance(size, int):
        return size
    amount, unit = parse_size(size)
    return math.floor(amount * original / 100 if unit == "%" else amount * UNITS[unit])


def show_size(nbytes: int) -> str:
    """For people."""
    short, exact = short_size(nbytes), f"{nbytes:,} bytes"
    return exact if short == exact else f"{short} ({exact})"


def short_size(nbytes: int) -> str:
    """The same to four digits."""
    size, unit = unit_for(nbytes)
    return f"{nbytes:,} bytes" if size == 1 else f"{nbytes / size:.4g} {unit}"


def unit_for(nbytes: int) -> tuple[int, str]:
    """The largest unit that this is one of at least: its bytes and its name."""
    return next(
        ((UNITS[unit.upper()], unit) for unit in ("GB", "MB", "kB") if nbytes >= UNITS[unit.upper()]), (1, "bytes")
    )
