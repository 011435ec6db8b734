"""Launch parameters: sane defaults, and a tuned table where there is one."""

import json
from dataclasses import replace

import pytest

from tests.kernels.triton_interpreter import import_interpreted

tiles = import_interpreted("vllm_mcmoe.kernels.triton.tiles")

H100 = tiles.Device("sm90", 132)
MI300 = tiles.Device("gfx942", 304)
MIXTRAL = tiles.Shape(experts=8, top_k=2, hidden_size=4096, intermediate_size=14336)
QWEN3 = tiles.Shape(experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
TUNED = tiles.Tiles(16, num_warps=4, num_stages=2)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table with entries for Qwen3 on sm90, from 2 and from 64 tokens."""
    path = tmp_path / "tiles.json"
    larger = tiles.Tiles(32, num_warps=4, num_stages=3)
    tiles.write_table(path, {"sm90": {QWEN3.key: {64: larger, 2: TUNED}}})
    monkeypatch.setenv(tiles.TABLE_VARIABLE, str(path))
    return path


@pytest.mark.parametrize(("tokens", "block"), [(1, 8), (32, 8), (33, 16), (64, 16), (193, 16), (4096, 16)])
def test_the_block_holds_an_experts_average_share(tokens, block):
    assert tiles.default_tiles(H100, MIXTRAL, tokens).block_tokens == block


@pytest.mark.parametrize(("tokens", "block"), [(1, 16), (192, 32), (193, 64), (4096, 64)])
def test_amd_blocks_are_at_least_16_tokens(tokens, block):
    assert tiles.default_tiles(MI300, MIXTRAL, tokens).block_tokens == block


def test_ranks_that_share_the_experts_share_the_slots():
    """256 experts of DeepSeek-V3 on 8 ranks: 256 tokens give each of a rank's 32 experts 8 slots, not 64."""
    rank = tiles.Shape(32, top_k=8, hidden_size=7168, intermediate_size=2048, all_experts=256)
    alone = replace(rank, all_experts=0)
    assert rank.local_slots(256) == 256
    assert tiles.default_tiles(H100, rank, 256).block_tokens == 8
    assert tiles.default_tiles(H100, alone, 256).block_tokens == 16
    assert rank.key != alone.key


def test_float_activations_are_tuned_apart(table):
    shape = replace(QWEN3, float_activations=True)
    assert tiles.choose_tiles(H100, shape, 64) == tiles.default_tiles(H100, shape, 64)
    assert tiles.choose_tiles(H100, QWEN3, 64) != tiles.default_tiles(H100, QWEN3, 64)


def test_a_grid_that_fills_the_device_is_not_split():
    prefill = tiles.default_tiles(H100, MIXTRAL, 4096)
    assert (prefill.gate_up_split_k, prefill.down_split_k) == (1, 1)


def test_one_token_of_qwen3_is_split_until_the_device_is_full_or_loops_get_short():
    """gate_up: 48 programs of 16 groups -> 4 parts of 4. down: 64 programs of 6 groups: halves would be 3."""
    decode = tiles.default_tiles(H100, QWEN3, 1)
    assert (decode.gate_up_split_k, decode.down_split_k) == (4, 1)


@pytest.mark.parametrize(("tokens", "block"), [(2, 16), (63, 16), (64, 32), (10_000, 32)])
def test_the_table_answers_for_the_largest_tuned_count_below(table, tokens, block):
    assert tiles.choose_tiles(H100, QWEN3, tokens).block_tokens == block


@pytest.mark.parametrize(
    ("device", "shape", "tokens"),
    [(H100, QWEN3, 1), (H100, MIXTRAL, 8), (MI300, QWEN3, 8)],
    ids=["fewer tokens", "other shape", "other device"],
)
def test_defaults_answer_where_the_table_is_silent(table, device, shape, tokens):
    assert tiles.choose_tiles(device, shape, tokens) == tiles.default_tiles(device, shape, tokens)


def test_a_table_that_is_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(tiles.TABLE_VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        tiles.choose_tiles(H100, QWEN3, 1)


def test_a_table_is_plain_json(table):
    assert json.loads(table.read_text())["sm90"][QWEN3.key]["2"]["num_warps"] == 4
