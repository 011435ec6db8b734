"""Every file that a user can hand over, mutated: it is accepted, or refused by an error of ours. Never a traceback.

MCMOE_MUTATIONS=1000 pytest tests/fuzz        as many of each kind of file
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.calibration.conftest import mixed_plan
from tests.calibration.test_user_files import factors_like
from tests.fuzz.mutations import mutate_file, mutated_document
from tests.released_forms import in_fp8, in_int4
from tests.tiny_models import make_tiny
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import open_weights
from vllm_mcmoe.calibration.evaluate.inspection import inspect_checkpoint, inspect_model
from vllm_mcmoe.calibration.evaluate.resources import plan_resources
from vllm_mcmoe.calibration.measure.factors import Factors
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import read_text
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.checkpoint import is_mcmoe_checkpoint, read_checkpoint_config
from vllm_mcmoe.errors import McmoeError

MUTATIONS = int(os.environ.get("MCMOE_MUTATIONS", "40"))


def outcomes(folder: Path, name: str, read) -> dict[str, int]:
    """How many mutations of a file were accepted and refused. Anything but McmoeError fails, naming the seed."""
    original = (folder / name).read_bytes()
    counted = {"accepted": 0, "refused": 0}
    for seed in range(MUTATIONS):
        (folder / name).write_bytes(original)
        mutate_file(folder / name, random.Random(seed))
        try:
            read()
        except McmoeError as error:
            assert len(str(error)) > 20, f"{name}, seed {seed}: {error!r} says nothing"
            counted["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
        else:
            counted["accepted"] += 1
    (folder / name).write_bytes(original)
    return counted


def refuses_some(counted: dict[str, int]) -> bool:
    return counted["refused"] > 0 and sum(counted.values()) == MUTATIONS


@pytest.fixture
def model(reference_model, tmp_path) -> Path:
    return Path(shutil.copytree(reference_model, tmp_path / "model"))


@pytest.fixture
def editable_checkpoint(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def test_a_models_config(model):
    def read() -> None:
        is_mcmoe_checkpoint(model)
        describe_model(model)
        inspect_model(model, 2.5)

    assert refuses_some(outcomes(model, "config.json", read))


def test_a_models_config_when_its_needs_are_planned(model):
    assert refuses_some(outcomes(model, "config.json", lambda: plan_resources(model, bits=2.5)))


def test_a_models_weights(model):
    assert refuses_some(
        outcomes(model, "model.safetensors", lambda: LayerwiseModel(WeightFiles(describe_model(model))).load_layer(0))
    )


@pytest.mark.parametrize("form", [in_fp8, in_int4])
def test_a_released_form(form, tmp_path, reference_model):
    """Its config.json, and its weights and scales."""
    model = form(make_tiny("deepseek-v3", tmp_path / "model", reference_model))

    def read() -> None:
        source = WeightFiles(describe_model(model))
        for name in source.names()[:20]:
            source.read(name)

    assert refuses_some(outcomes(model, "config.json", lambda: inspect_model(model, 2.5)))
    assert refuses_some(outcomes(model, "model.safetensors", read))


def test_a_models_index(model):
    tensors = WeightFiles(describe_model(model)).files.info
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    read = lambda: WeightFiles(describe_model(model))  # noqa: E731
    assert refuses_some(outcomes(model, "model.safetensors.index.json", read))


def test_a_checkpoints_config(editable_checkpoint):
    def read() -> None:
        is_mcmoe_checkpoint(editable_checkpoint)
        read_checkpoint_config(editable_checkpoint)
        inspect_checkpoint(editable_checkpoint)
        open_weights(editable_checkpoint)

    assert refuses_some(outcomes(editable_checkpoint, "config.json", read))


def test_a_checkpoints_weights(editable_checkpoint):
    shard = "model-00001-of-00005.safetensors"

    def read() -> None:
        weights = open_weights(editable_checkpoint)
        for name in list(weights.names())[:40]:
            weights.read(name)

    assert refuses_some(outcomes(editable_checkpoint, shard, read))


def test_factors(reference_model, tmp_path):
    path = tmp_path / "factors.json"
    factors_like(reference_model).save(path)
    sizes = describe_model(reference_model)

    def read() -> None:
        factors = Factors.load(path)
        factors.check_against(sizes.experts_per_layer(), sizes.part_shapes())
        allocate(factors, bits=3.0, widths=(2, 4))

    assert refuses_some(outcomes(tmp_path, "factors.json", read))


def test_a_plan(reference_model, tmp_path):
    path = tmp_path / "plan.json"
    mixed_plan(reference_model).save(path)
    experts = describe_model(reference_model).experts_per_layer()
    assert refuses_some(outcomes(tmp_path, "plan.json", lambda: Plan.load(path).check_against(experts)))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"text": "one"}'), ("a.json", '["one", {"text": "two"}]')],
    ids=["jsonl", "json"],
)
def test_texts(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    read = lambda: read_text(tmp_path / name, separator="|", max_characters=1000)  # noqa: E731
    assert refuses_some(outcomes(tmp_path, name, read))


def test_what_vllm_hands_the_plugin(editable_checkpoint):
    """The quantization_config of config.json, as vLLM reads it, which no check of ours has seen."""
    from vllm_mcmoe.quantization import McmoeConfig

    config = json.loads((editable_checkpoint / "config.json").read_text())["quantization_config"]
    refused = 0
    for seed in range(MUTATIONS):
        try:
            McmoeConfig.from_config(mutated_document(config, random.Random(seed)))
        except McmoeError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    assert refused


def test_a_fault_is_found(tmp_path):
    """A reader that lets an error of Python's through."""
    (tmp_path / "a.json").write_text('{"a": {"b": 1}}')
    with pytest.raises(AssertionError, match=r"a\.json, seed \d+: "):
        outcomes(tmp_path, "a.json", lambda: json.loads((tmp_path / "a.json").read_text())["a"]["b"])
