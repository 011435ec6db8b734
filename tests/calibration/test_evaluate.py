import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.calibration.conftest import LENGTH
from tests.tiny_models import make_qwen3
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights, load_dequantized, open_weights
from vllm_mcmoe.calibration.evaluate.experts_forward import experts_forward, round_activations
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.matrix.linears import linear_widths
from vllm_mcmoe.calibration.measure.expert_tokens import moe_inputs
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_sequences
from vllm_mcmoe.errors import FormatError, UnsupportedModelError
from vllm_mcmoe.kernels.packing import PackedMatrix
from vllm_mcmoe.kernels.reference import fused_experts

BUDGET = {"sequences": 10, "length": LENGTH}
LAYER = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def text(reference_model, evaluation_files):
    return load_sequences(evaluation_files, AutoTokenizer.from_pretrained(reference_model), **BUDGET)


@pytest.fixture(scope="module")
def original(reference_model, evaluation_files):
    return evaluate(reference_model, evaluation_files, **BUDGET)


@pytest.fixture(scope="module")
def quantised(mixed_checkpoint, reference_model, evaluation_files):
    return evaluate(mixed_checkpoint, evaluation_files, against=reference_model, activations="float", **BUDGET)


def transformers_logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_perplexity_is_that_of_a_transformers_forward_pass(reference_model, original, text):
    model = AutoModelForCausalLM.from_pretrained(reference_model, dtype=torch.float32, experts_implementation="eager")
    log_probs = transformers_logits(model, text.tokens).log_softmax(-1)
    losses = -log_probs[:, :-1].gather(2, text.tokens[:, 1:, None]).squeeze(2)
    assert original.token_perplexity == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    drama = losses[text.file_ids == 0].mean()
    assert original.perplexity_by_file["drama.evaluation.txt"] == pytest.approx(math.exp(float(drama)), rel=1e-5)
    assert original.tokens == 10 * (LENGTH - 1)


def test_the_geometric_mean_counts_every_file_alike(original):
    product = math.prod(original.perplexity_by_file.values())
    assert len(original.perplexity_by_file) == 5
    assert original.geometric_mean_perplexity == pytest.approx(product ** (1 / 5))


def test_kl_and_agreement_follow_their_definitions(mixed_checkpoint, reference_model, quantised, text):
    reference = AutoModelForCausalLM.from_pretrained(
        reference_model, dtype=torch.float32, experts_implementation="eager"
    )
    expected = transformers_logits(reference, text.tokens).log_softmax(-1)
    log_probs = transformers_logits(load_dequantized(mixed_checkpoint), text.tokens).log_softmax(-1)
    kl = (expected.exp() * (expected - log_probs)).sum(-1)
    assert quantised.mean_kl == pytest.approx(float(kl.mean()), rel=1e-4)
    for name, share in (("median", 0.5), ("99%", 0.99), ("99.9%", 0.999)):
        assert quantised.kl_quantiles[name] == pytest.approx(float(kl.flatten().quantile(share)), rel=1e-3)
    before, after = (-p[:, :-1].gather(2, text.tokens[:, 1:, None]).flatten().double() for p in (expected, log_probs))
    ratio = math.exp(float(after.mean())) / math.exp(float(before.mean()))
    assert quantised.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    # a bootstrap over tokens
    torch.manual_seed(0)
    drawn = torch.randint(len(before), (2000, len(before)))
    spread = (after - before)[drawn].mean(1).exp().std()
    assert quantised.perplexity_ratio_error == pytest.approx(float(spread), rel=0.1)
    agreement = (expected.argmax(-1) == log_probs.argmax(-1)).float().mean()
    assert quantised.top1_agreement == pytest.approx(float(agreement), abs=1e-3)  # near-ties may fall either way


def test_a_model_agrees_with_itself(reference_model, evaluation_files):
    result = evaluate(reference_model, evaluation_files, against=reference_model, sequences=5, length=64)
    assert result.mean_kl == 0
    assert result.top1_agreement == 1
    assert set(result.kl_quantiles.values()) == {0.0}
    assert (result.perplexity_ratio, result.perplexity_ratio_error) == (1, 0)


def test_without_against_there_is_no_comparison(original):
    assert original.mean_kl is None and original.top1_agreement is None and original.against is None
    assert original.kl_quantiles is None and original.perplexity_ratio is None


def test_sizes_of_a_16_bit_model(original):
    assert original.average_bits == {"experts": 16.0, "model": 16.0}
    assert original.expert_bytes == 4 * 8 * 3 * 256 * 512 * 2
    assert original.activations == "float"


def test_sizes_of_a_checkpoint_are_those_of_its_tensors(mixed_checkpoint, quantised):
    tensors = {}
    for path in mixed_checkpoint.glob("*.safetensors"):
        tensors.update(load_file(path))
    assert quantised.total_bytes == sum(t.nbytes for t in tensors.values())
    assert quantised.expert_bytes == sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    written = json.loads((mixed_checkpoint / "config.json").read_text())["quantization_config"]["average_bits"]
    assert quantised.average_bits == pytest.approx(written, abs=1e-4)


