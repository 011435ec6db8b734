import pytest

from vllm_mcmoe.checkpoint import ExpertBits
from vllm_mcmoe.errors import McmoeError
from vllm_mcmoe.support import check_layer

LAYER = "model.layers.0.block_sparse_moe.experts"
MIXTRAL_OVER_TWO_RANKS = {
    "num_experts": 8,
    "intermediate_size": 14336,
    "tp_size": 2,
    "activation": "silu",
    "backend": "cpu",
    "has_bias": False,
    "weight_on_input": False,
    "swiglu_limit": None,
    "swiglu_alpha": None,
    "swiglu_beta": None,
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
        ({"activation": "relu2"}, "activation 'relu2' is not supported; the cpu kernels have .*silu"),
        ({"weight_on_input": True}, "routing weights to the input"),
        ({"has_bias": True}, "experts with biases"),
        ({"swiglu_limit": 7.0}, "swiglu_limit is 7.0, beside the activation 'silu'; the kernels have no clamp"),
        (
            {"fused_shared_experts": 1},
            "fuses the model's shared experts.*FUSION_SHARED_EXPERTS=0",
        ),
        ({"own_class": "Substituted"}, "a class of its own for this layer, Substituted"),
    ],
    ids=[
        "experts",
        "fewer groups than ranks",
        "activation",
        "weight on input",
        "bias",
        "clamp",
        "fused shared experts",
        "own class",
    ],
)
def test_a_layer_that_cannot_be_served_is_refused_by_name(change, message):
    with pytest.raises(McmoeError, match=f"{LAYER}: .*{message}"):
        check(**change)
