"""Checkpoints shared by the whole run: made once, by the code under test, from the embedded reference model."""

from pathlib import Path

import pytest

from vllm_mcmoe.calibration.artifacts import Plan
from vllm_mcmoe.calibration.pipeline import quantize

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


CALIBRATION = {"sequences": 16, "length": 128}  # seconds instead of a minute; quality is not what these tests judge


@pytest.fixture(scope="session")
def checkpoint(reference_model, calibration_files, tmp_path_factory) -> Path:
    """The reference model at 2.5 bits by the default recipe, attention at 4 bits."""
    out = tmp_path_factory.mktemp("checkpoints") / "tiny-2.5bit"
    quantize(reference_model, out, calibration_files, bits=2.5, **CALIBRATION)
    return out


@pytest.fixture(scope="session")
def checkpoint_16bit_linears(checkpoint, reference_model, calibration_files, tmp_path_factory) -> Path:
    """The same experts' widths with attention left alone, for comparisons in float32."""
    out = tmp_path_factory.mktemp("checkpoints") / "tiny-2.5bit-linear16"
    quantize(
        reference_model,
        out,
        calibration_files,
        plan=Plan.load(checkpoint / "plan.json"),
        recipe="uniform",
        linear_bits=16,
        **CALIBRATION,
    )
    return out
