"""The rooms of calibration/ import only from those that data has walked through before (docs/design.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_mcmoe.calibration"
ROOMS = (
    "common",
    "model",
    "matrix",
    "recipes",
    "checkpoint",
    "measure",
    "allocate",
    "quantize",
    "evaluate",
    "tune",
    "prune",
    "push",
    "report",
    "pipeline",
)


def imported_rooms(source: str) -> Iterator[str]:
    """Of every import in the text, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[2] for name in names if name.startswith(f"{PACKAGE}."))


def against_the_order(room: str, source: str) -> list[str]:
    return [other for other in imported_rooms(source) if ROOMS.index(other) > ROOMS.index(room)]


def modules_by_room() -> list[tuple[str, Path]]:
    folder = ROOT / "calibration"
    files = sorted(path for path in folder.rglob("*.py") if path != folder / "__init__.py")
    return [(path.relative_to(folder).parts[0].removesuffix(".py"), path) for path in files]


@pytest.mark.parametrize(
    ("room", "path"), modules_by_room(), ids=lambda value: str(value).rsplit("calibration/", 1)[-1]
)
def test_no_import_goes_against_the_order(room, path):
    assert against_the_order(room, path.read_text()) == []


@pytest.mark.parametrize(
    "statement",
    [
        f"from {PACKAGE}.pipeline import quantize",
        f"from {PACKAGE} import prune",
        f"def late():\n    import {PACKAGE}.evaluate.scores",
    ],
)
def test_an_import_against_the_order_is_found(statement):
    assert against_the_order("measure", statement)
    assert not against_the_order("pipeline", statement)


def test_nothing_before_calibration_imports_it():
    """Kernels, and what vLLM loads of the plugin, work without it."""
    command_line = ("cli", "doctor", "demo.py", "reporting.py", "hf.py")
    plugin = [
        path for path in (ROOT / "vllm_mcmoe").rglob("*.py") if path.relative_to(ROOT).parts[1] not in command_line
    ]
    kernels = list((ROOT / "kernels").rglob("*.py"))
    assert [path for path in plugin + kernels if list(imported_rooms(path.read_text()))] == []


def test_every_room_says_what_it_is():
    for room in ROOMS:
        folder = ROOT / "calibration" / room
        if folder.is_dir():
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_every_package_is_in_the_wheel():
    declared = (ROOT / "pyproject.toml").read_text()
    for top in ("calibration", "kernels", "vllm_mcmoe"):
        for init in (ROOT / top).rglob("__init__.py"):
            package = init.parent.relative_to(ROOT).as_posix().replace("/", ".")
            assert f'"{package if top == "vllm_mcmoe" else f"vllm_mcmoe.{package}"}",' in declared
