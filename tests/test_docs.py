"""Documents name modules and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MODULE = re.compile(r"`((?:calibration|kernels|vllm_mcmoe|tests|benchmarks|tools)/[\w/.]*\w)`")
# `module.py`: `name`, and further names until the next module
NAMED = re.compile(r"`((?:calibration|kernels|vllm_mcmoe)/[\w/]+\.py)`:\s+`(\w+)`")


def defined_names(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_module_that_a_document_names_exists(document):
    named = MODULE.findall(document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_function_of_the_walkthrough_exists():
    found = NAMED.findall((ROOT / "docs" / "walkthrough.md").read_text())
    assert len(found) > 30
    assert [(module, name) for module, name in found if name not in defined_names(ROOT / module)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_between_documents_leads_somewhere(document):
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_variable_that_the_code_reads_is_in_the_table_of_variables():
    folders = ("vllm_mcmoe", "kernels", "calibration", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"VLLM_MCMOE_[A-Z_]+", path.read_text())}
    table = re.findall(r"^\| `(VLLM_MCMOE_[A-Z_]+)` \|", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE)
    assert len(table) == len(set(table))
    assert set(table) == read


def test_every_error_that_is_raised_on_purpose_is_in_the_table_of_errors():
    classes = defined_names(ROOT / "vllm_mcmoe" / "errors.py") - {"McmoeError"}
    table = re.findall(r"^\| `(\w+Error)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert set(table) == classes
