"""Every supported architecture, as a tiny random model of the real transformers class, below the engine."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.calibration.conftest import QUICK, layer_by_layer_logits, layerwise, transformers_logits
from tests.tiny_models import SIZES, TINY_MODELS, edit_config, make_tiny
from vllm_mcmoe.calibration.checkpoint.workdir import working_on
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights, load_dequantized, open_weights
from vllm_mcmoe.calibration.evaluate.inspection import inspect_model
from vllm_mcmoe.calibration.measure.factors import Factors
from vllm_mcmoe.calibration.model.activations import ActivationStore
from vllm_mcmoe.calibration.model.description import MoeModel, describe_model
from vllm_mcmoe.calibration.model.families import FAMILIES
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel, load_full_model
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.recipes import TuningOptions
from vllm_mcmoe.calibration.tune.streaming import final_states, kl_gradients
from vllm_mcmoe.calibration.tune.tunables import TunedWeights, find_tunables
from vllm_mcmoe.calibration.tune.tuning import write_shard
from vllm_mcmoe.checkpoint import read_checkpoint_config
from vllm_mcmoe.errors import FormatError, UnsupportedModelError

SEQUENCES, LENGTH = 6, 64


@pytest.fixture(scope="module")
def make(tmp_path_factory, reference_model):
    """make(kind, **changes): a tiny model's directory, made once."""
    made: dict[str, Path] = {}

    def make(kind: str, **changes) -> Path:
        key = f"{kind} {changes}"
        if key not in made:
            made[key] = make_tiny(kind, tmp_path_factory.mktemp(kind) / "model", reference_model, **changes)
        return made[key]

    return make


@dataclass
class Quantized:
    """model: what the checkpoint was made of; factors: what was measured on the way."""

    model: Path
    checkpoint: Path
    factors: Factors

    @property
    def description(self) -> MoeModel:
        return describe_model(self.model)


@pytest.fixture(scope="module")
def quantized(make, tmp_path_factory, calibration_files):
    """quantized(kind): a tiny model at 3 bits, linears at 4, made once."""
    done: dict[str, Quantized] = {}

    def quantized(kind: str) -> Quantized:
        if kind not in done:
            out = tmp_path_factory.mktemp(kind) / "checkpoint"
            options = {"recipe": QUICK, "sequences": SEQUENCES, "length": LENGTH, "show_progress": False}
            quantize(make(kind), out, calibration_files, bits=3.0, **options)
            done[kind] = Quantized(make(kind), out, Factors.load(out / "factors.json"))
        return done[kind]

    return quantized


@pytest.fixture
def tokens():
    return torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(0))


def test_every_family_has_a_tiny_model():
    made = {tiny.architecture or tiny.config.__name__.replace("Config", "ForCausalLM") for tiny in TINY_MODELS.values()}
    assert made == set(FAMILIES)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_a_model_is_described_from_its_config_alone(kind, make, tmp_path):
    shutil.copy2(make(kind) / "config.json", tmp_path)
    model = describe_model(tmp_path)
    assert tuple(model.moe_layers) == TINY_MODELS[kind].moe_layers
    assert model.hidden == 128
    sizes = TINY_MODELS[kind].sizes
    assert model.intermediate == sizes.get("moe_intermediate_size", (SIZES | sizes)["intermediate_size"])
    assert model.num_experts == next(sizes[key] for key in sizes if key.endswith("_experts") and "shared" not in key)
    keys = ("top_k_experts", "num_experts_per_tok")
    assert model.top_k == next((sizes[key] for key in keys if key in sizes), 2)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_layer_by_layer_logits_equal_transformers(kind, make, tokens):
    # the same operations on the same numbers
    assert torch.equal(layer_by_layer_logits(make(kind), tokens), transformers_logits(make(kind), tokens))


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_a_full_model_is_an_ordinary_transformers_model(kind, make, tokens):
    full = load_full_model(WeightFiles(describe_model(make(kind))))
    with torch.no_grad():
        assert torch.equal(full(tokens).logits, transformers_logits(make(kind), tokens))


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_every_token_is_counted_for_the_experts_it_selects(kind, quantized):
    model, factors = quantized(kind).description, quantized(kind).factors
    assert list(factors.layers) == list(model.moe_layers.values())
    for layer in factors.layers.values():
        assert sum(layer.activation_count) == SEQUENCES * LENGTH * model.top_k
        for count, weight in zip(layer.activation_count, layer.routing_weight_sum, strict=True):
            assert (weight > 0) == (count > 0)
            assert weight <= count  # every score is at most 1


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_two_bits_are_measured_to_cost_more_than_four(kind, quantized):
    factors = quantized(kind).factors
    for layer in factors.layers.values():
        for expert, count in enumerate(layer.activation_count):
            if count:
                assert layer.quantization_error[2][expert] > layer.quantization_error[4][expert] > 0
        for part in ("gate_up", "down"):
            assert sum(layer.loss_increase[part][2]) > sum(layer.loss_increase[part][4]) > 0


