"""Checkpoints in transformers' own `from_pretrained`."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from tests.tiny_models import edit_config
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import load_dequantized
from vllm_mcmoe.errors import FormatError


@pytest.fixture
def registered():
    import vllm_mcmoe.hf

    return vllm_mcmoe.hf


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 1000, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_loaded_dequantised(registered, mixed_checkpoint, tokens, dtype):
    model = AutoModelForCausalLM.from_pretrained(mixed_checkpoint, dtype=dtype)
    expected = load_dequantized(mixed_checkpoint)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], weight.to(dtype)) for name, weight in expected.named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys()
    with torch.no_grad():
        logits = model(tokens).logits
        assert logits.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(logits, expected(tokens).logits)


def test_it_is_an_ordinary_model_afterwards(registered, mixed_checkpoint, tmp_path, tokens):
    model = AutoModelForCausalLM.from_pretrained(mixed_checkpoint, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in loaded.items())
    with torch.no_grad():  # where in memory a weight begins decides how some CPUs add up its products
        torch.testing.assert_close(model(tokens).logits, again(tokens).logits, rtol=1e-4, atol=1e-4)


def test_it_generates(registered, mixed_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(mixed_checkpoint, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(mixed_checkpoint)("def main", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, prompt.shape[1] + 4)


def test_nothing_is_reported_as_missing_or_unexpected(registered, mixed_checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        _, found = AutoModelForCausalLM.from_pretrained(mixed_checkpoint, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert "Unknown quantization type" not in caplog.text


def test_a_damaged_checkpoint_is_refused(registered, editable_checkpoint):
    damaged = {"quant_method": "mcmoe", "format_version": 1, "group_size": 64}
    edit_config(editable_checkpoint, quantization_config=damaged)
    with pytest.raises(FormatError, match="group_size is 64, expected 128"):
        AutoModelForCausalLM.from_pretrained(editable_checkpoint)


def test_without_the_import_transformers_does_not_know_the_method(registered):
    """What the import changes, and nothing else does."""
    assert AUTO_QUANTIZER_MAPPING["mcmoe"] is registered.McmoeHfQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["mcmoe"] is registered.McmoeHfConfig
