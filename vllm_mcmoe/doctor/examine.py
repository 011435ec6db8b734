"""All checks of this environment, in the order in which a reader wants them."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import vllm_mcmoe
from vllm_mcmoe.calibration.common.memory import available_memory
from vllm_mcmoe.doctor.check import Check, Status, note, ok, problem
from vllm_mcmoe.doctor.faults import CPU_BUILD, TORCHVISION, VLLM, installed_version, name_fault, torchvision_fault
from vllm_mcmoe.doctor.probes import Probe, run_probe
from vllm_mcmoe.errors import InstallationError
from vllm_mcmoe.vllm_versions import TESTED, is_tested

PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "mcmoe"
MEND = "Run `mcmoe doctor --mend`."
INSTALL_VLLM = (
    "Install vllm-mcmoe with its extra for this machine, vllm-mcmoe[cpu] or vllm-mcmoe[gpu] (README, Install), into "
    "the environment that `mcmoe` is in."
)
PLATFORMS = ("cpu", "cuda")  # vLLM's names; ROCm is "cuda", too
LITTLE_MEMORY = 4_000_000_000  # the server of the demo, whose model has 9 MB, takes 1.9 GB
RESOURCES = "What a model takes: mcmoe plan-resources MODEL"
GB = 1e9


def examine() -> list[Check]:
    """Takes some ten seconds, in which vLLM is imported. What could not be looked at is left out."""
    with ThreadPoolExecutor() as pool:
        pending = [pool.submit(run_probe, name) for name in ("torch", "vllm", "cpu")]
        pending_torchvision = pool.submit(torchvision_fault)
        torch, vllm, cpu = (future.result() for future in pending)
        wrong_name, wrong_build = name_fault(), pending_torchvision.result()
    for_gpus = bool(torch.found.get("cuda") or torch.found.get("hip"))
    gpus, triton = (run_probe(name) if for_gpus else Probe() for name in ("gpus", "triton"))
    serves_on = vllm.found.get("platform")
    return [
        _python(),
        _torch(torch),
        _torchvision(torch, wrong_build),
        *_vllm(vllm, wrong_name, wrong_build),
        _cpu(cpu, serves_on),
        *_gpus(gpus, torch, triton, serves_on),
        _compiler(serves_on),
        _memory(),
        *_disk(vllm),
        *_variables(),
    ]


def require_serving() -> None:
    """Raises InstallationError with what keeps this environment from serving, and what to do about it."""
    problems = [check for check in examine() if check.status is Status.problem]
    if problems:
        lines = "\n".join(f"  {check.name}: {check.found}. {check.advice}" for check in problems)
        raise InstallationError(f"this environment cannot serve:\n{lines}\n`mcmoe doctor` says more.")


def _python() -> Check:
    return ok(
        "Python",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}; "
        f"vllm-mcmoe {vllm_mcmoe.__version__}",
    )


def _torch(torch: Probe) -> Check:
    if torch.error:
        return problem("torch", f"does not import: {torch.error}", INSTALL_VLLM)
    return ok("torch", f"{torch.found['version']}, {_build(torch)}")


def _build(torch: Probe) -> str:
    if torch.found["cuda"]:
        return f"built for CUDA {torch.found['cuda']}"
    return f"built for ROCm {torch.found['hip']}" if torch.found["hip"] else "built for CPUs"


def _torchvision(torch: Probe, fault: str) -> Check:
    if fault:
        return problem("torchvision", f"does not import, which breaks transformers: {fault}", MEND)
    version = installed_version(TORCHVISION)
    if version and torch.error:
        return note("torchvision", f"{version}; not tried, since torch does not import")
    return ok("torchvision", f"{version} imports" if version else "not installed; serving text needs none")


def _vllm(vllm: Probe, wrong_name: str, wrong_build: str) -> list[Check]:
    """vLLM itself, the distribution's name, the platform that vLLM chose, and the plugin."""
    checks = []
    if vllm.error.startswith("ModuleNotFoundError: No module named 'vllm'"):
        return [problem("vLLM", "is not installed: checkpoints can be made here, not served", INSTALL_VLLM)]
    if vllm.error:
        checks.append(problem("vLLM", f"does not import: {vllm.error}", MEND if wrong_build else INSTALL_VLLM))
    elif is_tested(vllm.found["version"]):
        checks.append(ok("vLLM", f"{vllm.found['version']}, a tested version"))
    else:
        found = f"{vllm.found['version']}; tested are {' and '.join(TESTED)}"
        checks.append(note("vLLM", found, "Expect that most works."))
    if wrong_name:
        checks.append(problem("its name", f"{wrong_name}; `vllm serve` asks for one", MEND))
    elif not vllm.error and not vllm.found["platform"]:
        checks.append(
            problem(
                "platform",
                "vLLM finds none that its build is for",
                f"A build for GPUs wants a GPU and its driver; for CPUs install {CPU_BUILD} and no other {VLLM}.",
            )
        )
    elif not vllm.error and vllm.found["platform"] not in PLATFORMS:
        found = f"vLLM serves on {vllm.found['platform']}, for which vllm-mcmoe has no kernels"
        checks.append(problem("platform", found, f"Serve on a CPU, or a GPU: {' and '.join(PLATFORMS)} have kernels."))
    elif not vllm.error:
        checks.append(ok("platform", f"vLLM serves on {vllm.found['platform']}"))
    checks.append(_plugin(vllm, bool(wrong_name or wrong_build)))
    return checks