def on_disk_name(model: MoeModel, name: str) -> str:
    """Of a parameter of transformers' module."""
    if not name.startswith("model.layers."):
        return model.outer_name(name)
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    for on_disk, module in model.family.module_names.items():
        if rest.startswith(module):
            rest = on_disk + rest.removeprefix(module)
            break
    return f"{model.layer_prefix}{layer}.{rest}"


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_a_checkpoint_is_read_back_as_the_original_with_quantised_weights(kind, quantized):
    """Relative errors are up to 0.85 at 2 bits, with so little calibration; of another matrix it would be 1.4."""
    model = quantized(kind).description
    original = load_full_model(WeightFiles(model)).state_dict()
    found = load_dequantized(quantized(kind).checkpoint).state_dict()
    files = open_weights(quantized(kind).checkpoint).files.info
    assert found.keys() == original.keys()
    for name, weight in original.items():
        is_expert_stack = ".experts." in name and not name.endswith("bias")
        matrices = weight if is_expert_stack else weight[None]
        for matrix, expected in zip(found[name].view_as(matrices), matrices, strict=True):
            if is_expert_stack or f"{on_disk_name(model, name)}_packed" in files:
                assert 0 < (matrix - expected).norm() / expected.norm() < 1.1, name
            else:
                assert torch.equal(matrix, expected), name


