"""A run that is killed, interrupted, short of disk space or damaged, and what the next run makes of it."""

import dataclasses
import json
import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.calibration import child_process
from tests.calibration.conftest import QUICK, interrupted_at_the_last_layer, mixed_plan
from vllm_mcmoe.calibration import pipeline
from vllm_mcmoe.calibration.checkpoint.report import QuantizationReport
from vllm_mcmoe.calibration.checkpoint.workdir import work_path, working_on
from vllm_mcmoe.calibration.measure import statistics
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.quantize import checkpoint_run
from vllm_mcmoe.calibration.quantize import layer as layer_quantization
from vllm_mcmoe.calibration.recipes import TuningOptions
from vllm_mcmoe.errors import FormatError, WorkDirectoryError

# Gradients for the Hessians, too, so that every kind of unit there is gets written and read; and trellis codes.
RECIPE = dataclasses.replace(
    QUICK,
    hessian_weighting="gradient",
    widths=(1, 2, 4),
    gptq=dataclasses.replace(QUICK.gptq, output_sweeps=1, metadata="float8", codes="trellis"),
    tuning=TuningOptions(steps=3),
)


def run(model: Path, out: Path, data: list[Path], **changes: Any) -> QuantizationReport:
    """The whole path, from measuring to the scores in the model card."""
    options = {"bits": 3.0, "recipe": RECIPE, "sequences": 8, "length": 64, "evaluation_data": data[:1]}
    return quantize(model, out, data, **{**options, "show_progress": False, **changes})


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run_logged(model: Path, out: Path, data: list[Path], **changes: Any) -> list[str]:
    """run's messages."""
    messages: list[str] = []
    run(model, out, data, log=messages.append, **changes)
    return messages


def run_interrupted(model: Path, out: Path, data: list[Path], **changes: Any) -> list[str]:
    """run's messages, Ctrl-C being pressed when the last layer is about to be quantised."""
    messages: list[str] = []
    with interrupted_at_the_last_layer():
        run(model, out, data, log=messages.append, **changes)
    return messages


def run_counting_restored_layers(model: Path, out: Path, data: list[Path], **changes: Any) -> int:
    """How many finished layers run had to load again."""
    restored = []

    def restore(model, index, *arguments):
        restored.append(index)
        layer_quantization.restore(model, index, *arguments)

    checkpoint_run.restore = restore
    run(model, out, data, **changes)
    return len(restored)


