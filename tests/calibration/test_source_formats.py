"""Models that are not released in 16 bits are calibrated as what their weights stand for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests.calibration.conftest import QUICK
from tests.released_forms import FP4, INT4, edit_tensors, in_fp8, in_int4, in_mxfp4, without_form
from tests.tiny_models import edit_config, make_tiny
from vllm_mcmoe.calibration.checkpoint.writer import FACTORS_FILE
from vllm_mcmoe.calibration.evaluate.inspection import inspect_model
from vllm_mcmoe.calibration.evaluate.resources import plan_resources
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.checkpoint import QUANT_METHOD
from vllm_mcmoe.errors import FormatError, UnsupportedModelError

KINDS = ("deepseek-v3", "gpt-oss")
FORMS = {
    "fp8": ("deepseek-v3", in_fp8),
    "fp8, ragged blocks": ("deepseek-v3", lambda model: in_fp8(model, block=(96, 80))),
    "int4": ("deepseek-v3", in_int4),
    "mxfp4": ("gpt-oss", in_mxfp4),
}
EXPERT = "model.layers.1.mlp.experts.3.up_proj"
STACKED = "model.layers.1.mlp.experts.down_proj"  # of gpt-oss


@pytest.fixture(scope="module")
def models(tmp_path_factory, reference_model) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bf16")
    return {kind: make_tiny(kind, folder / kind, reference_model) for kind in KINDS}


@pytest.fixture(scope="module")
def released(models, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("released")
    return {form: write(Path(shutil.copytree(models[kind], folder / form))) for form, (kind, write) in FORMS.items()}


@pytest.fixture
def copy(released, tmp_path):
    return lambda form: Path(shutil.copytree(released[form], tmp_path / "model"))


def in_16_bits(model: Path, out: Path) -> Path:
    """A copy with its weights as they are read."""
    source = WeightFiles(describe_model(model))
    shutil.copytree(model, out)
    save_file({name: source.read(name) for name in source.names()}, out / "model.safetensors")
    without_form(out)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_names_shapes_and_sizes_are_those_of_the_16_bit_model(form, models, released):
    found, expected = (WeightFiles(describe_model(path)) for path in (released[form], models[FORMS[form][0]]))
    assert sorted(found.names()) == sorted(expected.names())
    for name in expected.names():
        assert found.read(name).shape == expected.read(name).shape
        assert found.numel(name) == expected.numel(name)
        assert found.read(name).dtype == expected.read(name).dtype


def test_fp8_is_read_as_transformers_reads_it(released):
    source, stored = WeightFiles(describe_model(released["fp8"])), load_file(released["fp8"] / "model.safetensors")
    quantised = [name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(quantised) > 50
    for name in quantised:
        scales = stored[name.replace(".weight", ".weight_scale_inv")]
        if any(size % 128 for size in stored[name].shape):  # transformers takes whole blocks only
            continue
        expected = Fp8Dequantize(None)._dequantize_one(stored[name], scales, torch.bfloat16)
        assert torch.equal(source.read(name), expected), name


def test_a_smaller_last_block_has_its_own_scale(released):
    form = released["fp8, ragged blocks"]
    weight = WeightFiles(describe_model(form)).read(f"{EXPERT}.weight")
    stored = load_file(form / "model.safetensors")
    codes, scales = stored[f"{EXPERT}.weight"].float(), stored[f"{EXPERT}.weight_scale_inv"]
    assert scales.shape == (2, 2)
    assert torch.equal(weight[96:, 80:], (codes[96:, 80:] * scales[1, 1]).bfloat16())
    assert torch.equal(weight[:96, :80], (codes[:96, :80] * scales[0, 0]).bfloat16())


def test_int4_is_read_as_compressed_tensors_reads_it(released):
    stored = load_file(released["int4"] / "model.safetensors")
    suffixes = ("weight_packed", "weight_scale", "weight_shape")
    expected = PackedQuantizationCompressor.decompress({s: stored[f"{EXPERT}.{s}"] for s in suffixes}, INT4)["weight"]
    found = WeightFiles(describe_model(released["int4"])).read(f"{EXPERT}.weight")
    assert torch.equal(found, expected)
    assert found.dtype == torch.bfloat16


def test_mxfp4_is_read_as_its_definition_says_with_gate_and_up_in_alternating_rows(released):
    """Open Compute's microscaling formats: 4-bit floats, two in a byte, low half first, times 2^(s - 127)."""
    source, stored = WeightFiles(describe_model(released["mxfp4"])), load_file(released["mxfp4"] / "model.safetensors")
    values = torch.cat([FP4, -FP4])
    layer = EXPERT.rpartition(".3.")[0]
    for part, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        blocks, scales = (stored[f"{layer}.{part}_{kind}"][3] for kind in ("blocks", "scales"))
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1)
        weight = pairs.flatten(-2) * 2.0 ** (scales.float() - 127)[..., None]
        for first, projection in enumerate(projections):
            found = source.read(f"{layer}.3.{projection}.weight")
            assert found.dtype == torch.bfloat16
            assert torch.equal(found.float(), weight.flatten(1)[first :: len(projections)]), projection
            bias = source.read(f"{layer}.3.{projection}.bias")
            assert torch.equal(bias, stored[f"{layer}.{part}_bias"][3, first :: len(projections)]), projection