def test_a_wrapped_checkpoint_is_loaded_by_transformers_as_its_text_model(quantized):
    import vllm_mcmoe.hf  # noqa: F401 -- registers the quantizer

    checkpoint = quantized("qwen3.5-vision").checkpoint
    found = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    for name, weight in load_dequantized(checkpoint).state_dict().items():
        assert torch.equal(found[name], weight), name
    with pytest.raises(FormatError, match=r"has no parameter model\.layers.*by AutoModelForCausalLM"):
        AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_a_checkpoint_holds_every_expert_by_itself_and_no_16_bit_one(kind, quantized):
    model = quantized(kind).description
    names = open_weights(quantized(kind).checkpoint).files.info
    config = read_checkpoint_config(quantized(kind).checkpoint)
    assert list(config.experts) == list(model.moe_layers.values())
    for layer in model.moe_layers.values():
        for expert in range(model.num_experts):
            for projection in model.all_projections:
                assert f"{model.expert_tensor(layer, expert, projection)}.qweight" in names
    assert not any(model.is_expert_tensor(name) and name.endswith(".weight") for name in names)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_all_other_linears_are_packed_but_routers_gates_and_kv_b(kind, quantized):
    """What stays in 16 bits, besides norms and biases, is listed for vLLM to leave alone, too."""
    names = open_weights(quantized(kind).checkpoint).files.info
    layers = {name for name in names if ".layers." in name and name.endswith(".weight") and "norm" not in name}
    model = quantized(kind).description
    kept = {model.split_layer_name(name)[1].removesuffix(".weight") for name in layers if model.split_layer_name(name)}
    assert kept <= {
        "router.proj",
        "mlp.router",
        "mlp.router.gate",
        "mixer.gate",
        "mixer.conv1d",
        "mixer.in_proj",
        "mixer.out_proj",
        "mixer.fc1_latent_proj",
        "mixer.fc2_latent_proj",
        "mamba.conv1d",
        "mamba.in_proj",
        "mamba.out_proj",
        "feed_forward.gate",
        "conv.conv",
        "conv.in_proj",
        "conv.out_proj",
        "self_attn.indexer.wk",
        "self_attn.indexer.wq_b",
        "self_attn.indexer.weights_proj",
        "shared_mlp.input_linear",
        "shared_mlp.output_linear",
        "linear_attn.conv1d",
        "linear_attn.in_proj_ba",
        "linear_attn.in_proj_a",
        "linear_attn.in_proj_b",
        "mlp.gate",
        "mlp.gate.wg",
        "mlp.shared_expert_gate",
        "block_sparse_moe.gate",
        "block_sparse_moe.router.layer",
        "self_attn.kv_b_proj",
    }
    assert any(name.endswith((".o_proj.weight_packed", "self_attn.out_proj.weight_packed")) for name in names)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_norms_are_tuned_and_written(kind, quantized, tokens, tmp_path):
    """One step: norms of every layer and the final one have a gradient. What is written of the values that it leads to
    is what it was computed with, and nothing else."""
    description, checkpoint = quantized(kind).description, quantized(kind).checkpoint
    weights, store = CheckpointWeights(describe_model(checkpoint)), ActivationStore()
    tunables = find_tunables(LayerwiseModel(weights), TuningOptions())
    values = {name: tunable.value for name, tunable in tunables.items()}
    tuned = LayerwiseModel(TunedWeights(weights, values))
    original = layerwise(quantized(kind).model)
    states = final_states(original, tokens, store, "original").rows.view(*tokens.shape, -1)
    _, gradients = kl_gradients(tuned, original, tokens, iter(states), tunables, store)
    moved = {tunables[name].layer for name, gradient in gradients.items() if gradient.abs().max() > 0}
    assert moved == {None, *range(description.num_layers)}
    (final,) = (name for name, tunable in tunables.items() if tunable.layer is None)

    for name, gradient in gradients.items():
        values[name] -= tunables[name].step * gradient.sign()
    out = tmp_path / "out"
    with working_on(out, {}) as work:
        work.checkpoint.mkdir()
        for path in checkpoint.iterdir():
            if path.suffix == ".safetensors":
                write_shard(path, work.checkpoint / path.name, TunedWeights(weights, values), work)
            else:
                shutil.copy(path, work.checkpoint)
        work.publish()
    before, after = stored_tensors(checkpoint), stored_tensors(out)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert final in changed and all(name in tunables for name in changed)
    read_back = final_states(LayerwiseModel(open_weights(out)), tokens, store, "written").rows
    assert torch.equal(read_back, final_states(tuned, tokens, store, "tuned").rows)


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_routing_weights_are_sigmoid_scores_where_the_router_uses_them(make, tokens):
    model = layerwise(make("deepseek-v3"))
    received = []
    with torch.no_grad():
        hidden = model.embed(tokens)
        with model.loaded_layer(0) as layer:
            hidden = [layer(batch) for batch in hidden]
        with model.loaded_layer(1) as layer, layer.router_scores(received.append):
            layer(hidden[0])
    assert received[0].shape == (tokens.numel(), 8)
    assert (received[0].sum(-1) > 1.5).any()  # a softmax sums to 1


