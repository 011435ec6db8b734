"""The wheel and the source distribution, built offline as `python -m build` builds them, and what pins versions."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vllm_mcmoe
from tools.release_check import LEFT_OUT, CheckFailed, run
from vllm_mcmoe.demo import REFERENCE_MODEL as DEMO_MODEL

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LARGEST_WHEEL = 40_000_000
# Where modules lie in a checkout, and in the wheel
MODULE_FOLDERS = {"vllm_mcmoe": "vllm_mcmoe", "calibration": "vllm_mcmoe/calibration", "kernels": "vllm_mcmoe/kernels"}
REFERENCE_MODEL = "benchmarks/reference_model"


def build(kind: str, source: Path, out: Path) -> Path:
    """Call a hook of the build backend, setuptools, in a folder: what `python -m build --no-isolation` does."""
    hook = f"from setuptools.build_meta import build_{kind} as build; print(build({str(out)!r}))"
    made = subprocess.run([sys.executable, "-c", hook], cwd=source, check=True, capture_output=True, text=True)
    return out / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(source distribution, wheel built from it)."""
    checkout, out, unpacked = (tmp_path_factory.mktemp(name) for name in ("checkout", "dist", "unpacked"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("vllm_mcmoe", "calibration", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, checkout / folder, symlinks=True, ignore=ignored)
    source = build("sdist", checkout, out)
    with tarfile.open(source) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    return source, build("wheel", folder, out)


def test_the_wheel_has_every_module_and_the_data_that_modules_read(built):
    _, wheel = built
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in MODULE_FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    data = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in {
            "calibration/model/builtin_text": "vllm_mcmoe/calibration/model/builtin_text",
            f"{REFERENCE_MODEL}/tiny-mixtral": "vllm_mcmoe/reference_model/tiny-mixtral",
            f"{REFERENCE_MODEL}/corpus": "vllm_mcmoe/reference_model/corpus",
        }.items()
        for path in (ROOT / folder).iterdir()
    }
    assert len(modules) > 100 and len(data) > 20
    about_it = {name for name in names if name.startswith("vllm_mcmoe-")}
    assert names - about_it == modules | data


def test_the_wheel_is_small_and_says_what_it_is(built):
    _, wheel = built
    assert wheel.stat().st_size < LARGEST_WHEEL
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    about = message_from_bytes(archive.read(f"{folder}/METADATA"))
    assert (about["Name"], about["Version"]) == ("vllm-mcmoe", vllm_mcmoe.__version__)
    assert {"cpu", "gpu"} <= set(about.get_all("Provides-Extra"))
    points = archive.read(f"{folder}/entry_points.txt").decode()
    assert "mcmoe = vllm_mcmoe.cli:main" in points and "mcmoe = vllm_mcmoe:register" in points
    assert about.get_all("License-File") == PROJECT["license-files"]


def test_the_demo_finds_the_same_model_in_the_wheel_and_in_the_checkout(built):
    _, wheel = built
    weights = "tiny-mixtral/model.safetensors"
    inside = zipfile.ZipFile(wheel).read(f"vllm_mcmoe/{DEMO_MODEL.name}/{weights}")
    assert inside == (DEMO_MODEL / weights).read_bytes() == (ROOT / REFERENCE_MODEL / weights).read_bytes()
    assert DEMO_MODEL.parent == Path(vllm_mcmoe.__file__).parent


def test_the_source_distribution_has_what_a_wheel_is_built_from_and_no_tests(built):
    source, _ = built
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "constraints.txt", "kernels/packing.py", f"{REFERENCE_MODEL}/corpus/SOURCES.md"} <= names
    assert not any(name.startswith("tests") for name in names)


def requirements() -> list[Requirement]:
    every_list = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in every_list for line in group]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_has_a_lower_and_an_upper_bound(requirement):
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == {"=="} or operators == {">=", "<"}


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no folders, no local builds
    return dict(line.split("==") for line in lines)


def test_the_constraints_fit_the_bounds():
    pinned = constraints()
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra in ("cpu", "test"):
        wanted += [Requirement(line) for line in PROJECT["optional-dependencies"][extra]]
    for requirement in wanted:
        if requirement.name != "setuptools":  # which pip freeze leaves out
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_the_tests_run_with_the_versions_of_the_constraints():
    """Where they do not, constraints.txt is out of date, or the environment is: `make clean setup`."""
    direct = [Requirement(line).name for line in PROJECT["dependencies"]]
    found = {name: version(name).partition("+")[0] for name in direct}
    assert found == {name: constraints()[name] for name in direct}


def test_the_release_check_gives_every_command_of_the_readme():
    shown = re.findall(r"^mcmoe ([\w-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    given = re.findall(r'"mcmoe", "([\w-]+)"', (ROOT / "tools" / "release_check.py").read_text())
    assert len(set(shown)) > 8
    assert set(shown) == {command for command in (*given, *LEFT_OUT) if command != "demo"}


def test_the_release_check_runs_nothing_of_the_checkouts_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where an egg-info makes pip believe that the wheel is installed
    log = tmp_path / "log"
    run([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))"], log)
    assert log.read_text().split() == ["None"]


def test_the_release_check_ends_at_a_command_that_fails(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(CheckFailed, match=f"ended with 3, not 0: {log}"):
        run([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], log)
    assert log.read_text() == "the reason\n"
    with pytest.raises(CheckFailed, match=r"there is no mcmoe-of-no-one on /usr/bin"):
        run(["mcmoe-of-no-one"], log, env={"PATH": "/usr/bin"})