@pytest.mark.parametrize("form", FORMS)
def test_factors_and_checkpoint_are_those_of_a_16_bit_copy_to_the_last_bit(form, released, tmp_path, calibration_files):
    options = {"bits": 3.0, "recipe": QUICK, "sequences": 4, "length": 64, "show_progress": False}
    outputs = []
    for name, model in (("released", released[form]), ("copy", in_16_bits(released[form], tmp_path / "copy-model"))):
        quantize(model, tmp_path / name, calibration_files, **options)
        outputs.append(tmp_path / name)
    factors = [json.loads((out / FACTORS_FILE).read_text()) | {"model": ""} for out in outputs]
    assert factors[0] == factors[1]
    shards = [sorted(out.glob("*.safetensors")) for out in outputs]
    assert len(shards[0]) == len(shards[1]) > 1
    for one, other in zip(*shards, strict=True):
        assert one.read_bytes() == other.read_bytes()
    config = json.loads((outputs[0] / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == QUANT_METHOD


def test_what_a_model_is_in_is_said_and_its_files_are_as_large_as_that(released):
    summary = inspect_model(released["fp8"], bits=2.5)
    assert summary.source == "FP8 in blocks of 128 x 128"
    needs = plan_resources(released["fp8"], bits=2.5)
    assert needs.quantization.model_bytes == pytest.approx(
        (released["fp8"] / "model.safetensors").stat().st_size, rel=0.1
    )
    assert inspect_model(released["int4"], bits=2.5).source == "INT4 in groups of 32"
    summary = inspect_model(released["mxfp4"], bits=2.5)
    assert summary.source == "MXFP4 in blocks of 32"
    assert summary.model_bytes == pytest.approx((released["mxfp4"] / "model.safetensors").stat().st_size, rel=0.02)


def test_a_form_inside_a_wrappers_text_config_is_found_and_dropped(tmp_path, reference_model):
    model = make_tiny("qwen3.5-vision", tmp_path / "model", reference_model)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    description = describe_model(model)
    assert description.source_format.label == "FP8 in blocks of 128 x 128"
    assert "quantization_config" not in description.read_config()["text_config"]


# ---- bad input, before any work


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def replace(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (
            "fp8",
            drop(f"{EXPERT}.weight_scale_inv"),
            rf"model\.safetensors: tensor {EXPERT}\.weight_scale_inv is missing",
        ),
        ("fp8", drop(f"{EXPERT}.weight"), rf"tensor {EXPERT}\.weight is missing, which {EXPERT}\.weight_scale_inv"),
        (
            "fp8",
            replace(f"{EXPERT}.weight_scale_inv", torch.ones(2, 1)),
            rf"{EXPERT}\.weight_scale_inv has shape \[2, 1\]; the weight, \[128, 128\], has \[1, 1\] blocks",
        ),
        ("int4", drop(f"{EXPERT}.weight_scale"), rf"tensor {EXPERT}\.weight_scale is missing, which .*weight_packed"),
        ("int4", drop(f"{EXPERT}.weight_packed"), rf"tensor {EXPERT}\.weight_packed is missing"),
        (
            "int4",
            replace(f"{EXPERT}.weight_scale", torch.ones(128, 3)),
            rf"{EXPERT}\.weight_scale has shape \[128, 3\].*4 groups of 32 in each of 128 rows",
        ),
        ("mxfp4", drop(f"{STACKED}_scales"), rf"tensor {STACKED}_scales is missing, which {STACKED}_blocks"),
        ("mxfp4", drop(f"{STACKED}_blocks"), rf"tensor {STACKED}_blocks is missing, which {STACKED}_scales"),
        ("mxfp4", drop(f"{STACKED}_bias"), rf"tensor {STACKED}_bias is missing; config\.json promises 8 experts"),
        (
            "mxfp4",
            replace(f"{STACKED}_scales", torch.zeros(8, 128, 4, dtype=torch.uint8)),
            rf"{STACKED}_scales is U8 \[8, 128, 4\]; {STACKED}_blocks, \[8, 128, 5, 16\], has U8 \[8, 128, 5\] blocks",
        ),
        (
            "mxfp4",
            replace(f"{STACKED}_blocks", torch.zeros(8, 128, 80, dtype=torch.uint8)),
            rf"{STACKED}_blocks is U8 \[8, 128, 80\], expected U8 \[experts, rows, blocks, 16\]",
        ),
        (
            "mxfp4",
            replace(f"{STACKED}_bias", torch.zeros(8, 64)),
            rf"{STACKED}_bias has shape \[8, 64\], config\.json implies \[8, 128\]",
        ),
        (
            "int4",
            replace(f"{EXPERT}.weight_packed", torch.ones(64, 16, dtype=torch.int32)),
            rf"{EXPERT}\.weight_scale has shape \[128, 4\].*64 rows",
        ),
    ],
)
def test_incomplete_weights_are_named(form, change, message, copy):
    model = copy(form)
    edit_tensors(model, change)
    with pytest.raises((FormatError, UnsupportedModelError), match=message):
        WeightFiles(describe_model(model))


def test_fp8_without_a_word_in_the_config_is_refused(copy):
    model = copy("fp8")
    without_form(model)
    with pytest.raises(UnsupportedModelError, match=r"has dtype F8_E4M3, and no quantization_config in config\.json"):
        WeightFiles(describe_model(model))


@pytest.mark.parametrize(
    ("form", "method"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "fp8"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
            "compressed-tensors",
        ),
        ({"bits": 4}, "unnamed"),
    ],
)
def test_another_form_is_refused_by_name_and_with_the_way_out(form, method, copy):
    model = copy("fp8")
    edit_config(model, quantization_config=form)
    with pytest.raises(
        UnsupportedModelError, match=rf"quantised already \({method}\), in a form.*Start from its release in"
    ):
        describe_model(model)
