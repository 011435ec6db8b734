"""Online pruning in one Triton kernel, interpreted on the CPU with every check on, against the reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.pruning_cases import EXPERTS, by_expert, random_call
from tests.kernels.triton_interpreter import import_interpreted, strict
from vllm_mcmoe.kernels.reference import pruning as reference

pruning = import_interpreted("vllm_mcmoe.kernels.triton.pruning")


def pruned(call: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, ids and counts of the interpreted kernel. The call's own counts are left as they were."""
    counts = call[-1].clone()
    with strict():
        return *pruning.prune_experts(*call[:-1], counts), counts


def assert_agrees(call: tuple[torch.Tensor, ...]) -> None:
    """The same experts and counts as the reference; weights within float32 sums of up to 8 terms in another order."""
    weights, ids, counts = pruned(call)
    expected_counts = call[-1].clone()
    expected_weights, expected_ids = by_expert(*reference.prune_experts(*call[:-1], expected_counts))
    assert (weights.dtype, ids.dtype) == (torch.float32, call[2].dtype)
    found_weights, found_ids = by_expert(weights, ids)
    assert torch.equal(found_ids, expected_ids)
    torch.testing.assert_close(found_weights, expected_weights, rtol=1e-6, atol=0)
    assert counts.tolist() == expected_counts.tolist()


def replaced(call: tuple[torch.Tensor, ...], **changes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    names = [
        "x", "weights", "ids", "thresholds", "slopes", "bias", "projection", "expert_features", "renormalize", "counts",
    ]  # fmt: skip
    return tuple(changes.get(name, tensor) for name, tensor in zip(names, call, strict=True))


@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rank", "ids_dtype"), [(0, torch.int32), (8, torch.int64)])
def test_it_keeps_and_weighs_what_the_reference_does(tokens, top_k, rank, ids_dtype):
    assert_agrees(random_call(tokens, top_k, rank, ids_dtype))


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_programs_of_several_tokens_do_the_same(top_k):
    assert pruning.block_sizes(300, top_k, rank=8)[0] > pruning.block_sizes(130, top_k, rank=8)[0] == 1
    assert_agrees(random_call(300, top_k))


def test_the_random_calls_drop_some_experts_but_not_all():
    """A rule that keeps or drops everything would show nothing above."""
    for top_k in (2, 3, 4, 8):
        call = random_call(130, top_k)
        *_, counts = pruned(call)
        seen, dropped = (counts - call[-1]).tolist()
        assert seen == (call[2] >= 0).sum()
        assert 0.05 * seen < dropped < 0.8 * seen


def test_every_pair_stays_where_it_stood():
    call = random_call(40, 4)
    _, ids, _ = pruned(call)
    assert torch.equal(ids, torch.where(ids >= 0, call[2], -1))


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_nothing_below_the_threshold_leaves_every_weight_exactly_as_it_was(top_k):
    call = random_call(40, top_k)
    weights, ids, counts = pruned(replaced(call, thresholds=torch.full((top_k - 1,), -torch.inf)))
    assert torch.equal(ids, call[2])
    assert torch.equal(weights[ids >= 0], call[1][ids >= 0])
    assert counts[1] == call[-1][1]


def test_with_everything_below_the_threshold_the_largest_weight_stays_and_takes_over_all():
    call = random_call(40, 4)
    every_expert = torch.arange(4, dtype=torch.int32).repeat(40, 1)
    limits = {"thresholds": torch.full((3,), torch.inf), "renormalize": torch.tensor(1.0)}
    weights, ids, _ = pruned(replaced(call, ids=every_expert, **limits))
    largest = call[1].argmax(dim=-1, keepdim=True)
    assert torch.equal(ids, torch.where(every_expert == largest, every_expert, -1))
    # w * (total / w): three roundings
    torch.testing.assert_close(weights.gather(-1, largest), call[1].sum(-1, keepdim=True), rtol=4e-7, atol=0)


def test_equal_weights_rank_in_the_order_of_their_positions():
    """Thresholds that drop ranks 1 and 3 alone: the second and the fourth of four equal weights."""
    call = replaced(
        random_call(5, 4),
        weights=torch.full((5, 4), 0.25),
        ids=torch.tensor([[3, 1, 2, 0]] * 5),
        thresholds=torch.tensor([torch.inf, -torch.inf, torch.inf]),
    )
    assert_agrees(call)
    assert pruned(call)[1].tolist() == [[3, -1, 2, -1]] * 5


def test_lanes_beyond_the_last_expert_outrank_none_not_even_negative_weights():
    """Three weights in four lanes; no router gives negative ones, but a rank of 3 would read beyond the thresholds."""
    call = random_call(40, 3)
    assert_agrees(replaced(call, weights=call[1] - 0.5, renormalize=torch.tensor(0.0)))


def test_tokens_of_padding_stay_padding():
    call = random_call(20, 2)
    call[2][5:] = -1
    assert_agrees(call)
    assert torch.isfinite(pruned(call)[0]).all()


def test_the_first_expert_stays_even_where_the_hidden_state_is_not_a_number():
    """Rows of padding may hold anything."""
    call = random_call(20, 4)
    call[0][7:] = torch.nan
    assert_agrees(call)


def test_ids_beyond_the_last_expert_are_no_expert():
    """vLLM pads routings with such ids; they must not become addresses."""
    call = random_call(20, 4)
    padded = replaced(call, ids=torch.where(call[2] < 0, EXPERTS, call[2]))
    for found, expected in zip(pruned(padded), pruned(call), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 300])
