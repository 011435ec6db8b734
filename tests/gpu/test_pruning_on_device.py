"""The pruning kernel on hardware against the reference on the CPU, and inside a CUDA graph.

    pytest tests/gpu        in a process of its own: beside tests/kernels the kernels are already interpreted

A device's log and multiply-add differ from the CPU's in the last place. Where a score lies closer to its threshold than
that, the decision may differ: no score of these seeds lies within 1e-5 of its threshold.
"""

import pytest
import torch

from tests.kernels.pruning_cases import EXPERTS, HIDDEN, by_expert, random_call
from vllm_mcmoe.kernels.reference import pruning as reference
from vllm_mcmoe.pruning import ActivationCounts, ratio_pruning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


@pytest.fixture(scope="module")
def prune_experts():
    from triton.runtime import JITFunction

    from vllm_mcmoe.kernels.triton import pruning

    if not isinstance(pruning.prune_kernel, JITFunction):
        pytest.skip("the kernels were imported to be interpreted; run `pytest tests/gpu` by itself")
    return pruning.prune_experts


def on_device(call: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in call)


def assert_agrees(found: tuple[torch.Tensor, torch.Tensor], call: tuple[torch.Tensor, ...]) -> None:
    expected_weights, expected_ids = by_expert(*reference.prune_experts(*call[:-1], call[-1].clone()))
    found_weights, found_ids = by_expert(*(tensor.cpu() for tensor in found))
    assert torch.equal(found_ids, expected_ids)
    torch.testing.assert_close(found_weights, expected_weights, rtol=1e-6, atol=0)  # sums of 8 in another order


@pytest.mark.parametrize("tokens", [0, 1, 64, 300])
@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 10])
@pytest.mark.parametrize(("rank", "ids_dtype"), [(0, torch.int32), (8, torch.int64)])
def test_it_keeps_and_weighs_what_the_reference_does(prune_experts, tokens, top_k, rank, ids_dtype):
    call = random_call(tokens, top_k, rank, ids_dtype)
    assert_agrees(prune_experts(*on_device(call)), call)


def test_the_counts_of_many_programs_are_exact(prune_experts):
    call = random_call(4096, 8)
    *arguments, counts = on_device(call)
    _, ids = prune_experts(*arguments, counts)
    seen, kept = int((call[2] >= 0).sum()), int((ids >= 0).sum())
    assert (counts.cpu() - call[-1]).tolist() == [seen, seen - kept]


def test_switched_off_every_weight_is_exactly_as_it_was(prune_experts):
    x, weights, ids, thresholds, *rule = random_call(300, 8)
    call = (x, weights, ids, torch.full_like(thresholds, -torch.inf), *rule)
    found_weights, found_ids = prune_experts(*on_device(call))
    assert torch.equal(found_ids.cpu(), ids)
    assert torch.equal(found_weights.cpu()[ids >= 0], weights[ids >= 0])


@pytest.mark.parametrize("tokens", [1, 8, 256])
def test_a_captured_graph_follows_new_routings(prune_experts, tokens):
    held = on_device(random_call(tokens, 4, seed=1))
    prune_experts(*held)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prune_experts(*held)
    for seed in (1, 2, 3):
        call = random_call(tokens, 4, seed=seed)
        for kept, new in zip(held, call, strict=True):
            kept.copy_(new)
        graph.replay()
        assert_agrees(out, call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 300])
def test_hidden_states_of_half_precision_are_projected_in_float32(prune_experts, tokens, dtype):
    x, *rest = random_call(tokens, 8)
    call = (x.to(dtype), *rest)
    assert_agrees(prune_experts(*on_device(call)), call)


def test_the_counts_of_a_captured_pass_reach_the_host():
    """Of two layers; the first copies, so the host has every pass but the last."""
    device, (x, weights, ids, *_) = torch.device("cuda"), on_device(random_call(8, 2))
    ids.clamp_(min=0)
    counts = ActivationCounts(device)
    rules = [ratio_pruning(torch.tensor([2.0]), torch.tensor(0.0), EXPERTS, HIDDEN) for _ in range(2)]
    layers = [rule.on_device(device, "triton", counts=counts) for rule in rules]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x, weights, ids)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert counts.device.tolist() == [3 * 2 * 16, 3 * 2 * 8]
    assert counts.host.tolist() == [2 * 2 * 16, 2 * 2 * 8]
