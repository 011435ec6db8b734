"""Sorting slots by expert into blocks of a fixed capacity."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.triton_interpreter import import_interpreted, strict

launches = import_interpreted("vllm_mcmoe.kernels.triton.launches")
routing = import_interpreted("vllm_mcmoe.kernels.triton.routing")


def used_blocks(
    block_expert: torch.Tensor, slots_of_blocks: torch.Tensor, slots: int
) -> tuple[list[tuple[int, list[int]]], int]:
    """(expert, its slots without padding) of every used block, then the number of unused blocks."""
    pairs = zip(block_expert.tolist(), slots_of_blocks.tolist(), strict=True)
    blocks = [(expert, [slot for slot in block if slot != slots]) for expert, block in pairs if expert >= 0]
    return blocks, len(block_expert) - len(blocks)


def find_blocks(ids: torch.Tensor, num_experts: int, block_tokens: int, expert_map: torch.Tensor | None = None):
    """The counters are cleared and the rows quantised on the way."""
    counters = torch.full((2000,), 7, dtype=torch.int32)
    with strict():
        result = launches.Routing(torch.ones(ids.shape), ids, expert_map, num_experts, block_tokens)
        launches.prepare(launches.run_kernel, torch.ones(ids.shape[0], 128), torch.int8, result, counters)
    assert not counters.any()
    return used_blocks(result.block_expert, result.sorted_slots.view(-1, block_tokens), ids.numel())


def sort_all(ids: torch.Tensor, num_experts: int, block_tokens: int, expert_map: torch.Tensor | None = None):
    """The blocks as they are sorted for many slots."""
    with mock.patch.object(launches, "FEW_TOKENS", -1):
        return find_blocks(ids, num_experts, block_tokens, expert_map)


def expected_blocks(local_ids: list[int], num_experts: int, block_tokens: int) -> list[tuple[int, list[int]]]:
    blocks = []
    for expert in range(num_experts):
        slots = [slot for slot, chosen in enumerate(local_ids) if chosen == expert]
        blocks += [(expert, slots[at : at + block_tokens]) for at in range(0, len(slots), block_tokens)]
    return blocks


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "block_tokens"), [(1, 100, 8), (130, 8, 16), (40, 3, 64), (700, 4, 8)]
)
def test_every_slot_stands_once_in_a_block_of_its_expert(tokens, num_experts, block_tokens, dtype):
    """700 tokens: more slots than a program reads at once."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, num_experts, (tokens, 2), generator=generator).to(dtype)
    blocks, _ = sort_all(ids, num_experts, block_tokens)
    assert blocks == expected_blocks(ids.flatten().tolist(), num_experts, block_tokens)


@pytest.mark.parametrize("block_tokens", [8, 16])
@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(1, 2, 8), (4, 8, 128), (3, 4, 5), (4, 16, 3), (1, 1, 1)])
def test_few_slots_stand_in_the_same_blocks(tokens, top_k, num_experts, block_tokens):
    """Which come in the order of their first slots, not by expert. 64 slots of 3 experts fill several."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, num_experts, (tokens, top_k), generator=generator).int()
    blocks, unused = find_blocks(ids, num_experts, block_tokens)
    assert sorted(blocks) == expected_blocks(ids.flatten().tolist(), num_experts, block_tokens)
    assert len(blocks) + unused == ids.numel()


@pytest.mark.parametrize("find", [find_blocks, sort_all])
def test_ids_of_other_ranks_are_left_out(find):
    ids = torch.tensor([[0, 3], [2, -1], [3, 1]], dtype=torch.int32)
    expert_map = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    blocks, _ = find(ids, 2, 8, expert_map)
    assert sorted(blocks) == [(0, [5]), (1, [1, 4])]


@pytest.mark.parametrize("find", [find_blocks, sort_all])
def test_ids_beyond_the_last_expert_are_left_out(find):
    """vLLM pads routings with such ids; they must not become addresses."""
    blocks, _ = find(torch.tensor([[0, 7], [2, 1]], dtype=torch.int32), 2, 8)
    assert blocks == [(0, [0]), (1, [3])]


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    block_tokens=st.sampled_from([8, 16, 32, 64]),
)
@settings(max_examples=300, deadline=None)
def test_the_capacity_holds_any_routing(counts, block_tokens):
    needed = sum(-(-count // block_tokens) for count in counts)
    assert needed <= routing.block_capacity(sum(counts), len(counts), block_tokens)


@pytest.mark.parametrize(("experts_", "slots", "blocks"), [(128, 8, 8), (8, 2, 2), (1, 64, 8), (4, 12, 5)])
def test_the_capacity_is_reached_by_some_routing(experts_, slots, blocks):
    """Eight slots: eight experts of one slot each. Twelve: nine of one expert and one of each other."""
    assert routing.block_capacity(slots, experts_, 8) == blocks