def test_hidden_states_of_half_precision_and_any_size_are_projected_in_float32(dtype, tokens):
    """A size that is no whole number of blocks, a rank that is no power of two."""
    x, weights, ids, *rule = random_call(tokens, 4, rank=3)
    hidden = 5000
    generator = torch.Generator().manual_seed(1)
    projection = torch.randn(3, hidden, generator=generator) * hidden**-0.5
    call = replaced((x, weights, ids, *rule), x=torch.randn(tokens, hidden, generator=generator), projection=projection)
    assert_agrees(replaced(call, x=call[0].to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_taken_as_they_are(dtype):
    call = random_call(20, 4)
    assert_agrees(replaced(call, weights=call[1].to(dtype)))


def test_arguments_need_not_be_contiguous():
    call = random_call(20, 4)
    assert_agrees(replaced(call, weights=call[1].t().contiguous().t(), ids=call[2].t().contiguous().t()))


def test_no_tokens_are_pruned_to_no_tokens():
    x, weights, ids, *rule = random_call(3, 4)
    found_weights, found_ids, counts = pruned((x[:0], weights[:0], ids[:0], *rule))
    assert found_weights.shape == found_ids.shape == (0, 4)
    assert counts.tolist() == rule[-1].tolist()


def test_the_counts_memory_around_is_untouched():
    """The interpreter's guard sees loads and stores, but not the atomic additions."""
    call = random_call(130, 8)
    around = torch.tensor([7, 0, 0, 7])
    with strict():
        pruning.prune_experts(*call[:-1], around[1:3])
    assert around[0] == around[3] == 7
    assert around[1] == (call[2] >= 0).sum()


def test_tracing_sees_the_shapes_and_dtypes_of_the_result():
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = random_call(9, 4, ids_dtype=torch.int64)
    with FakeTensorMode() as mode:
        weights, ids = pruning.prune_experts(*map(mode.from_tensor, call))
    assert (weights.shape, weights.dtype) == (call[1].shape, torch.float32)
    assert (ids.shape, ids.dtype) == (call[2].shape, torch.int64)


def test_what_a_model_needs_is_compiled_while_it_is_loaded_and_nothing_later():
    """By Triton's own launcher, with bfloat16 as the default dtype, as vLLM loads a model. Two kernels a rule: for few
    tokens and for many; one launch a call."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_pruning_variants"],
        env=environment,
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for found in json.loads(printed).values():
        assert [kernel["BLOCK_TOKENS"] for kernel in found["at load"]] == [1, 8]
        assert {kernel["x_ptr"] for kernel in found["at load"]} == {"*bf16"}
        assert {kernel["weights_ptr"] for kernel in found["at load"]} == {"*fp32"}
        assert found["at calls"] == []
        assert found["launches per call"] == 1
        assert set(found["buffers"].values()) == {"torch.float32", "torch.int64"}


def test_compiled_for_gpus_it_spills_nothing(tmp_path):
    """One of each vendor, in a process that does not interpret and a cache that holds nothing of another Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton_aot_pruning", "sm90", "gfx942"]
    found = subprocess.run(
        command,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.splitlines() == ["sm90 1 0", "gfx942 1 0", "sm90 4 0", "gfx942 4 0"]
