"""Sorting slots by expert into blocks of a fixed capacity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.triton_interpreter import import_interpreted, strict

experts = import_interpreted("vllm_mcmoe.kernels.triton.experts")
routing = import_interpreted("vllm_mcmoe.kernels.triton.routing")


def aligned(ids: torch.Tensor, num_experts: int, block_tokens: int, expert_map: torch.Tensor | None = None):
    """(expert, its slots without padding) of every used block, then the number of unused blocks."""
    with strict():
        result = experts.Routing(ids, expert_map, num_experts, block_tokens)
        result.align()
    blocks = []
    for block, expert in enumerate(result.block_expert.tolist()):
        slots = result.sorted_slots[block * block_tokens : (block + 1) * block_tokens].tolist()
        if expert >= 0:
            blocks.append((expert, [slot for slot in slots if slot != ids.numel()]))
    return blocks, result.blocks - len(blocks)


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
    blocks, _ = aligned(ids, num_experts, block_tokens)
    assert blocks == expected_blocks(ids.flatten().tolist(), num_experts, block_tokens)


def test_ids_of_other_ranks_are_left_out():
    ids = torch.tensor([[0, 3], [2, -1], [3, 1]], dtype=torch.int32)
    expert_map = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    blocks, unused = aligned(ids, 2, 8, expert_map)
    assert blocks == [(0, [5]), (1, [1, 4])]
    assert unused == 0


def test_ids_beyond_the_last_expert_are_left_out():
    """vLLM pads routings with such ids; they must not become addresses."""
    blocks, _ = aligned(torch.tensor([[0, 7], [2, 1]], dtype=torch.int32), 2, 8)
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
