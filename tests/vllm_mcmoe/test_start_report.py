"""What the operator is told of an engine, below the engine; tests/vllm_mcmoe/test_http_server.py has a server's."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from tests.vllm_mcmoe.test_plugin import engine_config
from vllm_mcmoe import __version__
from vllm_mcmoe.checkpoint import CheckpointConfig, ExpertBits
from vllm_mcmoe.graph_cache import add_to_cache_key
from vllm_mcmoe.kernels.cpu import select_isa
from vllm_mcmoe.pruning import PruningConfig
from vllm_mcmoe.start_report import StartReport

RULE = PruningConfig("otp", 0.25, 2, (0.0, 0.5), "0" * 64)
CPU = torch.device("cpu")


def report(target: float | None = None, **changes) -> StartReport:
    widths, kinds = ((1, 2, 2, 3), (2, 2, 3, 3)), (("trellis",) * 4, ("scalar",) * 4)
    layers = {f"model.layers.{layer}.mlp.experts": ExpertBits(*widths, *kinds) for layer in range(2)}
    checkpoint = CheckpointConfig(experts=layers, average_bits={"experts": 2.3456, "model": 3.0}, **changes)
    return StartReport(checkpoint, target)


@pytest.fixture(scope="module")
def config(reference_model) -> VllmConfig:
    """Of a model whose linears the plugin serves."""
    config = engine_config(reference_model)
    with set_current_vllm_config(config):
        add_to_cache_key("linears", "mcmoe")
    return config


def test_facts_are_those_of_the_checkpoint_and_of_what_was_chosen(config):
    linear = {"config_groups": {name: {"weights": {"num_bits": bits}} for name, bits in (("a", 8), ("b", 4), ("c", 8))}}
    assert report(0.4, linear=linear, pruning=RULE)._facts(config, "cpu", CPU) == {
        "version": __version__,
        "expert_bits": "2.35",
        "expert_widths": "1: 12%, 2: 50%, 3: 38%",
        "expert_codes": "scalar 50%, trellis 50%",
        "linear_widths": "4, 8",
        "backend": "cpu",
        "instruction_set": select_isa(),
        "linears": "mcmoe",
        "pruning": "otp 40%",
    }


def test_what_a_checkpoint_does_not_have_is_said(reference_model):
    facts = report()._facts(engine_config(reference_model), "reference", CPU)
    assert (facts["linear_widths"], facts["linears"], facts["pruning"]) == ("16", "vllm", "no rule")
    assert report(0.0, pruning=RULE)._facts(engine_config(reference_model), "reference", CPU)["pruning"] == "off"
