"""Checkpoints that only the serving tests need."""

from pathlib import Path

import pytest

from tests.conftest import CALIBRATION
from tests.tiny_models import make_qwen3
from vllm_mcmoe.calibration.pipeline import quantize


@pytest.fixture(scope="session")
def qwen3_checkpoint(reference_model, calibration_files, tmp_path_factory) -> Path:
    """A random Qwen3-MoE with a dense layer below two MoE layers of 8 experts, at 3 bits."""
    directory = tmp_path_factory.mktemp("qwen3")
    model = make_qwen3(directory / "model", reference_model, hidden_size=256, moe_intermediate_size=256)
    out = directory / "checkpoint"
    quantize(model, out, calibration_files, bits=3.0, linear_bits=16, **CALIBRATION)
    return out
