"""What an interrupted run has left, mutated: a unit or an array is found as it was saved, or not at all."""

import random
import shutil
from pathlib import Path

import pytest

from tests.calibration import child_process
from tests.calibration.test_resume import run_interrupted
from tests.fuzz.mutations import mutate_file
from tests.fuzz.test_mutated_files import MUTATIONS, outcomes, refuses_some
from vllm_mcmoe.calibration.checkpoint.workdir import ACTIVATIONS, ARGUMENTS, work_path, working_on
from vllm_mcmoe.calibration.common.files import read_sealed
from vllm_mcmoe.calibration.model.activations import ActivationStore


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, qwen3_model, calibration_files) -> Path:
    out = tmp_path_factory.mktemp("interrupted") / "out"
    child_process.result_of(run_interrupted, qwen3_model, out, calibration_files, activations="disk")
    return out


@pytest.fixture
def out(tmp_path, interrupted) -> Path:
    """Of a copy that a test may damage."""
    shutil.copytree(work_path(interrupted), work_path(tmp_path / "out"))
    return tmp_path / "out"


def units(out: Path) -> list[str]:
    """Those of layers, measured and quantised."""
    return sorted(path.stem for pattern in ("measured-*", "quantized-*") for path in work_path(out).glob(pattern))


def arguments(out: Path) -> dict:
    return read_sealed(work_path(out) / ARGUMENTS)


def arrays(out: Path) -> list[str]:
    return sorted(path.stem for path in (work_path(out) / ACTIVATIONS).glob("*.json"))


def found_or_not(folder: Path, name: str, find) -> dict[str, int]:
    """How often a mutated file left what it is part of as it was, and how often nothing was found. find: None, or what
    was found."""
    original, expected = (folder / name).read_bytes(), find()
    assert expected is not None
    counted = {"found": 0, "not found": 0}
    for seed in range(MUTATIONS):
        mutate_file(folder / name, random.Random(seed))
        if (folder / name).read_bytes() == original:  # a byte replaced by itself
            continue
        try:
            found = find()
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
        assert found is None or found == expected, f"{name}, seed {seed}: another one is found"
        counted["not found" if found is None else "found"] += 1
        (folder / name).write_bytes(original)
    return counted


def test_units(out):
    work_arguments = arguments(out)

    def find(unit: str):
        with working_on(out, work_arguments) as work:
            return work.load(unit)

    assert len(units(out)) > 3
    for unit in units(out):
        assert found_or_not(work_path(out), f"{unit}.json", lambda unit=unit: find(unit))["not found"] > MUTATIONS / 2


@pytest.mark.parametrize("unit", ["measured-model.layers.1.mlp.experts", "quantized-00001"])
def test_the_tensors_of_a_unit(out, unit):
    work_arguments = arguments(out)
    (file,) = read_sealed(work_path(out) / f"{unit}.json")["files"]

    def find():
        with working_on(out, work_arguments) as work:
            return work.load(unit)

    counted = found_or_not(work_path(out), file, find)
    assert counted["found"] == 0
    assert counted["not found"] > 0.9 * MUTATIONS


def test_the_arguments(out):
    work_arguments = arguments(out)

    def read() -> None:
        with working_on(out, work_arguments):
            pass

    assert refuses_some(outcomes(work_path(out), ARGUMENTS, read))


@pytest.mark.parametrize("suffix", [".json", ".f32"])
def test_activations(out, suffix):
    folder = work_path(out) / ACTIVATIONS
    name = arrays(out)[0]

    def find():
        activations = ActivationStore(folder).find(name)
        return None if activations is None else [batch.tolist() for batch in activations]

    assert found_or_not(folder, f"{name}{suffix}", find)["not found"] > MUTATIONS / 2
