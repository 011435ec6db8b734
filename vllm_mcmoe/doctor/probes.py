"""Imports that may fail, crash or hang, each in a process of its own.

The process prints what it found as JSON behind a mark, since libraries print, too.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

SECONDS = 180.0  # an import that takes as long hangs; vLLM's takes 8 s on two cores, a minute from a cold disk
_MARK = "mcmoe-probe:"
# Not by -m: runpy would warn on stderr that the package has imported this module, which reads like a last word
_PROGRAM = "from vllm_mcmoe.doctor.probes import main; main()"


@dataclass(frozen=True)
class Probe:
    """What a process found, or why it did not."""

    found: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def run_probe(name: str) -> Probe:
    """Run one of PROBES in a process of its own, with this process's interpreter and environment."""
    command = [sys.executable, "-P", "-c", _PROGRAM, name]  # -P: not from the working directory
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Probe(error=f"not done after {SECONDS:.0f} s")
    for line in process.stdout.splitlines():
        if line.startswith(_MARK):
            return Probe(**json.loads(line.removeprefix(_MARK)))
    if process.returncode < 0:
        return Probe(error=f"killed by {signal.Signals(-process.returncode).name}")
    last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    return Probe(error=last.strip())


def _version(module: str) -> dict[str, Any]:
    return {"version": import_module(module).__version__}


def _torch() -> dict[str, Any]:
    """cuda, hip: versions that this build of torch is for, or None."""
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}


def _cpu() -> dict[str, Any]:
    """The kernels' instruction sets, best first, and the one they would use, or why it cannot be had."""
    from vllm_mcmoe.kernels.cpu import available_isas, select_isa

    found = {"available": list(available_isas())}
    try:
        return {**found, "selected": select_isa()}
    except ValueError as error:
        return {**found, "selected": None, "refused": str(error)}


def _gpus() -> dict[str, Any]:
    """The GPUs that torch sees, with bytes of memory, and why the kernels do not run on one, or ""."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        capability = architecture or f"compute capability {properties.major}.{properties.minor}"
        refused = _why_not_on(torch.device("cuda", index))
        devices.append(
            {"name": properties.name, "capability": capability, "free": free, "total": total, "refused": refused}
        )
    return {"devices": devices}


def _why_not_on(device: Any) -> str:
    from vllm_mcmoe.kernels.triton.experts import check_device

    try:
        check_device(device)
    except ValueError as error:
        return str(error)
    return ""


def _vllm() -> dict[str, Any]:
    """vLLM with the plugin registered in it, as `vllm serve` does."""
    import vllm_mcmoe
    from vllm_mcmoe.vllm_versions import installed_version

    version = installed_version()
    vllm_mcmoe.register()
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.platforms import current_platform

    from vllm_mcmoe.checkpoint import QUANT_METHOD
    from vllm_mcmoe.start_cache import CACHE_VARIABLE, RESERVE_BYTES, cache_root

    root = cache_root()
    return {
        "version": version,
        "platform": current_platform.device_type,
        "registered": QUANT_METHOD in QUANTIZATION_METHODS,
        "cache": None if root is None else str(root),
        "cache_variable": CACHE_VARIABLE,
        "cache_reserve": RESERVE_BYTES,
    }


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _torch,
    "torchvision": lambda: _version("torchvision"),
    "triton": lambda: _version("triton"),
    "cpu": _cpu,
    "gpus": _gpus,
    "vllm": _vllm,
}


def main() -> None:
    try:
        result = {"found": PROBES[sys.argv[1]]()}
    except Exception as error:  # whatever an import may raise is what is asked for
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(f"\n{_MARK}{json.dumps(result)}", flush=True)
