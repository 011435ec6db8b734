"""Small models and checkpoints of the calibration tests. Budgets are tiny: seconds, not quality."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.quantize import checkpoint_run
from vllm_mcmoe.calibration.quantize import layer as layer_quantization
from vllm_mcmoe.calibration.recipes import RECIPES, Recipe

SEQUENCES, LENGTH = 8, 128

# The default recipe with a quantiser ten times faster: grids that span the range, no refinement, nothing tuned.
QUICK = dataclasses.replace(
    RECIPES["mcmoe"], name="quick", gptq=GPTQOptions(mse_search=False), widths=(2, 4), tuning=None
)


@pytest.fixture(scope="session")
def quick_recipe() -> Recipe:
    return QUICK


def layerwise(path: Path, device: str = "cpu") -> LayerwiseModel:
    return LayerwiseModel(WeightFiles(describe_model(path)), device)


def transformers_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of transformers' own loading and forward pass."""
    text_alone = type(AutoConfig.from_pretrained(path)) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto_class = AutoModelForCausalLM if text_alone else AutoModelForImageTextToText
    model = auto_class.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        return model(tokens).logits


def layer_by_layer_logits(path: Path, tokens: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Computed on the device, one layer in memory at a time."""
    model = layerwise(path, device)
    with torch.no_grad():
        hidden = model.embed(tokens)
        for index in range(model.num_layers):
            with model.loaded_layer(index) as layer:
                hidden = [layer(batch) for batch in hidden]
        return torch.cat([model.logits(batch).cpu() for batch in hidden])


@contextmanager
def interrupted_at_the_last_layer() -> Iterator[None]:
    """In the block Ctrl-C is pressed when the last layer is about to be quantised, which ends the block."""

    def quantize_first_layers(model: LayerwiseModel, index: int, *arguments: Any) -> Any:
        if index == model.num_layers - 1:
            raise KeyboardInterrupt
        return layer_quantization.quantize_layer(model, index, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_run, "quantize_layer", quantize_first_layers)
        yield


def mixed_plan(path: Path) -> Plan:
    """Widths 1 to 4 and 8, gate_up and down apart, in every layer."""
    model = describe_model(path)
    gate_up, down = [2, 3, 1, 4, 2, 8, 2, 3], [3, 2, 2, 1, 4, 2, 8, 2]
    return Plan(layers={name: {"gate_up": gate_up, "down": down} for name in model.moe_layers.values()})


@pytest.fixture(scope="session")
def mixed_checkpoint(tmp_path_factory, reference_model, calibration_files) -> Path:
    """The reference model at mixed_plan's widths, linears at 4 bits."""
    out = tmp_path_factory.mktemp("checkpoints") / "mixed"
    quantize(
        reference_model,
        out,
        calibration_files,
        plan=mixed_plan(reference_model),
        recipe=QUICK,
        sequences=SEQUENCES,
        length=LENGTH,
    )
    return out


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, qwen3_model, calibration_files) -> Path:
    """The tiny Qwen3 at mixed_plan's widths: smaller, and made faster."""
    out = tmp_path_factory.mktemp("checkpoints") / "tiny"
    options = {"plan": mixed_plan(qwen3_model), "recipe": QUICK, "sequences": 8, "length": 64}
    quantize(qwen3_model, out, calibration_files, **options)
    return out


@pytest.fixture
def editable_checkpoint(mixed_checkpoint, tmp_path) -> Path:
    """A copy of mixed_checkpoint a test may damage."""
    return Path(shutil.copytree(mixed_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def editable_model(reference_model, tmp_path) -> Path:
    """A copy of the reference model a test may damage."""
    return Path(shutil.copytree(reference_model, tmp_path / "model"))
