"""Checkpoints that only the serving tests need."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import CALIBRATION
from vllm_mcmoe.calibration.prune.prune import prune


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
