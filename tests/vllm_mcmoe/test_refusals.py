"""What vLLM could compute and the kernels do not is refused while vLLM builds the model, before it reads weights.

Layers here are made by vLLM itself, as its models make them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, record_metadata_for_reloading

from tests.vllm_mcmoe.test_expert_weights import random_matrix
from vllm_mcmoe.checkpoint import FORMAT_VERSION, CheckpointConfig, ExpertBits, matrix_tensors
from vllm_mcmoe.errors import UnsupportedModelError
from vllm_mcmoe.kernels.expert_function import GPT_OSS, SILU, ExpertFunction
from vllm_mcmoe.moe_method import McmoeMoEMethod
from vllm_mcmoe.quantization import McmoeConfig

LAYER = "model.layers.1.block_sparse_moe.experts"
EXPERTS = {LAYER: ExpertBits((2,) * 8, (3,) * 8)}


@pytest.fixture(scope="module")
def quantized_config(reference_model, tmp_path_factory) -> Path:
    """Config and tokenizer of a checkpoint: all that is looked at before weights are read."""
    directory = tmp_path_factory.mktemp("config")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference_model / name, directory)
    config = json.loads((reference_model / "config.json").read_text())
    config["quantization_config"] = CheckpointConfig(experts=EXPERTS).to_dict()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def engine_config(model: Path, **options) -> VllmConfig:
    return EngineArgs(model=str(model), max_model_len=256, **options).create_engine_config()


def make_layer(config: VllmConfig, prefix: str = LAYER, **options) -> RoutedExperts:
    """A MoE layer of 8 experts, by the function that vLLM's models call."""
    sizes = {"num_experts": 8, "top_k": 2, "hidden_size": 256, "intermediate_size": 512}
    with set_current_vllm_config(config):
        runner = FusedMoEFactory(
            **sizes,
            prefix=prefix,
            quant_config=config.quant_config,
            params_dtype=torch.float32,
            tp_size=1,
            dp_size=1,
            pcp_size=1,
            **options,
        )
    return runner.routed_experts


@pytest.mark.parametrize(
    ("options", "function"),
    [
        ({}, SILU),
        ({"swiglu_alpha": 1.0, "swiglu_beta": 0.0}, SILU),
        ({"activation": "gelu"}, ExpertFunction("gelu")),
        ({"swiglu_limit": 10.0}, ExpertFunction(limit=10.0)),
        ({"activation": "swigluoai", "has_bias": True}, GPT_OSS),
    ],
    ids=["plain", "neutral parameters", "gelu", "clamped", "gpt-oss"],
)
def test_layers_that_the_kernels_compute_get_the_method(quantized_config, options, function):
    layer = make_layer(engine_config(quantized_config), **options)
    assert isinstance(layer.quant_method, McmoeMoEMethod)
    assert layer.quant_method.weights.function == function
    assert (layer.quant_method.weights.down_bias is not None) == options.get("has_bias", False)


@pytest.mark.parametrize(("parameter", "value"), [("swiglu_alpha", 1.702), ("swiglu_beta", 1.0)])
def test_a_parameter_that_vllm_would_not_heed_is_refused(quantized_config, parameter, value):
    with pytest.raises(UnsupportedModelError, match=f"{LAYER}: {parameter} is {value}, beside the activation 'silu'"):
        make_layer(engine_config(quantized_config), activation="silu", **{parameter: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring_func": "sigmoid"}, "cannot route by sigmoid without groups"),
        ({"e_score_correction_bias": torch.zeros(8)}, "leaves out the router's correction bias"),
    ],
    ids=["sigmoid", "correction bias"],
)
def test_what_vllm_cannot_route_on_cpus_is_refused(quantized_config, options, message):
    """When the layer is finished: its runner, which has the router, is made after it."""
    config = engine_config(quantized_config)
    layer = make_layer(config, **options)
    with pytest.raises(UnsupportedModelError, match=f"{LAYER}: on CPUs vLLM {message}.*Serve this model on a GPU"):
        layer.quant_method.process_weights_after_loading(layer)


# ---- vLLM's options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "--enable-lora.*--lora-target-modules q_proj"),
        ({"enable_lora": True, "lora_target_modules": ["experts"]}, "--enable-lora"),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb.*Spread the model over more devices"),
        ({"offload_group_size": 2}, "--offload-group-size"),
    ],
    ids=["adapters", "adapters of experts", "offloading", "prefetching"],
)
def test_an_option_that_experts_would_disregard_is_refused_by_name(quantized_config, options, message):
    config = engine_config(quantized_config, **options)
    with pytest.raises(UnsupportedModelError, match=f"{LAYER}: .*{message}"):
        make_layer(config)


def test_adapters_of_linears_are_not_refused(quantized_config):
    layer = make_layer(engine_config(quantized_config, enable_lora=True, lora_target_modules=["q_proj", "o_proj"]))
    assert isinstance(layer.quant_method, McmoeMoEMethod)


