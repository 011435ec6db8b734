import pytest

from vllm_mcmoe.checkpoint import ExpertBits
from vllm_mcmoe.errors import McmoeError
from vllm_mcmoe.kernels.expert_function import GPT_OSS, ExpertFunction
from vllm_mcmoe.support import check_cpu_routing, check_layer, check_parallelism, expert_function

LAYER = "model.layers.0.block_sparse_moe.experts"
MIXTRAL_OVER_TWO_RANKS = {
    "num_experts": 8,
    "intermediate_size": 14336,
    "tp_size": 2,
    "top_k": 2,
    "weight_on_input": False,
    "fused_shared_experts": 0,
    "own_class": None,
}


def check(**changes) -> None:
    check_layer(LAYER, ExpertBits((2,) * 8, (3,) * 8), **(MIXTRAL_OVER_TWO_RANKS | changes))


def test_a_mixtral_layer_is_accepted():
    check()


def test_groups_that_ranks_share_unevenly_are_accepted():
    check(intermediate_size=1408, tp_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 16}, "the model has 16 experts, quantization_config.experts lists 8"),
        (
            {"intermediate_size": 768, "tp_size": 8},
            "768 has 6 groups of 128, fewer than the 8 tensor parallel ranks.*--enable-expert-parallel",
        ),
        ({"weight_on_input": True}, "routing weights to the input of 2 experts a token"),
        (
            {"fused_shared_experts": 1},
            "fuses the model's shared experts.*FUSION_SHARED_EXPERTS=0",
        ),
        ({"own_class": "Substituted"}, "a class of its own for this layer, Substituted"),
    ],
    ids=[
        "experts",
        "fewer groups than ranks",
        "weight on input",
        "fused shared experts",
        "own class",
    ],
)
def test_a_layer_that_cannot_be_served_is_refused_by_name(change, message):
    with pytest.raises(McmoeError, match=f"{LAYER}: .*{message}"):
        check(**change)


NOTHING_BESIDE = {"limit": None, "alpha": None, "beta": None}


@pytest.mark.parametrize(
    ("activation", "beside", "expected"),
    [
        ("silu", {}, ExpertFunction()),
        ("silu", {"alpha": 1.0, "beta": 0.0}, ExpertFunction()),
        ("silu", {"limit": 10.0}, ExpertFunction(limit=10.0)),
        ("gelu_tanh", {}, ExpertFunction("gelu_tanh")),
        ("swigluoai", {}, GPT_OSS),
        ("swigluoai", {"limit": 7.0}, GPT_OSS),
        (
            "swigluoai_uninterleave",
            {"limit": 6.0, "alpha": 1.5, "beta": 0.5},
            ExpertFunction("silu", True, 6, 1.5, 0.5),
        ),
        ("relu2_no_mul", {}, ExpertFunction("relu2", gated=False)),
        ("silu_no_mul", {}, ExpertFunction("silu", gated=False)),
    ],
)
def test_what_vllm_calls_the_experts_function(activation, beside, expected):
    assert expert_function(LAYER, activation, **(NOTHING_BESIDE | beside)) == expected


@pytest.mark.parametrize(
    ("activation", "beside", "message"),
    [
        ("relu2", {}, "activation 'relu2' is not supported; the kernels have .*silu"),
        ("swiglustep", {}, "activation 'swiglustep' is not supported"),
        ("silu", {"alpha": 1.702}, "swiglu_alpha is 1.702, beside the activation 'silu'.*with 1.0"),
        ("silu", {"limit": 7.0, "beta": 1.0}, "swiglu_beta is 1.0, beside the activation 'silu'.*with 0.0"),
        ("gelu", {"limit": 7.0}, "swiglu_limit is 7.0, beside the activation 'gelu'.*with None"),
        ("swigluoai", {"limit": 6.0}, "swiglu_limit is 6.0, beside the activation 'swigluoai'.*with 7.0"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused_by_name(activation, beside, message):
    with pytest.raises(McmoeError, match=f"{LAYER}: .*{message}.*Serve the 16-bit model"):
        expert_function(LAYER, activation, **(NOTHING_BESIDE | beside))


@pytest.mark.parametrize(
    ("activation", "limit", "message"),
    [
        ("swigluoai_uninterleave", None, "'swigluoai_uninterleave' comes without a swiglu_limit"),
        ("silu", 0.0, "swiglu_limit is 0.0, expected a positive number"),
    ],
)
def test_a_limit_that_is_none_is_refused_by_name(activation, limit, message):
    with pytest.raises(McmoeError, match=f"{LAYER}: .*{message}"):
        expert_function(LAYER, activation, **(NOTHING_BESIDE | {"limit": limit}))


GATHERING = {"gathers_tokens": True, "can_gather": True, "all2all_backend": "allgather_reducescatter", "pcp_size": 1}


@pytest.mark.parametrize("change", [{}, {"gathers_tokens": False, "all2all_backend": "deepep_low_latency"}])
def test_ranks_that_can_exchange_their_tokens_or_need_not_are_accepted(change):
    check_parallelism(LAYER, **(GATHERING | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"all2all_backend": "deepep_low_latency"},
            "deepep_low_latency.*Use --all2all-backend allgather_reducescatter",
        ),
        ({"can_gather": False}, "cannot gather the tokens.*Start one server per replica"),
        ({"pcp_size": 2}, "Drop --prefill-context-parallel-size"),
    ],
    ids=["all2all backend", "platform", "context parallel"],
)
def test_ranks_that_cannot_exchange_their_tokens_are_refused_by_name(change, message):
    with pytest.raises(McmoeError, match=f"{LAYER}: .*{message}"):
        check_parallelism(LAYER, **(GATHERING | change))


SOFTMAX = {"scoring": "softmax", "has_correction_bias": False, "own_function": False, "grouped": False}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scoring": "sigmoid", "has_correction_bias": True, "grouped": True},
        {"scoring": "sigmoid", "own_function": True},
    ],
    ids=["softmax", "groups", "own function"],
)
def test_what_vllm_routes_on_cpus_is_accepted(change):
    check_cpu_routing(LAYER, **(SOFTMAX | change))
