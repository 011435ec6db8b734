import json

import pytest

from vllm_mcmoe.checkpoint import CheckpointConfig, ExpertBits, is_mcmoe_checkpoint, read_checkpoint_config
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import Code

LAYER = "model.layers.0.block_sparse_moe.experts"


def valid_config() -> dict:
    return CheckpointConfig(
        experts={LAYER: ExpertBits(gate_up=(1, 2, 3), down=(2, 4, 8))},
        linear={"quant_method": "compressed-tensors"},
        average_bits={"experts": 2.5, "model": 3.1},
    ).to_dict()


def kinds(gate_up: object = None, down: object = None) -> dict:
    """The experts of valid_config with kinds of codes."""
    given = {"gate_up_kinds": gate_up, "down_kinds": down}
    return {LAYER: valid_config()["experts"][LAYER] | {key: value for key, value in given.items() if value is not None}}


@pytest.mark.parametrize(
    "experts", [{}, {"experts": kinds(["scalar", "trellis", "trellis"], ["trellis", "scalar", "scalar"])}]
)
def test_config_survives_a_json_round_trip(experts):
    config = json.loads(json.dumps(valid_config() | experts))
    assert CheckpointConfig.from_dict(config).to_dict() == config


def test_a_matrix_has_the_code_that_the_config_says():
    config = CheckpointConfig.from_dict(valid_config() | {"experts": kinds(["scalar", "trellis", "trellis"])})
    assert config.experts[LAYER].gate_up_codes == (Code(1), Code(2, "trellis"), Code(3, "trellis"))
    assert config.experts[LAYER].down_codes == (Code(2), Code(4), Code(8))
    again = ExpertBits.of_codes(config.experts[LAYER].gate_up_codes, config.experts[LAYER].down_codes)
    assert again.down_codes == config.experts[LAYER].down_codes


def test_kinds_are_left_out_where_all_codes_are_scalar():
    assert ExpertBits.of_codes([Code(2)], [Code(3)]).to_dict() == {"gate_up": [2], "down": [3]}


def test_optional_parts_are_left_out_when_absent():
    config = CheckpointConfig(experts={LAYER: ExpertBits((2,), (2,))}).to_dict()
    assert "linear" not in config and "pruning" not in config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq', expected 'mcmoe'"),
        ({"format_version": 4}, "format_version is 4, this vllm-mcmoe reads versions 1 to 3; upgrade vllm-mcmoe"),
        ({"format_version": None}, "format_version is None.*quantise the model again"),
        ({"group_size": 64}, "group_size is 64, expected 128"),
        ({"experts": {}}, "'experts' must map"),
        ({"experts": {LAYER: [2, 2]}}, f"experts of {LAYER}: expected gate_up and down"),
        ({"experts": {LAYER: {"gate_up": [2], "down": []}}}, f"{LAYER}.down: expected a list"),
        ({"experts": {LAYER: {"gate_up": [2, 5], "down": [2, 2]}}}, "expert 1 has bit-width 5"),
        ({"experts": {LAYER: {"gate_up": [2], "down": [2, 2]}}}, "1 widths for gate_up but 2 for down"),
        ({"experts": kinds(["trellis", "scalar"])}, f"{LAYER}.gate_up_kinds: expected a list of 3 kinds"),
        ({"experts": kinds("trellis")}, f"{LAYER}.gate_up_kinds: expected a list of 3 kinds of codes, found 'trellis'"),
        (
            {"experts": kinds(["trellis", "lattice", []])},
            "gate_up_kinds: expert 1 has codes of kind 'lattice'; known are",
        ),
        ({"experts": kinds(down=["trellis"] * 3)}, "down_kinds: expert 2 has 8 bits, for which no trellis code"),
        ({"experts": kinds(["trellis"] * 3), "format_version": 2}, "gate_up_kinds: format version 2 has scalar codes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_out_of_form_is_refused_by_name(change, message):
    with pytest.raises(FormatError, match=message):
        CheckpointConfig.from_dict(valid_config() | change, source="config.json")


def test_reading_names_the_file_that_is_wrong(tmp_path):
    with pytest.raises(FormatError, match=r"config\.json does not exist"):
        read_checkpoint_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(FormatError, match=r"config\.json: not valid JSON"):
        read_checkpoint_config(tmp_path)
    path.write_text("{}")
    with pytest.raises(FormatError, match="run `mcmoe quantize`"):
        read_checkpoint_config(tmp_path)


def test_only_our_own_checkpoints_are_recognised(tmp_path):
    assert not is_mcmoe_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert not is_mcmoe_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": valid_config()}))
    assert is_mcmoe_checkpoint(tmp_path)
