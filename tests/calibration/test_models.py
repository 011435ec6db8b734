import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.calibration.conftest import layer_by_layer_logits, layerwise, transformers_logits
from tests.tiny_models import edit_config, make_qwen3
from vllm_mcmoe.calibration.model import weight_files
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import load_full_model
from vllm_mcmoe.calibration.model.weight_files import TensorFiles
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.errors import FormatError, UnsupportedModelError


def edit_tensors(model, edit) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors")


@pytest.fixture(params=["mixtral", "qwen3", "qwen3-tied-embeddings"])
def model_path(request, tmp_path, reference_model, qwen3_model):
    if request.param == "mixtral":
        return reference_model
    if request.param == "qwen3":
        return qwen3_model
    return make_qwen3(tmp_path / "tied", reference_model, tie_word_embeddings=True)


@pytest.fixture
def tokens():
    return torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(0))


def test_mixtral_is_described_from_its_config(reference_model):
    model = describe_model(reference_model)
    assert next(iter(model.moe_layers.values())) == "model.layers.0.block_sparse_moe.experts"
    assert (len(model.moe_layers), model.num_experts, model.top_k) == (4, 8, 2)
    assert model.part_shapes() == {"gate_up": [1024, 256], "down": [256, 512]}
    assert model.expert_tensor(model.moe_layers[1], 3, "w2") == "model.layers.1.block_sparse_moe.experts.3.w2"


def test_qwen3_dense_layers_are_not_moe_layers(qwen3_model):
    model = describe_model(qwen3_model)
    assert model.moe_layers == {1: "model.layers.1.mlp.experts", 2: "model.layers.2.mlp.experts"}


def test_qwen3_sparse_step_selects_every_second_layer(tmp_path, reference_model):
    path = make_qwen3(tmp_path / "m", reference_model, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[])
    assert list(describe_model(path).moe_layers) == [1, 3]


def test_layer_by_layer_logits_equal_transformers(model_path, tokens):
    # the same operations on the same numbers
    assert torch.equal(layer_by_layer_logits(model_path, tokens), transformers_logits(model_path, tokens))


def test_a_full_model_is_an_ordinary_transformers_model(model_path, tokens):
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, experts_implementation="eager")
    full = load_full_model(WeightFiles(describe_model(model_path)))
    with torch.no_grad():
        assert torch.equal(full(tokens).logits, reference(tokens).logits)


def test_a_layers_weights_are_dropped_after_use(reference_model, tokens):
    model = layerwise(reference_model)
    model.embed(tokens)
    with model.loaded_layer(0) as layer:
        assert layer.gate_up.device.type == "cpu"
    assert layer.gate_up.device.type == "meta"


def test_a_sliding_window_is_respected(editable_model, tokens):
    edit_config(editable_model, sliding_window=8)
    logits, expected = layer_by_layer_logits(editable_model, tokens), transformers_logits(editable_model, tokens)
    # one mask is shared by all sequences here, which changes the order of float32 sums
    assert torch.allclose(logits, expected, atol=1e-4)


def test_an_unsupported_architecture_is_refused_with_the_supported_ones(editable_model):
    edit_config(editable_model, architectures=["LlamaForCausalLM"], model_type="llama")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM is not supported; supported: Mix.*, Granite"):
        describe_model(editable_model)


def test_a_path_without_a_config_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"no config\.json"):
        describe_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, r"hidden_act is 'relu'; supported: silu"),
        ({"model_type": "no-such-type"}, r"transformers cannot read it"),
        ({"approximate_experts": {"1": [3]}}, r"config\.json: approximate_experts replaces experts by constants"),
    ],
)
def test_a_config_that_cannot_be_quantised_is_refused(editable_model, changes, message):
    edit_config(editable_model, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        describe_model(editable_model)


def test_reading_tensors_does_not_read_their_files_header_again(reference_model, monkeypatch):
    """A file of thousands of small experts has a header that takes longer to parse than any of them to read."""
    opened = []
    safe_open = weight_files.safe_open

    def counted(path, **options):
        opened.append(path)
        return safe_open(path, **options)

    monkeypatch.setattr(weight_files, "safe_open", counted)
    source = WeightFiles(describe_model(reference_model))
    for name in source.names():
        source.read(name)
    assert len(source.names()) > 100
    assert len(opened) == len(source.files.files)


def test_a_part_of_a_tensor_is_read_alone(tmp_path):
    tensor = torch.arange(2 * 3 * 4 * 5, dtype=torch.bfloat16).view(2, 3, 4, 5)
    save_file({"a": torch.ones(7), "x": tensor, "empty": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert torch.equal(files.read("x"), tensor)
    assert torch.equal(files.read("x", (1,)), tensor[1])
    assert torch.equal(files.read("x", (1, 2), slice(1, 3)), tensor[1, 2, 1:3])
    assert torch.equal(files.read("x", (), slice(1, None)), tensor[1:])
    assert files.read("empty").shape == (0, 4)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(FormatError, match=r"model\.safetensors: ends inside of tensor x"):
        files.read("x")


TENSOR = "model.layers.2.block_sparse_moe.experts.5.w3.weight"


def test_a_missing_expert_tensor_is_named(editable_model):
    edit_tensors(editable_model, lambda tensors: tensors.pop(TENSOR))
    with pytest.raises(UnsupportedModelError, match=f"tensor {TENSOR} is missing"):
        WeightFiles(describe_model(editable_model))


def test_a_misshapen_expert_tensor_is_named_with_both_shapes(editable_model):
    edit_tensors(editable_model, lambda tensors: tensors.update({TENSOR: torch.zeros(512, 128)}))
    with pytest.raises(UnsupportedModelError, match=rf"{TENSOR} has shape \[512, 128\].*\[512, 256\]"):
        WeightFiles(describe_model(editable_model))


def test_an_already_quantised_expert_tensor_is_refused(editable_model):
    edit_tensors(editable_model, lambda tensors: tensors.update({TENSOR: torch.zeros(512, 256, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModelError, match=f"{TENSOR} has dtype I8"):
        WeightFiles(describe_model(editable_model))


def test_a_missing_attention_tensor_is_named(editable_model, tokens):
    edit_tensors(editable_model, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))
    model = layerwise(editable_model)
    with pytest.raises(FormatError, match=r"model\.layers\.1 lacks self_attn\.o_proj\.weight"):
        model.load_layer(1)


def test_a_missing_embedding_is_named(editable_model):
    edit_tensors(editable_model, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(FormatError, match=r"model\.embed_tokens\.weight is missing"):
        layerwise(editable_model)


def test_a_shard_the_index_promises_must_exist(editable_model):
    index = {"weight_map": {TENSOR: "model-00002-of-00002.safetensors"}}
    (editable_model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"model-00002-of-00002\.safetensors: named in .* but missing"):
        WeightFiles(describe_model(editable_model))


def test_a_truncated_file_is_refused(editable_model):
    path = editable_model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FormatError, match=r"model\.safetensors: cannot be read as safetensors"):
        WeightFiles(describe_model(editable_model))