def _plugin(vllm: Probe, can_be_mended: bool) -> Check:
    """Whether vLLM finds the plugin, is allowed to load it, and could. can_be_mended: pip's faults are there."""
    if not any(point.name == PLUGIN for point in entry_points(group=PLUGIN_GROUP)):
        return problem("plugin", "vllm-mcmoe is imported from a folder, not installed", "pip install that folder.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return problem("plugin", f"VLLM_PLUGINS={allowed} leaves it out", f"Add {PLUGIN} to it, or unset it.")
    if vllm.error:
        return note("plugin", "installed; not tried, since vLLM does not import")
    if not vllm.found["registered"] and can_be_mended:
        return problem("plugin", "cannot register with this vLLM as it is", MEND)
    if not vllm.found["registered"]:
        return problem(
            "plugin",
            "cannot register with this vLLM",
            'Install a tested version of vLLM; `python -c "import vllm_mcmoe; vllm_mcmoe.register()"` shows the error.',
        )
    return ok("plugin", "registers with vLLM")


def _cpu(cpu: Probe, serves_on: str | None) -> Check:
    if cpu.error:
        return problem("CPU kernels", f"do not import: {cpu.error}", INSTALL_VLLM)
    instructions = f"{_cpu_name()}, has {', '.join(cpu.found['available'])}"
    if cpu.found["selected"] is None:
        report = problem if serves_on == "cpu" else note
        return report("CPU kernels", instructions, cpu.found["refused"])
    found = f"{instructions}; {cpu.found['selected']} is used"
    if cpu.found["selected"] == "portable" and serves_on == "cpu":
        return note("CPU kernels", found, "Slow: there are fast kernels for x86 CPUs with AVX2 or more.")
    return ok("CPU kernels", found)


def _cpu_name() -> str:
    """As the kernel calls it; Linux on other than x86 has no name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus(gpus: Probe, torch: Probe, triton: Probe, serves_on: str | None) -> list[Check]:
    """The GPUs that torch sees; where it sees none, whether the machine has one all the same."""
    if gpus.error and serves_on == "cuda":
        return [problem("GPUs", f"torch or Triton cannot use them: {gpus.error}", INSTALL_VLLM)]
    devices = gpus.found.get("devices", [])
    checks = [_gpu(index, device, serves_on) for index, device in enumerate(devices)]
    if not devices and not torch.error:
        driver = _driver()
        if driver:
            advice = "Install vllm-mcmoe[gpu] in an environment of its own to serve on it; see README, Install."
            checks.append(note("GPUs", f"{driver} is loaded, but torch, {_build(torch)}, sees no GPU", advice))
        else:
            checks.append(ok("GPUs", "none"))
    if serves_on == "cuda":
        if triton.error:
            checks.append(problem("Triton", f"does not import: {triton.error}", "Install the one that torch names."))
        else:
            checks.append(ok("Triton", triton.found["version"]))
    return checks


def _gpu(index: int, device: dict[str, Any], serves_on: str | None) -> Check:
    name = f"GPU {index}"
    memory = f"{device['free'] / GB:.1f} of {device['total'] / GB:.1f} GB free"
    found = f"{device['name']}, {device['capability']}, {memory}"
    if device["refused"] and serves_on == "cuda":
        return problem(
            name, found, f"{device['refused']}. Hide it from vLLM with CUDA_VISIBLE_DEVICES, or serve on CPUs."
        )
    if device["refused"]:
        return note(name, f"{found}; {device['refused']}")
    return ok(name, found)


def _driver() -> str:
    """The kernel's driver of a GPU, empty where there is none."""
    drivers = {"NVIDIA's driver": "/proc/driver/nvidia/version", "AMD's driver": "/dev/kfd"}
    return next((name for name, path in drivers.items() if Path(path).exists()), "")


def _compiler(serves_on: str | None) -> Check:
    """What torch.compile, on CPUs, and Triton, on GPUs, compile with, tried on the headers that they include."""
    on_gpu = serves_on == "cuda"
    if on_gpu:
        language, name = "c", os.environ.get("CC") or next(filter(shutil.which, ("clang", "gcc")), "gcc")
    else:
        language, name = "c++", os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    report = problem if on_gpu else note
    advice = "Debian and Ubuntu: apt-get install g++ python3-dev."
    if not on_gpu:
        advice += " Or serve with --enforce-eager, slower."
    if shutil.which(name) is None:
        return report("compiler", f"no {name}, which vLLM compiles models by", advice)
    command = [name, "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-x", language, "-"]
    tried = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True)
    if tried.returncode != 0:
        return report("compiler", f"{name} does not find Python.h, which compiled models include", advice)
    return ok("compiler", f"{name}, with Python's headers")


