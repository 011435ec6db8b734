"""Checkpoints that only the serving tests need."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import CALIBRATION
from tests.tiny_models import make_qwen3
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.pruning.prune import prune


@pytest.fixture(scope="session")
def qwen3_checkpoint(reference_model, calibration_files, tmp_path_factory) -> Path:
    """A random Qwen3-MoE with a dense layer below two MoE layers of 8 experts, at 3 bits."""
    directory = tmp_path_factory.mktemp("qwen3")
    model = make_qwen3(directory / "model", reference_model, hidden_size=256, moe_intermediate_size=256)
    out = directory / "checkpoint"
    quantize(model, out, calibration_files, bits=3.0, linear_bits=16, **CALIBRATION)
    return out


def with_pruning(checkpoint: Path, out: Path, calibration_files: list[Path], **options) -> Path:
    """A copy of a checkpoint with a rule for a quarter of the expert activations."""
    shutil.copytree(checkpoint, out)
    prune(out, calibration_files, target=0.25, **options, **CALIBRATION)
    return out


@pytest.fixture(scope="session")
def pruned_checkpoint(checkpoint, calibration_files, tmp_path_factory) -> Path:
    """The reference model at 2.5 bits with 4-bit attention and a learned pruning rule."""
    return with_pruning(checkpoint, tmp_path_factory.mktemp("pruned") / "otp", calibration_files, method="otp")


@pytest.fixture(scope="session")
def pruned_checkpoint_16bit_linears(checkpoint_16bit_linears, calibration_files, tmp_path_factory) -> Path:
    """The same with attention left alone."""
    out = tmp_path_factory.mktemp("pruned") / "otp-linear16"
    return with_pruning(checkpoint_16bit_linears, out, calibration_files, method="otp")
