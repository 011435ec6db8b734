"""Checkpoints shared by the whole run: made once, by the code under test, from the embedded reference model."""

from pathlib import Path

import pytest

REFERENCE_MODEL = Path(__file__).parents[1] / "benchmarks" / "reference_model"


@pytest.fixture(scope="session")
def reference_model() -> Path:
    """The 16-bit tiny Mixtral: 4 layers, 8 experts, top-2, hidden 256, intermediate 512."""
    return REFERENCE_MODEL / "tiny-mixtral"


@pytest.fixture(scope="session")
def calibration_files() -> list[Path]:
    return sorted((REFERENCE_MODEL / "corpus").glob("*.calibration.txt"))


@pytest.fixture(scope="session")
def evaluation_files() -> list[Path]:
    return sorted((REFERENCE_MODEL / "corpus").glob("*.evaluation.txt"))
