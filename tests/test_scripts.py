"""Benchmarks and tools run by hand only: what they import must be there all the same."""

import ast
import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


def imports(script: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every `from module import name`."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def defined(script: Path) -> set[str]:
    """Names that a script defines at its top level."""
    tree = ast.parse(script.read_text()).body
    assigned = [target for node in tree if isinstance(node, ast.Assign) for target in node.targets]
    assigned += [node.target for node in tree if isinstance(node, ast.AnnAssign)]
    return {node.name for node in tree if hasattr(node, "name")} | {node.id for node in assigned if hasattr(node, "id")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_that_a_script_imports_of_this_project_exist(script):
    missing = []
    for module, name in imports(script):
        sibling = script.parent / f"{module}.py"
        if sibling.exists():
            found = name in defined(sibling)
        elif module.partition(".")[0] in ("vllm_mcmoe", "tests", "tools"):
            found = hasattr(importlib.import_module(module), name) or find_spec(f"{module}.{name}") is not None
        else:
            continue
        if not found:
            missing.append(f"{module}.{name}")
    assert missing == []
