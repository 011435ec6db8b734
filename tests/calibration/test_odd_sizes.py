"""Hidden and intermediate sizes that are no multiples of 128, from measuring to the checkpoint's evaluation."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.calibration.conftest import QUICK
from tests.tiny_models import make_tiny
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import load_dequantized
from vllm_mcmoe.calibration.evaluate.inspection import inspect_checkpoint
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.quantize import checkpoint_run
from vllm_mcmoe.checkpoint import read_checkpoint_config

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 192, 160, 4, 2
LAYER = "model.layers.1.block_sparse_moe.experts"
RECIPE = dataclasses.replace(QUICK, widths=(1, 2, 3, 4))
OPTIONS = {"bits": 4.5, "recipe": RECIPE, "sequences": 4, "length": 64, "show_progress": False}


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory, reference_model) -> Path:
    directory = tmp_path_factory.mktemp("odd") / "tiny-mixtral-odd"
    return make_tiny("mixtral", directory, reference_model, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)


@pytest.fixture(scope="module")
def odd_checkpoint(tmp_path_factory, odd_model, calibration_files) -> Path:
    out = tmp_path_factory.mktemp("odd-quantised") / "out"
    quantize(odd_model, out, calibration_files, **OPTIONS)
    return out


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_groups_are_rounded_up_and_rows_are_not(odd_checkpoint):
    config, tensors = read_checkpoint_config(odd_checkpoint), tensors_of(odd_checkpoint)
    for expert in range(EXPERTS):
        for projection, bits, rows in (
            ("w1", config.experts[LAYER].gate_up[expert], INTERMEDIATE),
            ("w3", config.experts[LAYER].gate_up[expert], INTERMEDIATE),
            ("w2", config.experts[LAYER].down[expert], HIDDEN),
        ):
            assert tensors[f"{LAYER}.{expert}.{projection}.qweight"].shape == (rows, 2, 16 * bits)
            assert tensors[f"{LAYER}.{expert}.{projection}.scales"].shape == (rows, 2)


def test_the_padding_is_paid_for_out_of_the_budget(odd_checkpoint):
    """2 groups for 192 or 160 columns are a third to a half more bytes than the weights need; all of them count."""
    average_bits = read_checkpoint_config(odd_checkpoint).average_bits["experts"]
    written = sum(t.nbytes for name, t in tensors_of(odd_checkpoint).items() if ".experts." in name)
    weights = LAYERS * EXPERTS * 3 * HIDDEN * INTERMEDIATE
    assert average_bits == pytest.approx(8 * written / weights, abs=1e-4)
    assert average_bits == pytest.approx(Plan.load(odd_checkpoint / "plan.json").average_bits, abs=1e-4)
    assert 4.2 < average_bits <= 4.5
    summary = inspect_checkpoint(odd_checkpoint)
    assert (summary.expert_parameters, summary.warnings) == (weights, [])
    assert summary.expert_bits == pytest.approx(average_bits, abs=1e-4)


def test_the_checkpoint_predicts_as_the_model_does(odd_model, odd_checkpoint, calibration_files):
    dequantised = load_dequantized(odd_checkpoint)
    assert dequantised.model.layers[0].mlp.experts.gate_up_proj.shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    result = evaluate(odd_checkpoint, calibration_files, against=odd_model, sequences=4, length=64, show_progress=False)
    assert result.top1_agreement > 0.3  # 0.48; random weights agree on 1 in 4096
    assert result.average_bits["experts"] == pytest.approx(
        read_checkpoint_config(odd_checkpoint).average_bits["experts"], abs=1e-4
    )


def test_linears_of_192_inputs_get_groups_of_64(odd_checkpoint):
    linear = read_checkpoint_config(odd_checkpoint).linear
    assert linear["config_groups"]["group_0"]["weights"]["group_size"] == 64
    tensors = tensors_of(odd_checkpoint)
    assert tensors["model.layers.0.self_attn.q_proj.weight_scale"].shape == (HIDDEN, 3)


def test_a_run_continued_after_its_first_layer_writes_the_same(
    tmp_path, odd_model, odd_checkpoint, calibration_files, monkeypatch
):
    def stop_before_the_last(model, index, *arguments):
        if index == LAYERS - 1:
            raise KeyboardInterrupt
        return finish(model, index, *arguments)

    finish = checkpoint_run.quantize_layer
    monkeypatch.setattr(checkpoint_run, "quantize_layer", stop_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        quantize(odd_model, tmp_path / "out", calibration_files, **OPTIONS)
    monkeypatch.setattr(checkpoint_run, "quantize_layer", finish)
    quantize(odd_model, tmp_path / "out", calibration_files, **OPTIONS)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(odd_checkpoint))
    for path in odd_checkpoint.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