def test_int8_activations_compute_what_the_reference_kernel_computes(mixed_checkpoint, text):
    weights = open_weights(mixed_checkpoint)
    model = LayerwiseModel(weights)
    hidden = model.embed(text.tokens[:1])
    with torch.no_grad(), model.loaded_layer(0) as layer:
        inputs = moe_inputs(layer, hidden)
        arguments = (inputs.x, inputs.topk_ids, inputs.topk_weights)
        out = experts_forward(layer, round_activations, None)(*arguments)
    name = weights.model.moe_layers[0]

    def matrix(expert: int, projection: str) -> PackedMatrix:
        return weights.read_matrix(f"{name}.{expert}.{projection}")

    def stacked(expert: int) -> PackedMatrix:
        gate, up = matrix(expert, "w1"), matrix(expert, "w3")
        zeros = None if gate.zeros is None else torch.cat([gate.zeros, up.zeros])
        return PackedMatrix(
            gate.bits, torch.cat([gate.qweight, up.qweight]), torch.cat([gate.scales, up.scales]), zeros
        )

    gate_up, down = [stacked(e) for e in range(8)], [matrix(e, "w2") for e in range(8)]
    expected = fused_experts(inputs.x, inputs.topk_weights, inputs.topk_ids, gate_up, down)
    # A float32 rounding difference in the intermediate moves one in some thousand of its codes by a step of 1/127 of
    # the group's maximum.
    assert (out - expected).norm() < 1e-3 * expected.norm()


def test_int8_activations_cost_little(mixed_checkpoint, quantised, evaluation_files):
    integer = evaluate(mixed_checkpoint, evaluation_files, activations="int8", **BUDGET)
    assert integer.activations == "int8"
    assert integer.token_perplexity != quantised.token_perplexity
    assert integer.token_perplexity == pytest.approx(quantised.token_perplexity, rel=0.01)


def test_dequantised_linears_are_those_of_the_library(mixed_checkpoint, reference_model):
    weights = open_weights(mixed_checkpoint)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert linear_widths(weights.config.linear)(name) == 4
    original = open_weights(reference_model).read(name).float()
    dequantised = weights.read(name)
    assert (dequantised - original).norm() < 0.25 * original.norm()  # 4 bits, compensated: 0.1 to 0.2
    assert len(dequantised[0, :128].unique()) <= 16


def test_results_are_json(quantised):
    document = json.loads(json.dumps(quantised.to_dict()))
    assert document["average_bits"].keys() == {"experts", "model"}
    assert document["against"].endswith("tiny-mixtral")


def test_files_of_one_name_are_told_apart(tmp_path, reference_model, evaluation_files):
    for domain in ("a", "b"):
        (tmp_path / domain).mkdir()
        (tmp_path / domain / "text.txt").write_text(evaluation_files[0].read_text())
    files = [tmp_path / "a" / "text.txt", tmp_path / "b" / "text.txt"]
    result = evaluate(reference_model, files, sequences=2, length=32)
    assert list(result.perplexity_by_file) == [str(path) for path in files]


def test_models_of_different_vocabularies_cannot_be_compared(tmp_path, reference_model, evaluation_files):
    other = make_qwen3(tmp_path / "other", reference_model, vocab_size=5000)
    with pytest.raises(UnsupportedModelError, match="vocabulary of 5000 tokens"):
        evaluate(reference_model, evaluation_files, against=other)


def edit_config(checkpoint, edit) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(checkpoint, edit) -> None:
    """Edit all tensors together; they end up in one file."""
    path, *others = sorted(checkpoint.glob("*.safetensors"))
    tensors = {name: tensor for file in (path, *others) for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, path)
    for file in others:
        file.unlink()
    index = checkpoint / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = dict.fromkeys(tensors, path.name)
    index.write_text(json.dumps(document))


def open_checkpoint(path) -> CheckpointWeights:
    return CheckpointWeights(describe_model(path))


def test_a_newer_format_is_refused(editable_checkpoint):
    edit_config(editable_checkpoint, lambda config: config.update(format_version=4))
    with pytest.raises(FormatError, match=r"format_version is 4.*upgrade"):
        open_checkpoint(editable_checkpoint)


@pytest.mark.parametrize("suffix", ["qweight", "scales", "zeros"])
def test_a_missing_tensor_is_named(editable_checkpoint, suffix):
    name = f"{LAYER}.0.w1.{suffix}"
    edit_tensors(editable_checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(FormatError, match=f"tensor {name} is missing"):
        open_checkpoint(editable_checkpoint)


def test_a_misshapen_tensor_is_named_with_both_shapes(editable_checkpoint):
    name = f"{LAYER}.0.w2.scales"
    edit_tensors(editable_checkpoint, lambda tensors: tensors.update({name: torch.ones(256, 2).half()}))
    with pytest.raises(FormatError, match=rf"{name} is F16 \[256, 2\]; a w2 of 3 bits needs F16 \[256, 4\]"):
        open_checkpoint(editable_checkpoint)


def test_widths_that_contradict_the_tensors_are_refused(editable_checkpoint):
    edit_config(editable_checkpoint, lambda config: config["experts"][LAYER]["gate_up"].__setitem__(0, 4))
    with pytest.raises(FormatError, match=rf"{LAYER}\.0\.w1\.qweight is U8 \[512, 2, 32\]; a w1 of 4 bits needs"):
        open_checkpoint(editable_checkpoint)


def test_a_layer_the_config_does_not_list_is_refused(editable_checkpoint):
    edit_config(editable_checkpoint, lambda config: config["experts"].pop(LAYER))
    with pytest.raises(FormatError, match=f"MoE layers differ in {LAYER}"):
        open_checkpoint(editable_checkpoint)


def test_a_wrong_number_of_experts_is_refused(editable_checkpoint):
    def drop(config) -> None:
        for widths in config["experts"][LAYER].values():
            widths.pop()

    edit_config(editable_checkpoint, drop)
    with pytest.raises(FormatError, match=f"{LAYER} has widths for 7 experts, the model has 8"):
        open_checkpoint(editable_checkpoint)
