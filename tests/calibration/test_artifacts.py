"""factors.json and plan.json: round trips, and errors that say where."""

import copy
import json

import pytest

from vllm_mcmoe.calibration.allocate.plan import Plan, parse_plan
from vllm_mcmoe.calibration.measure.factors import Factors, parse_factors
from vllm_mcmoe.errors import FormatError, PlanError

LAYER = "model.layers.0.block_sparse_moe.experts"

FACTORS = {
    "format_version": 1,
    "model": "tiny",
    "tokens": 64,
    "top_k": 2,
    "dataset": "c4",
    "layers": {
        LAYER: {
            "activation_count": [70, 58],
            "routing_weight_sum": [40.5, 23.5],
            "quantization_error": {"1": [3.0, 4.0], "2": [1.0, 2.0]},
            "shapes": {"gate_up": [512, 256], "down": [256, 256]},
            "loss_increase": {"gate_up": {"2": [0.1, -0.01]}, "down": {"2": [0.2, 0.3]}},
            "down_output_max": [1.5, 90.0],
            "super_experts": [1],
            "remark": {"by": "another tool"},
        }
    },
}

PLAN = {
    "format_version": 1,
    "recipe": "mcmoe",
    "requested_bits": 2.5,
    "average_bits": 2.41,
    "objective": 0.125,
    "forced_experts": {LAYER: [1]},
    "note": "by hand",
    "layers": {LAYER: {"gate_up": [1, 3], "down": [2, 4]}},
}


def changed(document: dict, path: tuple, value: object) -> dict:
    """A copy with one entry replaced, or removed where value is ...."""
    document = copy.deepcopy(document)
    target = document
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return document


@pytest.mark.parametrize(("kind", "document"), [(Factors, FACTORS), (Plan, PLAN)], ids=["factors", "plan"])
def test_a_saved_file_has_everything_the_loaded_one_had_unknown_keys_included(kind, document, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(document))
    kind.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == document


def test_factors_present_what_was_measured():
    layer = parse_factors(FACTORS).layers[LAYER]
    assert layer.num_experts == 2
    assert layer.quantization_error[1] == [3.0, 4.0]
    assert layer.loss_increase["down"][2] == [0.2, 0.3]
    assert (layer.numel("gate_up"), layer.numel("down")) == (512 * 256, 256 * 256)


@pytest.mark.parametrize(
    ("path", "value", "key", "expected"),
    [
        (("format_version",), 2, "format_version", "upgrade vllm-mcmoe"),
        (("format_version",), ..., "format_version", "1"),
        (("model",), 7, "model", "a string"),
        (("tokens",), -1, "tokens", "at least 0"),
        (("layers",), {}, "layers", "at least one MoE layer"),
        (("layers",), [], "layers", "an object"),
        (("layers", LAYER, "activation_count"), [], "activation_count", "one count per expert"),
        (("layers", LAYER, "routing_weight_sum"), [1.0], "routing_weight_sum", "2, one per expert"),
        (("layers", LAYER, "routing_weight_sum"), [1.0, float("nan")], r"routing_weight_sum\[1\]", "a finite number"),
        (("layers", LAYER, "quantization_error"), ..., "quantization_error", "an object"),
        (("layers", LAYER, "quantization_error", "5"), [1.0, 1.0], "quantization_error", "one of 1, 2, 3, 4, 8"),
        (("layers", LAYER, "quantization_error", "2"), [1.0, -1.0], r"quantization_error\['2'\]\[1\]", "at least 0"),
        (("layers", LAYER, "shapes", "down"), [256], r"shapes\['down'\]", r"\[out, in\]"),
        (("layers", LAYER, "loss_increase", "down"), ..., r"loss_increase\['down'\]", "an object"),
        (("layers", LAYER, "super_experts"), [2], r"super_experts\[0\]", "an expert id below 2"),
        (("layers", LAYER, "super_experts"), [True], r"super_experts\[0\]", "an integer"),
    ],
)
def test_bad_factors_are_refused_with_file_key_and_what_was_expected(path, value, key, expected):
    with pytest.raises(FormatError, match=rf"factors\.json.*{key}: found .*expected .*{expected}"):
        parse_factors(changed(FACTORS, path, value), "factors.json")


@pytest.mark.parametrize(
    ("path", "value", "key", "expected"),
    [
        (("format_version",), "1", "format_version", "1"),
        (("layers", LAYER, "down"), [2, 5], r"down\[1\]", "one of"),
        (("layers", LAYER, "down"), [2, True], r"down\[1\]", "one of"),
        (("layers", LAYER, "down"), [2], "down", "2 as gate_up"),
        (("layers", LAYER, "gate_up"), ..., "gate_up", "a list"),
        (("forced_experts",), {"elsewhere": [0]}, "forced_experts", "a layer of the plan"),
        (("requested_bits",), "two", "requested_bits", "a finite number"),
    ],
)
def test_bad_plans_are_refused_with_file_key_and_what_was_expected(path, value, key, expected):
    with pytest.raises(FormatError, match=rf"plan\.json.*{key}: found .*expected .*{expected}"):
        parse_plan(changed(PLAN, path, value), "plan.json")


def test_errors_inside_a_layer_name_the_layer():
    broken = changed(FACTORS, ("layers", LAYER, "activation_count"), "many")
    with pytest.raises(FormatError, match=f"layer '{LAYER}': activation_count"):
        parse_factors(broken)


def test_a_file_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"format_version": 1,')
    with pytest.raises(FormatError, match=r"plan\.json: not a JSON file"):
        Plan.load(path)


def test_saving_what_load_would_refuse_fails_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    plan = parse_plan(PLAN)
    plan.save(path)
    plan.layers[LAYER]["down"] = [2, 7]
    with pytest.raises(FormatError, match=r"down\[1\]"):
        plan.save(path)
    assert json.loads(path.read_text()) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({LAYER: 3}, "2 experts, but the model has 3"),
        ({LAYER: 2, "other": 2}, "no layer 'other'"),
        ({}, "not a MoE layer of the model"),
    ],
    ids=["expert count", "missing layer", "unknown layer"],
)
def test_a_plan_for_another_model_is_refused(experts, message):
    with pytest.raises(PlanError, match=message):
        parse_plan(PLAN).check_against(experts)