def test_batch_invariance_is_refused(quantized_config, monkeypatch):
    config = engine_config(quantized_config)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UnsupportedModelError, match=r"VLLM_BATCH_INVARIANT is set, but the cpu kernels.*Unset it"):
        make_layer(config)


def test_loading_weights_into_a_running_engine_is_refused(quantized_config, monkeypatch):
    """By vLLM's own steps of reload_weights."""
    monkeypatch.setenv("VLLM_MCMOE_BACKEND", "reference")
    layer = make_layer(engine_config(quantized_config))
    model = torch.nn.Module()
    model.experts = layer
    record_metadata_for_reloading(model)
    assert set(layer.load_weights(checkpoint_tensors()))
    layer.quant_method.process_weights_after_loading(layer)
    initialize_layerwise_reload(model)
    message = f"{LAYER}, expert 0, w1 qweight: the experts of a running engine cannot be loaded again.*another engine"
    with pytest.raises(UnsupportedModelError, match=message):
        list(layer.load_weights(checkpoint_tensors()))


def checkpoint_tensors():
    """Of the experts above, under the names they have behind the layer's."""
    for expert in range(8):
        for name, bits, shape in (
            ("gate_proj", 2, (512, 256)),
            ("up_proj", 2, (512, 256)),
            ("down_proj", 3, (256, 512)),
        ):
            matrix = random_matrix(bits, *shape, seed=expert)
            for suffix, tensor in matrix_tensors(matrix, FORMAT_VERSION).items():
                yield f"{expert}.{name}.{suffix}", tensor


# ---- classes that models bring


class AddsSomething(RoutedExperts):
    def forward_modular(self, x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        return super().forward_modular(x, *arguments, **options) + x


class LoadsDifferently(RoutedExperts):
    def get_expert_mapping(self, *arguments: object, **options: object) -> list[tuple[str, str, int, str]]:
        return super().get_expert_mapping(*arguments, **options)


def test_a_class_of_layers_that_computes_something_of_its_own_is_refused(quantized_config):
    with pytest.raises(UnsupportedModelError, match=f"{LAYER}: vLLM has a class of its own.*AddsSomething"):
        make_layer(engine_config(quantized_config), routed_experts_cls=AddsSomething)


def test_a_class_of_layers_that_only_loads_differently_is_not(quantized_config):
    layer = make_layer(engine_config(quantized_config), routed_experts_cls=LoadsDifferently)
    assert isinstance(layer.quant_method, McmoeMoEMethod)


# ---- experts replaced by constants

REPLACEMENT = {"format": "constant-v1", "tensors": {"value": "constants.0"}}
TARGET = {"weight_layout": "compact_retained_experts", "replacements": {"3": REPLACEMENT}}
SUBSTITUTION = {
    "version": 1,
    "router_semantics": {
        "preserve_logical_expert_ids": True,
        "preserve_router_weights": True,
        "renormalize_after_substitution": False,
    },
    "targets": {LAYER: TARGET},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("approximate_experts", {"1": [3, 5]}),
        ("compression_config", {"transform_config": {"expert_substitution": SUBSTITUTION}}),
    ],
    ids=["approximate_experts", "expert_substitution"],
)
def test_replaced_experts_are_refused_by_name_when_vllm_starts(quantized_config, key, value):
    with pytest.raises(ValueError, match=rf"config.json: {key}.* replaces experts by constants .*Quantise the model"):
        engine_config(quantized_config, hf_overrides={key: value})


def test_vllms_layer_with_replaced_experts_is_refused(reference_model):
    """Where the model's config was not asked: vLLM's layer is made from a 16-bit model that lists replaced experts."""
    pytest.importorskip("vllm.model_executor.layers.fused_moe.expert_substitution", reason="vLLM has it from 0.33 on")
    config = engine_config(reference_model, hf_overrides={"approximate_experts": {"1": [3, 5]}})
    config.quant_config = McmoeConfig(CheckpointConfig(experts={LAYER: ExpertBits((2,) * 6, (3,) * 6)}))
    with pytest.raises(UnsupportedModelError, match=f"{LAYER}: vLLM has a class of its own.*SubstitutedRoutedExperts"):
        make_layer(config)


# ---- quantising what is quantised


@pytest.mark.parametrize(
    "request_",
    [{"moe": {"weight": "fp8_per_channel_static"}}, {"targets": {"*experts*": "mxfp8"}}],
    ids=["moe", "targets"],
)
def test_quantising_the_experts_once_more_is_refused(quantized_config, request_):
    config = engine_config(quantized_config, quantization_config=request_)
    with pytest.raises(UnsupportedModelError, match=f"{LAYER}: --quantization-config asks vLLM to quantise these"):
        make_layer(config)


def test_quantising_other_layers_is_left_to_vllm(quantized_config):
    config = engine_config(quantized_config, quantization_config={"linear": {"weight": "fp8_per_channel_static"}})
    assert config.quant_config.online_quantization_config is not None
    assert isinstance(make_layer(config).quant_method, McmoeMoEMethod)
