"""What users' files and habits bring: the right outcome, or one error that says what is wrong before any long work."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibration.conftest import LENGTH, SEQUENCES, layerwise
from tests.tiny_models import edit_config, make_tiny
from vllm_mcmoe.calibration.measure.factors import Factors, LayerFactors
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.text import find_data_files, load_calibration_data, read_text
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.errors import DataError, FormatError, PlanError, UnsupportedModelError


def factors_like(path: Path, **changes: int) -> Factors:
    """Of a model's sizes but for the changes: layers, experts, intermediate."""
    model = describe_model(path)
    experts = changes.get("experts", model.num_experts)
    intermediate = changes.get("intermediate", model.intermediate)
    ones = [1.0] * experts
    layer = LayerFactors(
        activation_count=ones,
        routing_weight_sum=ones,
        quantization_error={2: ones, 4: ones},
        shapes={"gate_up": [2 * intermediate, model.hidden], "down": [model.hidden, intermediate]},
        loss_increase={part: {2: ones, 4: ones} for part in ("gate_up", "down")},
    )
    names = list(model.moe_layers.values())
    if changes.get("rename"):
        names[0] = names[0].replace("layers.0.", "layers.00.")
    return Factors("another/model", 100, 2, dict.fromkeys(names[: changes.get("layers", len(names))], layer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rename": 1}, r"another/model: they lack model\.layers\.0\."),
        ({"layers": 2}, r"they lack model\.layers\.2\."),
        ({"experts": 4}, "has 4 experts there, and 8 in this one"),
        ({"experts": 16}, "has 16 experts there, and 8 in this one"),
        ({"intermediate": 128}, r"an expert of .* has shapes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_factors_of_another_model_are_refused(reference_model, calibration_files, tmp_path, changes, message):
    with pytest.raises(PlanError, match=message):
        quantize(
            reference_model,
            tmp_path / "out",
            calibration_files,
            factors=factors_like(reference_model, **changes),
            bits=2.5,
            sequences=SEQUENCES,
            length=LENGTH,
        )
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("bits", [0.5, 1, 8, float("nan"), float("inf"), -2])
def test_bits_that_no_plan_has_are_refused_before_measuring(reference_model, calibration_files, tmp_path, bits):
    with pytest.raises(PlanError, match=r"feasible are 1\.0886 to 4\.0885|is not a positive number"):
        quantize(reference_model, tmp_path / "out", calibration_files, bits=bits)
    assert not (tmp_path / "out.partial").exists()


def test_reports_of_an_earlier_run_in_the_models_directory_do_not_replace_the_new_ones(
    editable_model, calibration_files, tmp_path, quick_recipe, qwen3_model
):
    for name in ("plan.json", "factors.json", "quantization_report.json"):
        (editable_model / name).write_text('{"stale": true}')
    (editable_model / "notes.txt").write_text("kept")
    out = tmp_path / "out"
    quantize(editable_model, out, calibration_files, bits=2.5, recipe=quick_recipe, sequences=SEQUENCES, length=LENGTH)
    for name in ("plan.json", "factors.json", "quantization_report.json"):
        assert "stale" not in (out / name).read_text()
    assert (out / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_user_wants_for_new_ones(mixed_checkpoint, tmp_path, umask):
    from vllm_mcmoe.calibration.checkpoint.writer import Shard
    from vllm_mcmoe.calibration.common.documents import save_document

    shard = Shard()
    shard.add("x", torch.zeros(2))
    before = os.umask(umask)
    try:
        shard.write(tmp_path / "x.safetensors")
        save_document({}, tmp_path / "x.json")
    finally:
        os.umask(before)
    for name in ("x.safetensors", "x.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


CONFIGS_THAT_VLLM_DISREGARDS = [
    ("olmoe", {"attention_bias": True}, "attention_bias is True; vLLM's OLMoE has False"),
    ("olmoe", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06; vLLM's OLMoE has 1e-05"),
    ("qwen2", {"qkv_bias": False}, "qkv_bias is False; vLLM's Qwen2-MoE has True"),
    ("qwen2", {"head_dim": 64}, "head_dim is 64; vLLM's Qwen2-MoE has 32"),
    ("granite", {"attention_bias": True}, "attention_bias is True; vLLM's Granite-MoE has False"),
    ("deepseek-v2", {"attention_bias": True}, "attention_bias is True; vLLM's DeepSeek-V2 has False"),
    ("deepseek-v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; vLLM's DeepSeek-V2 has 'softmax'"),
    ("deepseek-v3", {"rope_interleave": False}, "rope_interleave is False; vLLM's DeepSeek-V3 has True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types mixes"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), CONFIGS_THAT_VLLM_DISREGARDS)
def test_values_that_vllms_model_disregards_are_refused(tmp_path, reference_model, kind, changes, message):
    model = make_tiny(kind, tmp_path / kind, reference_model)
    describe_model(model)
    edit_config(model, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        describe_model(model)


@pytest.mark.parametrize("kind", ["olmoe", "qwen2", "granite"])
def test_a_head_size_that_is_left_to_the_model_is_not_refused(tmp_path, reference_model, kind):
    model = make_tiny(kind, tmp_path / kind, reference_model)
    edit_config(model, head_dim=None)
    describe_model(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than the 8 experts of a layer"),
        ({"hidden_size": "256"}, "config.json"),
        ({"num_hidden_layers": [1]}, "config.json"),
        ({"architectures": "MixtralForCausalLM"}, "architectures is 'MixtralForCausalLM', expected a list"),
        ({"quantization_config": [1]}, "config.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_of_another_type_are_named(editable_model, changes, message):
    edit_config(editable_model, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        describe_model(editable_model)


@pytest.mark.parametrize(("text", "message"), [("{", "not a JSON file"), ("[]", "expected an object, found a list")])
def test_a_config_that_is_no_object_is_refused(editable_model, text, message):
    (editable_model / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=rf"config\.json: {message}"):
        describe_model(editable_model)


@pytest.mark.parametrize("entry", [["a.safetensors"], 3, {"file": "a"}, None])
def test_an_index_that_maps_to_no_files_is_refused(editable_model, entry):
    (editable_model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": entry}}))
    with pytest.raises(FormatError, match=r"index\.json: not a safetensors index"):
        WeightFiles(describe_model(editable_model))


def test_a_checkpoint_of_ours_is_not_quantised_again(mixed_checkpoint, calibration_files, tmp_path):
    with pytest.raises(
        UnsupportedModelError, match="is a checkpoint of `mcmoe quantize` already; start from the 16-bit"
    ):
        quantize(mixed_checkpoint, tmp_path / "out", calibration_files, bits=2.5)


def test_a_model_without_tokenizer_is_named(editable_model, calibration_files):
    for path in editable_model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match="its tokenizer cannot be loaded"):
        load_calibration_data(describe_model(editable_model), calibration_files, 4, 32, print)


def test_tokens_that_the_model_has_no_embedding_for_are_named(editable_model, calibration_files):
    edit_config(editable_model, vocab_size=100)
    with pytest.raises(DataError, match=r"has embeddings of 100 tokens only.*resize its embeddings"):
        load_calibration_data(describe_model(editable_model), calibration_files, 4, 32, print)


def edited(model: Path, **tensors: torch.Tensor) -> Path:
    path = model / "model.safetensors"
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return model


def test_tables_of_rotary_embeddings_of_old_files_are_left_out(editable_model):
    name = "model__layers__1__self_attn__rotary_emb__inv_freq"
    model = layerwise(edited(editable_model, **{name: torch.zeros(16)}))
    model.load_layer(1)
    assert name.replace("__", ".") not in model.source.names()


def test_tensors_outside_the_decoder_that_the_class_lacks_are_left_out_of_the_checkpoint(
    editable_model, calibration_files, tmp_path, quick_recipe
):
    edited(editable_model, model__visual__patch_embed__weight=torch.zeros(4, 4))
    messages: list[str] = []
    out = tmp_path / "out"
    quantize(
        editable_model,
        out,
        calibration_files,
        bits=2.5,
        recipe=quick_recipe,
        sequences=SEQUENCES,
        length=LENGTH,
        log=messages.append,
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert not any("visual" in name for name in index["weight_map"])
    assert any("Left out, since MixtralForCausalLM has no such tensors: model.visual" in line for line in messages)


def test_a_list_of_texts_and_suffixes_in_any_case_are_read_as_what_they_are(tmp_path):
    (tmp_path / "a.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.json").write_text('["three", {"text": "four"}]')
    read = {path: read_text(tmp_path / path, separator="|", max_characters=100) for path in ("a.JSONL", "b.json")}
    assert read == {"a.JSONL": "one|two", "b.json": "three|four"}
    assert find_data_files([tmp_path]) == [tmp_path / "a.JSONL"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x"}', "expected a list of texts, found a dict"),
        ('["x", 3]', 'entry 1: expected a string or an object with a "text" string, found 3'),
        ('{"text": "x"}\n{"text": "y"}', r"one object per line belongs in a \.jsonl file"),
    ],
)
def test_a_json_file_that_is_no_list_of_texts_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_text(tmp_path / "a.json", separator="|", max_characters=100)
