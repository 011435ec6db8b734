"""How much memory there is, and how much this process has used."""

import os
import resource
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # of version 2, as seen from inside a container


def available_memory() -> int:
    """Bytes that can be taken without swapping, inside the container's limit where there is one."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux: all of the machine's memory is the best that is known
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        return min(available, limit - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # not in a container, or "max": no limit
        return available


def peak_resident_bytes() -> int:
    """The most memory this process has had resident at any time."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # Not getrusage: its figure is inherited from the parent process and may be the parent's.
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
