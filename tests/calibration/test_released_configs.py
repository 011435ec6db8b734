"""What `mcmoe inspect` says of the config.json of models that people run."""

import json

import pytest
from transformers import AutoConfig

from tests.released_configs import RELEASED, write_config
from vllm_mcmoe.calibration.evaluate.inspection import inspect_model
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.errors import UnsupportedModelError


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_can_be_quantised_and_has_its_published_size(name, tmp_path):
    released = RELEASED[name]
    summary = inspect_model(write_config(tmp_path, released), bits=2.5)
    assert (summary.experts, summary.top_k, summary.hidden, summary.intermediate) == released.shape
    assert summary.source == released.source
    assert summary.parameters / 1e9 == pytest.approx(released.billions, rel=0.02)
    assert summary.checkpoint_bytes < summary.model_bytes


@pytest.mark.parametrize(
    ("architecture", "model_type", "reason"),
    [
        ("DeepseekV4ForCausalLM", "deepseek_v4", "choose experts by token id"),
        ("Llama4ForConditionalGeneration", "llama4", "weighted and repeated already"),
    ],
)
def test_a_model_that_cannot_be_quantised_yet_is_refused_with_the_reason(architecture, model_type, reason, tmp_path):
    config = AutoConfig.for_model(model_type).to_dict() | {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(UnsupportedModelError, match=f"{architecture} is not supported; .*{reason}"):
        describe_model(tmp_path)
