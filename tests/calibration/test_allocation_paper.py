"""The authors' published allocations, reproduced from their published factors (PAPER.md section 3)."""

import json
from pathlib import Path

import pytest

from vllm_mcmoe.calibration.allocation import allocate
from vllm_mcmoe.calibration.artifacts import Factors, parse_factors

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def published_factors(tmp_path_factory) -> Factors:
    """The authors' figures as a factors.json, written and read back as a user's would be."""
    published = json.loads((DATA / "mixtral_8x7b_factors.json").read_text())
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


@pytest.fixture(scope="module")
def published_allocations() -> dict[str, list[list[int]]]:
    return json.loads((DATA / "mixtral_8x7b_allocations.json").read_text())["allocations"]


@pytest.mark.parametrize("bits_per_layer", [12, 14, 16, 18, 20])
def test_paper_code_reproduces_every_published_layer(bits_per_layer, published_factors, published_allocations):
    plan = allocate(published_factors, recipe="paper-code", bits_per_layer=bits_per_layer)
    expected = published_allocations[str(bits_per_layer)]
    assert [widths["gate_up"] for widths in plan.layers.values()] == expected
    assert [widths["down"] for widths in plan.layers.values()] == expected


@pytest.mark.parametrize("bits_per_layer", [12, 16, 20])
def test_model_scope_is_never_worse_than_layer_scope_at_the_same_total(bits_per_layer, published_factors):
    per_layer, per_model = (
        allocate(published_factors, recipe="paper-code", bits_per_layer=bits_per_layer, scope=scope)
        for scope in ("layer", "model")
    )
    assert per_model.objective <= per_layer.objective * (1 + 1e-9)  # both sums are rounded in float64
    assert per_model.average_bits <= per_layer.average_bits