def test_layers_beyond_the_model_are_left_out(make, tmp_path):
    """Multi-token prediction: num_nextn_predict_layers more layers on disk, which calibration does not run."""
    path = Path(shutil.copytree(make("deepseek-v3"), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    extra = {name.replace(".layers.2.", ".layers.3."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | {name: t for name, t in extra.items() if ".layers.3." in name}, path / "model.safetensors")
    source = WeightFiles(describe_model(path))
    assert not any(".layers.3." in name for name in source.names())
    assert sorted(source.names()) == sorted(tensors)


def test_a_stacked_experts_matrix_is_read_without_the_others(make):
    """Granite keeps all experts of a layer in one tensor, gate rows above up rows."""
    path = make("granite")
    source = WeightFiles(describe_model(path))
    name = "model.layers.1.block_sparse_moe.experts.5.up_proj.weight"
    with safe_open(path / "model.safetensors", framework="pt") as file:
        stacked = file.get_tensor("model.layers.1.block_sparse_moe.input_linear.weight")
    assert torch.equal(source.read(name), stacked[5, 128:])
    assert source.numel(name) == 128 * 128


def test_transposed_stacks_are_known_by_their_shape(make, tmp_path, tokens):
    """Qwen3-VL is released so; transformers saves it the other way."""
    path = Path(shutil.copytree(make("qwen3-vl"), tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    stacks = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(stacks) == 4
    tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in stacks}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found, expected = WeightFiles(describe_model(path)), WeightFiles(describe_model(make("qwen3-vl")))
    assert found.names() == expected.names()
    name = "model.language_model.layers.1.mlp.experts.5.down_proj.weight"
    assert found.weights[stacks[0]].shape != expected.weights[stacks[0]].shape
    assert torch.equal(found.read(name), expected.read(name))
    assert torch.equal(layer_by_layer_logits(path, tokens), transformers_logits(path, tokens))


def test_a_misshapen_stack_of_experts_is_named(make, tmp_path):
    path = Path(shutil.copytree(make("granite"), tmp_path / "model"))
    edit_config(path, num_local_experts=9)
    with pytest.raises(UnsupportedModelError, match=r"input_linear\.weight has shape \[8, 256, 128\].*\[9, 256, 128\]"):
        WeightFiles(describe_model(path))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob is true, which vLLM's OLMoE ignores"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob is true"),
        ("deepseek-v2", {"topk_method": "greedy"}, "greedy with n_group 4"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("phi", {"router_jitter_noise": 0.1}, r"router_jitter_noise is 0\.1; vLLM's Phi-3\.5-MoE has 0\.01"),
        ("phi", {"attention_bias": False}, "attention_bias is False"),
        ("gpt-oss", {"swiglu_limit": 6.0}, r"swiglu_limit is 6\.0; vLLM's gpt-oss has 7\.0"),
        ("gpt-oss", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types does not begin with"),
        ("glm4", {"quantization_config": {"quant_method": "fp8"}}, r"quantised already \(fp8\)"),
    ],
)
def test_a_setting_that_vllm_would_serve_differently_is_refused(kind, changes, message, make, tmp_path):
    shutil.copy2(make(kind) / "config.json", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        describe_model(tmp_path)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "eager"])
def test_attention_is_computed_alike_whatever_config_json_names(implementation, make, tmp_path, tokens):
    """What was installed where a model was trained need not be here."""
    expected = layer_by_layer_logits(make("mixtral"), tokens)
    shutil.copytree(make("mixtral"), tmp_path / "model")
    edit_config(tmp_path / "model", attn_implementation=implementation, _attn_implementation=implementation)
    assert torch.equal(layer_by_layer_logits(tmp_path / "model", tokens), expected)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_sizes_are_known_from_the_config_alone(kind, quantized, tmp_path):
    """To the byte in 16 bits. The estimate at the bits written leaves out a few bytes of metadata per packed linear."""
    shutil.copy2(quantized(kind).model / "config.json", tmp_path)
    written = open_weights(quantized(kind).checkpoint)
    summary = inspect_model(tmp_path, bits=written.config.average_bits["experts"])
    files = WeightFiles(quantized(kind).description).files.info
    tower = quantized(kind).description.passes_through
    buffers = (".layer_scalar", ".expert_bias")
    if kind != "ernie":  # whose is a parameter
        buffers += ("e_score_correction_bias",)
    beside = sum(info.nbytes for name, info in files.items() if tower(name) or name.endswith(buffers))
    assert summary.model_bytes + beside == sum(info.nbytes for info in files.values())
    total = sum(info.nbytes for name, info in written.files.info.items() if not tower(name))
    assert summary.checkpoint_bytes == pytest.approx(total, rel=0.001)
    assert summary.active_parameters < summary.parameters - summary.expert_parameters / 3
