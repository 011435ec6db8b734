"""Checkpoints shared by the whole run: made once, by the code under test, from the embedded reference model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_models import make_qwen3
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.measure.factors import Factors, parse_factors
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.checkpoint import read_checkpoint_config

# The matrices of tests are too small to share: quantising the reference model takes 58 s with one thread and 137 s with
# two, on a machine that has nothing else to do.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def start_cache(tmp_path_factory) -> Iterator[Path]:
    """Where every engine of this run keeps repacked experts, so that none fills the home directory."""
    folder = tmp_path_factory.mktemp("start_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MCMOE_CACHE", str(folder))
        yield folder


REFERENCE_MODEL = Path(__file__).parents[1] / "benchmarks" / "reference_model"


@pytest.fixture(scope="session")
def reference_model() -> Path:
    """The 16-bit tiny Mixtral: 4 layers, 8 experts, top-2, hidden 256, intermediate 512."""
    return REFERENCE_MODEL / "tiny-mixtral"


@pytest.fixture(scope="session")
def qwen3_model(tmp_path_factory, reference_model) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("qwen3") / "tiny-qwen3", reference_model)


@pytest.fixture(scope="session")
def calibration_files() -> list[Path]:
    return sorted((REFERENCE_MODEL / "corpus").glob("*.calibration.txt"))


@pytest.fixture(scope="session")
def evaluation_files() -> list[Path]:
    return sorted((REFERENCE_MODEL / "corpus").glob("*.evaluation.txt"))


CALIBRATION = {"sequences": 16, "length": 128}  # seconds instead of a minute; quality is not what these tests judge


@pytest.fixture(scope="session")
def checkpoint(reference_model, calibration_files, tmp_path_factory) -> Path:
    """The reference model at 2.5 bits by the default recipe, but not tuned; attention at 4 bits."""
    out = tmp_path_factory.mktemp("checkpoints") / "tiny-2.5bit"
    quantize(reference_model, out, calibration_files, bits=2.5, tuned=False, **CALIBRATION)
    return out


@pytest.fixture(scope="session")
def checkpoint_16bit_linears(checkpoint, reference_model, calibration_files, tmp_path_factory) -> Path:
    """The same with attention left alone, for comparisons in float32, and in each layer two matrices of 8 bits, which
    have scalar codes beside the others' trellis codes."""
    out = tmp_path_factory.mktemp("checkpoints") / "tiny-2.5bit-linear16"
    plan = Plan.load(checkpoint / "plan.json")
    for widths in plan.layers.values():
        widths["gate_up"][0] = widths["down"][1] = 8
    quantize(reference_model, out, calibration_files, plan=plan, linear_bits=16, tuned=False, **CALIBRATION)
    kinds = {code.kind for code in read_checkpoint_config(out).codes}
    assert kinds == {"scalar", "trellis"}
    return out


PUBLISHED = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def published_factors(tmp_path_factory) -> Factors:
    """The authors' figures as a factors.json, written and read back as a user's would be."""
    published = json.loads((PUBLISHED / "mixtral_8x7b_factors.json").read_text())
    document = {
        "format_version": 1,
        "model": published["model"],
        "tokens": published["tokens"],
        "top_k": published["top_k"],
        "layers": {
            f"model.layers.{i}.block_sparse_moe.experts": {
                "activation_count": published["activation_count"][i],
                "routing_weight_sum": published["routing_weight_sum"][i],
                "quantization_error": {w: e[i] for w, e in published["quantization_error"].items()},
            }
            for i in range(published["layers"])
        },
    }
    path = tmp_path_factory.mktemp("published") / "factors.json"
    parse_factors(document).save(path)
    return Factors.load(path)


@pytest.fixture(scope="session")
def published_allocations() -> dict[str, list[list[int]]]:
    return json.loads((PUBLISHED / "mixtral_8x7b_allocations.json").read_text())["allocations"]