def _memory() -> Check:
    available = available_memory()
    found = f"{available / GB:.1f} GB available"
    if available < LITTLE_MEMORY:
        return note("memory", found, f"vLLM alone takes some 2 GB. {RESOURCES}")
    return ok("memory", f"{found}. {RESOURCES}")


def _disk(vllm: Probe) -> list[Check]:
    """Room where one stands, and in the folder of repacked experts."""
    checks = [ok("disk", f"{_free_bytes(Path.cwd()) / GB:.1f} GB free in {Path.cwd()}")]
    root, variable = vllm.found.get("cache"), vllm.found.get("cache_variable")
    if vllm.found.get("platform") != "cpu":
        return checks
    if root is None:
        return [*checks, note("start cache", f"{variable}=off: experts are repacked on every start")]
    folder = _existing(Path(root))
    free = _free_bytes(folder)
    found = f"{root}, {free / GB:.1f} GB free"
    advice = f"Experts will be repacked on every start, into memory. Set {variable} to another folder."
    if not os.access(folder, os.W_OK):
        return [*checks, note("start cache", f"{found}, not writable", advice)]
    if free < vllm.found["cache_reserve"]:
        return [*checks, note("start cache", found, advice)]
    return [*checks, ok("start cache", f"{found}; takes about as much as a model's experts")]


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _variables() -> list[Check]:
    """What the environment decides for the plugin, where it does."""
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("VLLM_MCMOE_")]
    return [ok("variables", ", ".join(found))] if found else []
