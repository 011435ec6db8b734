"""What vLLM decides before it starts an engine: which method a checkpoint gets, and which it refuses."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from transformers import PretrainedConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.platforms import current_platform

import vllm_mcmoe
from vllm_mcmoe.checkpoint import CheckpointConfig, ExpertBits
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.quantization import VARIABLES, McmoeConfig, _pruning_request

ROOT = Path(__file__).parents[2]


def engine_config(model: Path, **options) -> VllmConfig:
    return EngineArgs(model=str(model), max_model_len=256, **options).create_engine_config()


def with_config(checkpoint: Path, target: Path, **changes) -> Path:
    """A copy of the checkpoint with other values in its quantization_config."""
    shutil.copytree(checkpoint, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"].update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_registering_twice_changes_nothing():
    vllm_mcmoe.register()
    vllm_mcmoe.register()
    assert QUANTIZATION_METHODS.count("mcmoe") == 1
    assert get_quantization_config("mcmoe") is McmoeConfig


def test_vllm_knows_every_variable_of_the_plugin(monkeypatch):
    """It warns of others that begin like its own, or refuses them."""
    sources = [path for folder in ("vllm_mcmoe", "kernels", "calibration") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"VLLM_MCMOE_[A-Z_]+", path.read_text())}
    assert named == set(VARIABLES)
    for name in os.environ:
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    current_platform.validate_environ(hard_fail=True)


@pytest.mark.parametrize("options", [{}, {"quantization": "mcmoe"}], ids=["found", "named"])
def test_our_checkpoint_is_recognised_with_and_without_naming_it(checkpoint, options):
    config = engine_config(checkpoint, **options)
    assert config.model_config.quantization == "mcmoe"
    assert isinstance(config.quant_config, McmoeConfig)


def test_other_models_are_left_alone(reference_model):
    assert engine_config(reference_model).model_config.quantization is None


def test_naming_mcmoe_for_a_16_bit_model_is_refused(reference_model):
    with pytest.raises(ValueError, match=r"no quantization_config: it is not quantised\. Run `mcmoe quantize"):
        engine_config(reference_model, quantization="mcmoe")


def test_naming_another_method_for_our_checkpoint_is_refused(checkpoint):
    with pytest.raises(ValueError, match="mcmoe"):
        engine_config(checkpoint, quantization="fp8")


def test_a_newer_format_version_is_refused(checkpoint, tmp_path):
    newer = with_config(checkpoint, tmp_path / "newer", format_version=4)
    with pytest.raises(ValueError, match="format_version is 4, this vllm-mcmoe reads versions 1 to 3; upgrade"):
        engine_config(newer)


def test_a_width_no_kernel_has_is_refused(checkpoint, tmp_path):
    layers = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["experts"]
    name = next(iter(layers))
    layers[name]["down"][3] = 5
    other = with_config(checkpoint, tmp_path / "five", experts=layers)
    with pytest.raises(ValueError, match=f"{name}.down: expert 3 has bit-width 5"):
        engine_config(other)


@pytest.mark.parametrize(
    "overrides, variable, request_",
    [
        ({}, None, ("VLLM_MCMOE_PRUNING", "on")),
        ({}, "off", ("VLLM_MCMOE_PRUNING", "off")),
        ({"mcmoe_pruning": 0.1}, "off", ("--hf-overrides mcmoe_pruning", 0.1)),
        ({"mcmoe_pruning": "off"}, None, ("--hf-overrides mcmoe_pruning", "off")),
    ],
    ids=["nothing", "environment", "both", "override"],
)
def test_what_to_prune_comes_from_vllms_option_then_from_the_environment(
    checkpoint, monkeypatch, overrides, variable, request_
):
    if variable is None:
        monkeypatch.delenv("VLLM_MCMOE_PRUNING", raising=False)
    else:
        monkeypatch.setenv("VLLM_MCMOE_PRUNING", variable)
    with set_current_vllm_config(engine_config(checkpoint, hf_overrides=overrides)):
        assert _pruning_request() == request_


def config_of(*layers: str) -> McmoeConfig:
    return McmoeConfig(CheckpointConfig(experts={name: ExpertBits((2,) * 8, (3,) * 8) for name in layers}))


def test_a_layer_is_found_by_its_name_or_by_its_number_where_vllm_calls_it_otherwise():
    """MiniMax-M2's layers are made as `mlp` and loaded as `block_sparse_moe`."""
    layers = [f"model.layers.{number}.block_sparse_moe.experts" for number in (1, 2, 11)]
    config = config_of(*layers)
    assert config._find_layer(layers[1]) == layers[1]
    assert config._find_layer("model.layers.1.mlp.experts") == layers[0]
    assert config._find_layer("language.model.layers.11.mlp.experts") == layers[2]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (["model.layers.1.mlp.experts"], "model.layers.2.mlp.experts"),
        (["model.layers.1.mlp.text_experts", "model.layers.1.mlp.vision_experts"], "model.layers.1.mlp.experts"),
        (["model.layers.1.mlp.experts"], "mtp.mlp.experts"),
    ],
    ids=["another number", "two of a number", "no number"],
)
def test_a_layer_that_is_not_there_for_certain_is_refused(layers, wanted):
    with pytest.raises(FormatError, match=f"no entry for the MoE layer {wanted}; it names {layers[0]}"):
        config_of(*layers)._find_layer(wanted)


def test_tensors_are_renamed_for_models_that_load_by_a_table_of_names_and_for_no_others():
    config = config_of("model.layers.1.block_sparse_moe.experts")
    name = "model.layers.1.block_sparse_moe.experts.17.up_proj.scales"
    others = ["model.layers.1.block_sparse_moe.router.layer.weight", "model.layers.1.self_attn.q_proj.weight_scale"]
    config.maybe_update_config("mixtral", PretrainedConfig(architectures=["MixtralForCausalLM"]))
    assert config.get_checkpoint_weight_mapper().apply_list([name]) == [name]
    config.maybe_update_config("granite", PretrainedConfig(architectures=["GraniteMoeHybridForCausalLM"]))
    renamed = config.get_checkpoint_weight_mapper().apply_list([name, *others])
    assert renamed == ["model.layers.1.block_sparse_moe.experts.routed_experts.mcmoe_17_up_proj_scales", *others]