def run_with_file_limit(limit: int, model: Path, out: Path, data: list[Path], **changes: Any) -> None:
    """run where no file may become larger than that many bytes: writing fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run(model, out, data, **changes)


def calibrate_interrupted(model: Path, out: Path, data: list[Path]) -> None:
    """Ctrl-C after the first layer measured, which is the last of the model."""
    save = statistics._save_measured

    def save_first(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    statistics._save_measured = save_first
    with pytest.raises(KeyboardInterrupt):
        calibrate_tiny(model, out, data)


def calibrate_tiny(model: Path, out: Path, data: list[Path]) -> list[str]:
    messages: list[str] = []
    options = {"recipe": RECIPE, "sequences": 8, "length": 64, "activations": "disk"}
    pipeline.calibrate(model, data, out, log=messages.append, **options)
    return messages


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, qwen3_model, calibration_files) -> dict[str, bytes]:
    """The files of a checkpoint made in one go, in a process of its own."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    child_process.result_of(run, qwen3_model, out, calibration_files)
    return contents(out)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, qwen3_model, calibration_files) -> tuple[Path, list[str]]:
    """Where the checkpoint of a run that was interrupted at its last layer would be, and the run's messages."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    return out, child_process.result_of(run_interrupted, qwen3_model, out, calibration_files, activations="disk")


@pytest.fixture
def unfinished(tmp_path, interrupted) -> Path:
    """A copy of it a test may damage or continue."""
    shutil.copytree(work_path(interrupted[0]), work_path(tmp_path / "out"))
    return tmp_path / "out"


def test_ten_kills_at_random_moments_change_nothing(tmp_path, qwen3_model, calibration_files, uninterrupted):
    """Each run goes on where the one before was killed; one that gets to its end is compared, and the next starts from
    nothing. Where activations are kept may differ from run to run."""
    chance = random.Random(0)
    out = tmp_path / "out"
    started = time.monotonic()
    child_process.start(run, qwen3_model, out, calibration_files).join()
    seconds = time.monotonic() - started
    kills = 0
    while kills < 10 or not out.exists():
        if out.exists() and not work_path(out).exists():
            shutil.rmtree(out)
        storage = chance.choice(["memory", "disk"])
        process = child_process.start(run, qwen3_model, out, calibration_files, activations=storage)
        process.join(chance.uniform(0, seconds) if kills < 10 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            assert os.listdir(tmp_path) == ["out"]
        assert not out.exists() or contents(out) == uninterrupted


def test_an_interrupted_run_leaves_no_output_and_says_how_to_go_on(interrupted):
    out, messages = interrupted
    assert not out.exists()
    assert f"What is finished is kept in {work_path(out)}; the same command goes on from there." in messages


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_the_same_call_goes_on_from_the_last_finished_layer(
    unfinished, qwen3_model, calibration_files, uninterrupted, activations
):
    messages = child_process.result_of(run_logged, qwen3_model, unfinished, calibration_files, activations=activations)
    assert "2 of 2 layers are measured already." in messages
    assert "2 of 3 layers are quantised already." in messages
    assert contents(unfinished) == uninterrupted
    assert not work_path(unfinished).exists()


@pytest.mark.parametrize(("activations", "restored"), [("memory", 2), ("disk", 0)])
def test_hidden_states_on_disk_spare_running_the_finished_layers(
    unfinished, qwen3_model, calibration_files, activations, restored
):
    arguments = (qwen3_model, unfinished, calibration_files)
    assert child_process.result_of(run_counting_restored_layers, *arguments, activations=activations) == restored


DAMAGED = [
    "weights.json",
    "measured-model.layers.1.mlp.experts.json",
    "measured-model.layers.1.mlp.experts.safetensors",
    "allocated-plan.json",
    "quantized-00000.json",
    "untuned/model-00001-of-00004.safetensors",
    "untuned/model-00002-of-00004.safetensors",
]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_unit_is_noticed_and_done_again(unfinished, qwen3_model, calibration_files, uninterrupted, name):
    path = work_path(unfinished) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    messages = child_process.result_of(run_logged, qwen3_model, unfinished, calibration_files)
    assert any("damaged; what it is part of is done again" in message for message in messages)
    assert contents(unfinished) == uninterrupted


def test_a_missing_shard_is_noticed_and_written_again(unfinished, qwen3_model, calibration_files, uninterrupted):
    (work_path(unfinished) / "untuned" / "model-00001-of-00004.safetensors").unlink()
    messages = child_process.result_of(run_logged, qwen3_model, unfinished, calibration_files)
    assert any("model-00001-of-00004.safetensors is gone" in message for message in messages)
    assert contents(unfinished) == uninterrupted


def test_damaged_activations_are_computed_again(unfinished, qwen3_model, calibration_files, uninterrupted):
    (path,) = (work_path(unfinished) / "activations").glob("hidden-*.f32")
    path.write_bytes(bytes(path.stat().st_size))
    child_process.result_of(run, qwen3_model, unfinished, calibration_files, activations="disk")
    assert contents(unfinished) == uninterrupted


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bits": 2.5}, "bits was 3.0, is 2.5"),
        ({"length": 32}, r"calibration tokens was \[8, 64\] from .*, is \[8, 32\]"),
        ({"recipe": "mcmoe"}, "recipe's name was 'quick', is 'mcmoe'"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"evaluation_data": None}, "evaluation data was .*, is none"),
    ],
)
def test_other_arguments_are_refused_and_named(unfinished, qwen3_model, calibration_files, changes, named):
    with pytest.raises(WorkDirectoryError, match=f"unfinished work of another run: .*{named}.*--restart"):
        run(qwen3_model, unfinished, calibration_files, **changes)
    assert work_path(unfinished).exists()


def test_a_model_that_was_changed_meanwhile_is_refused(tmp_path, unfinished, qwen3_model, calibration_files):
    changed = Path(shutil.copytree(qwen3_model, tmp_path / "model"))
    os.utime(changed / "model.safetensors", ns=(0, 0))
    with pytest.raises(WorkDirectoryError, match=r"model file model\.safetensors was .*, is .* changed at 0 ns"):
        run(changed, unfinished, calibration_files)


def test_restart_forgets_the_earlier_work(unfinished, qwen3_model, calibration_files):
    plan = mixed_plan(qwen3_model)
    run(qwen3_model, unfinished, calibration_files, bits=None, plan=plan, restart=True, recipe=QUICK)
    assert json.loads((unfinished / "plan.json").read_text())["layers"] == plan.layers
    assert not work_path(unfinished).exists()


def test_one_process_at_a_time_works_on_an_output(tmp_path, qwen3_model, calibration_files):
    with (
        working_on(tmp_path / "out", {}),
        pytest.raises(WorkDirectoryError, match=r"out\.partial: another process is working there"),
    ):
        run(qwen3_model, tmp_path / "out", calibration_files)


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_what_is_finished(
    tmp_path, qwen3_model, calibration_files
):
    """The limit lets everything through but the first shard: a dense layer, the largest of the model, and larger than
    the gradients of so few tokens."""
    out, whole, few = tmp_path / "out", tmp_path / "whole", {"sequences": 4}
    child_process.result_of(run, qwen3_model, whole, calibration_files, **few)
    uninterrupted = contents(whole)
    limit = len(uninterrupted["model-00001-of-00004.safetensors"]) - 1
    error = child_process.result_of(run_with_file_limit, limit, qwen3_model, out, calibration_files, **few)
    assert isinstance(error, OSError)
    assert "cannot be written" in str(error) and "model-00001-of-00004.safetensors" in str(error)
    assert not out.exists()
    messages = child_process.result_of(run_logged, qwen3_model, out, calibration_files, **few)
    assert "2 of 2 layers are measured already." in messages
    assert contents(out) == uninterrupted


def test_a_run_that_fails_before_anything_is_finished_leaves_nothing(tmp_path, editable_model, calibration_files):
    path = editable_model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"model\.safetensors: cannot be read as safetensors.*download complete"):
        run(editable_model, tmp_path / "out", calibration_files)
    assert os.listdir(tmp_path) == ["model"]


def test_an_interrupted_calibration_goes_on_and_writes_the_same_factors(tmp_path, qwen3_model, calibration_files):
    for name, calibrations in (("one", [calibrate_tiny]), ("two", [calibrate_interrupted, calibrate_tiny])):
        for calibration in calibrations:
            messages = child_process.result_of(calibration, qwen3_model, tmp_path / name, calibration_files)
    assert "1 of 2 layers are measured already." in messages
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
