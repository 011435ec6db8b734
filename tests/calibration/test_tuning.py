"""Norms are tuned after quantisation: gradients, what is written, and runs that are interrupted."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.calibration import child_process
from tests.calibration.conftest import QUICK, layerwise
from tests.tiny_models import make_tiny
from vllm_mcmoe.calibration.checkpoint.report import TuningReport
from vllm_mcmoe.calibration.checkpoint.workdir import work_path, working_on
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights, load_dequantized
from vllm_mcmoe.calibration.evaluate.inspection import inspect_checkpoint
from vllm_mcmoe.calibration.evaluate.resources import plan_resources
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.evaluate.work import multiply_adds
from vllm_mcmoe.calibration.measure.sensitivity import token_kl
from vllm_mcmoe.calibration.model.activations import ActivationStore
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.prune.prune import prune
from vllm_mcmoe.calibration.recipes import TuningOptions
from vllm_mcmoe.calibration.tune import tuning
from vllm_mcmoe.calibration.tune.streaming import final_states, kl_gradients, mean_kl
from vllm_mcmoe.calibration.tune.tunables import TunedWeights, find_tunables
from vllm_mcmoe.checkpoint import read_checkpoint_config
from vllm_mcmoe.cli import app

TEXT = {"sequences": 6, "length": 64, "show_progress": False}
FEW = TuningOptions(steps=3)
TUNED = dataclasses.replace(QUICK, tuning=FEW)


@pytest.fixture(scope="module")
def made(tmp_path_factory, reference_model, calibration_files):
    """made(kind): a tiny model and its checkpoint at 3 bits, attention in 16; "sized" is Mixtral with its linears and
    output head packed."""
    done: dict[str, tuple[Path, Path]] = {}

    def made(kind: str) -> tuple[Path, Path]:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            model = reference_model if kind == "sized" else make_tiny(kind, folder / "model", reference_model)
            options = {"size": 9_500_000} if kind == "sized" else {"bits": 3.0, "linear_bits": 16}
            quantize(model, folder / "checkpoint", calibration_files, recipe=QUICK, **options, **TEXT)
            done[kind] = model, folder / "checkpoint"
        return done[kind]

    return made


def tune(model: Path, checkpoint: Path, out: Path, tokens: torch.Tensor, options: TuningOptions) -> TuningReport | None:
    with working_on(out, {}) as work:
        work.save("begun", {})
        report = tuning.tune(
            layerwise(model),
            checkpoint,
            work.checkpoint,
            tokens,
            options,
            work,
            ActivationStore(),
            log=lambda message: None,
            show_progress=False,
        )
        for path in checkpoint.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, work.checkpoint)
        work.publish()
    return report


def some_tokens(sequences: int, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 4096, (sequences, length), generator=torch.Generator().manual_seed(0))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "deepseek-v3", "sized"])
def test_the_gradient_is_that_of_the_whole_model_in_memory(kind, made):
    model, checkpoint = made(kind)
    tokens, store = some_tokens(3), ActivationStore()
    weights = CheckpointWeights(describe_model(checkpoint))
    assert ("lm_head.weight_packed" in weights.files.info) == (kind == "sized")
    tunables = find_tunables(LayerwiseModel(weights), FEW)
    streamed = LayerwiseModel(TunedWeights(weights, {name: t.value for name, t in tunables.items()}))
    original = layerwise(model)
    states = final_states(original, tokens, store, "original").rows.view(*tokens.shape, -1)
    kl, found = kl_gradients(streamed, original, tokens, iter(states), tunables, store)
    assert kl == pytest.approx(mean_kl(streamed, original, tokens, iter(states), store), rel=1e-5)

    whole = load_dequantized(checkpoint)
    expected = load_dequantized(model)(tokens).logits.log_softmax(-1).detach()
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    loss = token_kl(expected, whole(tokens).logits.log_softmax(-1)).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(kl, rel=1e-4)
    for name, tunable in tunables.items():
        module = whole.model.norm if tunable.layer is None else whole.model.layers[tunable.layer]
        gradient = module.get_parameter(tunable.parameter).grad
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


def test_kl_falls_on_text_that_was_not_calibrated_on(
    tmp_path, reference_model, mixed_checkpoint, calibration_files, evaluation_files
):
    """What transformers, layer by layer and whole, reads of the tuned checkpoint is what was tuned."""
    tokens = load_calibration_data(describe_model(reference_model), calibration_files, 48, 128, print).tokens
    report = tune(reference_model, mixed_checkpoint, tmp_path / "out", tokens, TuningOptions())
    assert report.kept and report.tokens == 42 * 128
    options = {"against": reference_model, "sequences": 24, "length": 128, "show_progress": False}
    before, after = (
        evaluate(path, evaluation_files, **options).mean_kl for path in (mixed_checkpoint, tmp_path / "out")
    )
    assert after < 0.97 * before
    whole, written, original = load_dequantized(tmp_path / "out"), tensors(tmp_path / "out"), tensors(reference_model)
    for name in ("model.layers.1.post_attention_layernorm.weight", "model.norm.weight"):
        assert not torch.equal(written[name], original[name])
        assert torch.equal(whole.get_parameter(name), written[name].float())


def test_tuning_that_does_not_help_is_not_written(made, tmp_path):
    model, checkpoint = made("mixtral")
    report = tune(model, checkpoint, tmp_path / "out", some_tokens(6), TuningOptions(steps=1, step_size=30.0))
    assert not report.kept and report.after > report.before
    for path in checkpoint.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_single_sequence_is_not_tuned_on(made, tmp_path):
    model, checkpoint = made("mixtral")
    assert tune(model, checkpoint, tmp_path / "out", some_tokens(1), FEW) is None
    assert tensors(checkpoint).keys() == tensors(tmp_path / "out").keys()


# Resuming


def run(model: Path, out: Path, data: list[Path]) -> list[str]:
    messages: list[str] = []
    quantize(model, out, data, bits=3.0, recipe=TUNED, log=messages.append, activations="disk", **TEXT)
    return messages


def run_interrupted(model: Path, out: Path, data: list[Path], method: str, calls: int) -> None:
    """Ctrl-C is pressed when a method of the tuning has been called so often."""
    original, count = getattr(tuning, method, None) or getattr(tuning._Tuning, method), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    setattr(tuning if hasattr(tuning, method) else tuning._Tuning, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, out, data)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, qwen3_model, calibration_files) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    child_process.result_of(run, qwen3_model, out, calibration_files)
    return out


@pytest.mark.parametrize(
    ("method", "calls"), [("_held_out_kl", 0), ("_step", 1), ("_save", 1), ("_held_out_kl", 1), ("write_shard", 2)]
)
def test_interrupted_tuning_goes_on_and_writes_the_same_bytes(
    tmp_path, qwen3_model, calibration_files, uninterrupted, method, calls
):
    out = tmp_path / "out"
    child_process.result_of(run_interrupted, qwen3_model, out, calibration_files, method, calls)
    assert work_path(out).exists() and not out.exists()
    messages = child_process.result_of(run, qwen3_model, out, calibration_files)
    if method in ("_step", "_save"):
        assert "1 of 3 steps of tuning are done already." in messages
    assert contents(out) == contents(uninterrupted)
    assert not work_path(out).exists()


@pytest.mark.parametrize("name", ["tuning.json", "tuning-1.safetensors", "untuned/model-00002-of-00004.safetensors"])
def test_a_damaged_unit_of_tuning_is_done_again(tmp_path, qwen3_model, calibration_files, uninterrupted, name):
    out = tmp_path / "out"
    child_process.result_of(run_interrupted, qwen3_model, out, calibration_files, "_step", 1)
    path = work_path(out) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    messages = child_process.result_of(run, qwen3_model, out, calibration_files)
    assert any("damaged; what it is part of is done again" in message for message in messages)
    assert contents(out) == contents(uninterrupted)


def test_norms_are_all_that_is_tuned(uninterrupted, qwen3_model):
    report = json.loads((uninterrupted / "quantization_report.json").read_text())["tuning"]
    original, written = tensors(qwen3_model), tensors(uninterrupted)
    kept = [name for name in original if name in written]
    changed = {name for name in kept if not torch.equal(original[name], written[name])}
    assert report["kept"] and {"model.norm.weight", "model.layers.1.input_layernorm.weight"} <= changed
    assert all(name.endswith("norm.weight") for name in changed)
    assert all(original[name].dtype == written[name].dtype for name in changed)


def test_a_tuned_checkpoint_can_be_pruned(tmp_path, uninterrupted, calibration_files):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    prune(out, calibration_files, method="odp", target=0.2, sequences=2, length=32, show_progress=False)
    assert read_checkpoint_config(out).pruning.target == 0.2
    before, after = tensors(uninterrupted), tensors(out)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# What people see


def test_the_report_the_card_and_inspect_say_what_was_tuned(uninterrupted):
    tuned = json.loads((uninterrupted / "quantization_report.json").read_text())["tuning"]
    assert tuned["steps"] == 3 and tuned["tokens"] == 5 * 64
    assert f"{tuned['before']:.4f} before, {tuned['after']:.4f} after" in (uninterrupted / "README.md").read_text()
    assert inspect_checkpoint(uninterrupted).to_dict()["tuning"] == tuned
    shown = CliRunner().invoke(app, ["inspect", str(uninterrupted)])
    assert shown.exit_code == 0


def test_no_tune_leaves_norms_as_they_are(tmp_path, qwen3_model, calibration_files):
    out = tmp_path / "out"
    arguments = ["quantize", str(qwen3_model), str(out), "--bits", "3", "--widths", "2,4", "--no-tune"]
    arguments += ["--no-evaluate", "--sequences", "2", "--length", "32"]
    arguments += [part for path in calibration_files for part in ("--data", str(path))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    original, written = tensors(qwen3_model), tensors(out)
    kept = [name for name in original if name in written]
    assert any("norm" in name for name in kept)
    assert all(torch.equal(original[name], written[name]) for name in kept)
    assert json.loads((out / "quantization_report.json").read_text())["tuning"] is None


def test_its_cost_is_planned(reference_model):
    tuned, untuned = (plan_resources(reference_model, tuned=tuned).quantization for tuned in (True, False))
    assert tuned.memory_bytes == untuned.memory_bytes
    assert tuned.expert_products == untuned.expert_products
    tuning, backward = multiply_adds(tuned.work.tuning), multiply_adds(tuned.work.backward)
    assert not untuned.work.tuning
    assert tuned.forward_products - untuned.forward_products == pytest.approx(tuning)
    # Of 65,536 tokens both: a gradient is counted as two passes, after one forward; the original's has no output head.
    assert 1.5 * backward < tuning < 2 * backward
