"""The authors' published allocations, reproduced from their published factors (docs/method.md, section 2)."""

from pathlib import Path

import pytest

from vllm_mcmoe.calibration.allocate.program import allocate

DATA = Path(__file__).parents[1] / "data"


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
