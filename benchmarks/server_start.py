"""What a vLLM server's start is made of, from the times in its log, and what its processes hold in memory."""

import contextlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

# Parts of a start in order, each with the log line that ends it; the last ends when the server answers.
PARTS = (
    ("processes, imports, configuration", "Starting to load model"),
    ("building the layers; cached experts are mapped", "Initializing model took"),
    ("reading the checkpoint", "Loading weights took"),
    ("repacking linears, and experts that were not cached", "Warming up model"),
    ("torch.compile and one pass of --max-num-batched-tokens", "Warming up done"),
    ("KV cache, API server", None),
)
_TIME = re.compile(r"\b(\d\d-\d\d \d\d:\d\d:\d\d) \[")
_EXPERTS = re.compile(r"Experts of \d+ MoE layers, .*? took ([\d.]+) s: [^.]*\.")


@dataclass
class Start:
    """seconds   until the server answered
    parts     seconds of each, by vLLM's log, which has whole seconds; a part that it does not mention is in the next
    experts   the plugin's own line
    """

    seconds: float
    parts: dict[str, float]
    experts: str
    experts_seconds: float


def read_start(log_file: Path, began: float, ready: float) -> Start:
    """began, ready: seconds since the epoch at which the server's process was started, and at which it answered."""
    log = log_file.read_text(errors="replace")
    parts, previous = {}, began
    for name, last_line in PARTS:
        end = ready if last_line is None else _time_of(log, last_line, began)
        if end is not None:
            parts[name] = max(0.0, end - previous)
            previous = end
    experts = _EXPERTS.search(log)
    if experts is None:
        raise RuntimeError(f"{log_file}: no line says how the experts were loaded")
    return Start(ready - began, parts, experts.group(), float(experts.group(1)))


def _time_of(log: str, text: str, began: float) -> float | None:
    line = next((line for line in log.splitlines() if text in line), None)
    found = line and _TIME.search(line)
    if not found:
        return None
    year = datetime.fromtimestamp(began).year
    return datetime.strptime(f"{year}-{found.group(1)}", "%Y-%m-%d %H:%M:%S").timestamp()


@dataclass
class Memory:
    """Bytes of this process's descendants: private, and in mapped files, whose pages other processes may share.

    A page that several of them share is counted once. peak: of what was resident, shared pages more than once.
    """

    private: int
    files: int
    peak: int


def read_memory() -> Memory:
    private = files = peak = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):  # it has just ended
            sizes = _kilobytes(Path(f"/proc/{process.pid}/smaps_rollup"))
            private += sizes["Pss_Anon"]
            files += sizes["Pss_File"] + sizes["Pss_Shmem"]
            peak += _kilobytes(Path(f"/proc/{process.pid}/status")).get("VmHWM", 0)
    return Memory(*(1024 * size for size in (private, files, peak)))


def _kilobytes(file: Path) -> dict[str, int]:
    return {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", file.read_text(), re.MULTILINE)}
