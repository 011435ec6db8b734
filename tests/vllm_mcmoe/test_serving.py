"""Stock vLLM on CPU, eager, float32, against a transformers forward pass with the same dequantised weights.

float32 makes the comparison strict: both sides compute the same sums, so only float32 rounding in another order and
the rare activation that rounds to the neighbouring int8 code (a step of 1/127 of its group's maximum) remain. Attention
has 16 bits for that, but in one test: in float32 vLLM has no operator for 4 bits, so our kernels serve it on every CPU.
"""

import pytest
import torch

from tests.vllm_mcmoe.engines import engine_logprobs, start_engine, stop_engine
from tests.vllm_mcmoe.serving import (
    TWO_RANKS,
    assert_close,
    assert_close_with_int8_linears,
    environment,
    expected_logprobs,
    prompts_from,
    pruning_rules,
    with_int8_activations,
    with_int8_linears,
)
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import load_dequantized
from vllm_mcmoe.pruning import pruned_fraction

pytestmark = pytest.mark.engine


def serve_and_score(checkpoint, prompts, **options):
    engine = start_engine(checkpoint, dtype="float32", **options)
    try:
        return engine_logprobs(engine, prompts)
    finally:
        stop_engine(engine)


def assert_agrees(results, checkpoint, pruning=()) -> None:
    model = with_int8_activations(load_dequantized(checkpoint), pruning)
    for tokens, logprobs in results:
        assert_close(logprobs, expected_logprobs(model, tokens))


@pytest.fixture(scope="module")
def prompts(reference_model, evaluation_files):
    return prompts_from(reference_model, evaluation_files)


@pytest.fixture(scope="module")
def fresh_cache(tmp_path_factory):
    """A start cache that no other test has filled."""
    return {"VLLM_MCMOE_CACHE": str(tmp_path_factory.mktemp("fresh_cache"))}


@pytest.fixture(scope="module")
def single_process(pruned_checkpoint_16bit_linears, prompts, fresh_cache):
    """The first start with this cache."""
    with environment(fresh_cache):
        return serve_and_score(pruned_checkpoint_16bit_linears, prompts)


def assert_same(results, expected_results) -> None:
    for (tokens, logprobs), (expected_tokens, expected) in zip(results, expected_results, strict=True):
        assert tokens == expected_tokens
        assert_close(logprobs, expected)


def test_mixtral_logprobs_equal_transformers_with_dequantised_weights(single_process, pruned_checkpoint_16bit_linears):
    """With online pruning, which the transformers side computes by the rule's definition."""
    rules = pruning_rules(pruned_checkpoint_16bit_linears, target=0.25)
    assert_agrees(single_process, pruned_checkpoint_16bit_linears, rules)
    assert 0.15 < pruned_fraction(rules) < 0.35


def test_the_second_start_maps_the_experts_and_answers_the_same(
    single_process, pruned_checkpoint_16bit_linears, prompts, fresh_cache, capfd
):
    with environment(fresh_cache):
        results = serve_and_score(pruned_checkpoint_16bit_linears, prompts)
    assert "Experts of 4 MoE layers" in (log := capfd.readouterr().out)
    assert ": 4 mapped. Cache: " in log
    for (tokens, logprobs), (expected_tokens, expected) in zip(results, single_process, strict=True):
        assert tokens == expected_tokens
        assert torch.equal(logprobs, expected)


@pytest.mark.parametrize(
    "parallelism",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        # Eager, vLLM 0.32 leaves out the warm-up on CPUs that makes the buffers between stages.
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=["TP", "EP", "PP"],
)
def test_two_ranks_answer_as_one_process(single_process, pruned_checkpoint_16bit_linears, prompts, parallelism):
    with environment(TWO_RANKS):
        results = serve_and_score(pruned_checkpoint_16bit_linears, prompts, **parallelism)
    assert_same(results, single_process)


def test_a_compiled_engine_answers_as_an_eager_one(single_process, pruned_checkpoint_16bit_linears, prompts):
    assert_same(serve_and_score(pruned_checkpoint_16bit_linears, prompts, enforce_eager=False), single_process)


def test_two_ranks_share_4_bit_linears(pruned_checkpoint, prompts, capfd):
    """Merged and column-parallel q, k and v, row-parallel o. The log says once what serves them."""
    with environment(TWO_RANKS):
        results = serve_and_score(pruned_checkpoint, prompts, tensor_parallel_size=2)
    assert (
        capfd.readouterr().out.count("; other linears of 4 bits by mcmoe; pruning of expert activations: otp 25%.") == 1
    )
    rules = pruning_rules(pruned_checkpoint, target=0.25)
    model = with_int8_linears(with_int8_activations(load_dequantized(pruned_checkpoint), rules), pruned_checkpoint)
    found = torch.cat([logprobs for _, logprobs in results])
    assert_close_with_int8_linears(found, torch.cat([expected_logprobs(model, tokens) for tokens, _ in results]))
