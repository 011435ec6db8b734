"""The reference, against float computations written without it."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.matrices import random_biases, random_call, random_layer, random_matrix
from vllm_mcmoe.kernels import experts_class
from vllm_mcmoe.kernels.expert_function import GPT_OSS, ExpertFunction
from vllm_mcmoe.kernels.packing import CODES, Code
from vllm_mcmoe.kernels.reference import fused_experts, linear_int8, quantize_activations


def test_activation_codes_and_scales_of_a_group_written_by_hand():
    x = torch.zeros(1, 128)
    x[0, :4] = torch.tensor([2.54, -1.27, 0.029, -0.031])  # scale 0.02
    codes, scales = quantize_activations(x)
    assert scales.tolist() == [[pytest.approx(0.02, rel=1e-6)]]
    assert codes[0, :5].tolist() == [127, -64, 1, -2, 0]  # -63.5 goes to the even -64


def test_a_group_of_zeros_has_zero_scale_and_codes():
    codes, scales = quantize_activations(torch.zeros(2, 256))
    assert not codes.any() and not scales.any()


def test_activations_of_a_wrong_width_are_refused():
    with pytest.raises(ValueError, match="width 100 is not divisible by the group size 128"):
        quantize_activations(torch.zeros(1, 100))


@pytest.mark.parametrize("code", CODES, ids=str)
def test_int8_linear_equals_dequantized_weights_times_dequantized_activations(code):
    matrix = random_matrix(code, 48, 384, torch.Generator().manual_seed(0))
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize_activations(x)
    dequantized = codes.double() * scales.double().repeat_interleave(128, dim=1)
    expected = dequantized @ matrix.dequantize(torch.float64).T
    # float32 rounding of 3 groups: a few units of 6e-8 of the largest term
    torch.testing.assert_close(
        linear_int8(x, matrix).double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max())
    )


def gpt_oss_by_hand(gate_up: torch.Tensor) -> torch.Tensor:
    """As transformers writes it, for gate before up."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


FORMULAS = {
    ExpertFunction(): lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
    ExpertFunction("gelu"): lambda both: F.gelu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
    ExpertFunction("gelu_tanh"): lambda both: F.gelu(both.chunk(2, -1)[0], approximate="tanh") * both.chunk(2, -1)[1],
    ExpertFunction("relu2", gated=False): lambda up: torch.where(up > 0, up**2, 0.0),
    ExpertFunction("silu", gated=False): lambda up: up / (1 + torch.exp(-up)),
    ExpertFunction(limit=2.0): lambda both: (
        F.silu(both.chunk(2, -1)[0].clamp(max=2.0)) * both.chunk(2, -1)[1].clamp(-2.0, 2.0)
    ),
    GPT_OSS: gpt_oss_by_hand,
}


def plain_moe(layer: dict, x, topk_weights, topk_ids, formula, biases=None) -> torch.Tensor:
    """Token by token with dequantised weights, as a textbook writes it."""
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for routing_weight, expert in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
            if expert >= 0:
                projected = layer["gate_up"][expert].dequantize() @ x[token]
                h = formula(projected if biases is None else projected + biases["gate_up"][expert])
                y = layer["down"][expert].dequantize() @ h
                out[token] += routing_weight * (y if biases is None else y + biases["down"][expert])
    return out


def test_float_activations_give_the_plain_dequantized_layer():
    layer = random_layer(CODES, CODES[::-1], hidden=256, intermediate=128)
    x, weights, ids = random_call(7, 256, len(CODES), 2)
    ids[0] = -1
    ids[1, 1] = -1
    found = fused_experts(x, weights, ids, layer["gate_up"], layer["down"], activations="float")
    expected = plain_moe(layer, x, weights, ids, FORMULAS[ExpertFunction()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("function", FORMULAS, ids=str)
def test_every_function_of_experts(function, biased):
    layer = random_layer([2, 3], [4, 1], 256, 128, function=function)
    call = random_call(5, 256, 2, 2)
    biases = random_biases(2, 256, 128, function) if biased else None
    named = {f"{part}_bias": bias for part, bias in (biases or {}).items()}
    matrices = layer["gate_up"], layer["down"]
    found = fused_experts(*call, *matrices, function=function, activations="float", **named)
    expected = plain_moe(layer, *call, FORMULAS[function], biases)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation": "swish"}, "no activation 'swish'; supported: silu, gelu, gelu_tanh, relu2"),
        ({"activation": "gelu", "limit": 7.0}, "limit, alpha and beta belong to silu with a gate, not to gelu"),
        ({"gated": False, "beta": 1.0}, "belong to silu with a gate, not to silu.*without a gate"),
        ({"limit": 0.0}, "limit is 0.0, expected a positive number"),
        ({"limit": float("nan")}, "limit is nan, expected a positive number"),
    ],
)
def test_a_function_that_does_not_exist_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ExpertFunction(**values)


def test_int8_activations_stay_within_their_rounding_of_the_float_layer():
    layer = random_layer([2] * 4, [3] * 4, hidden=512, intermediate=256)
    call = random_call(16, 512, 4, 2)
    exact = fused_experts(*call, layer["gate_up"], layer["down"], activations="float")
    rounded = fused_experts(*call, layer["gate_up"], layer["down"], activations="int8")
    # a code is off by at most half of max/127, about 0.3% of a normal group's spread, three times in a row
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


def test_dropped_pairs_contribute_nothing():
    layer = random_layer([2] * 4, [2] * 4, hidden=128, intermediate=128)
    x, weights, ids = random_call(3, 128, 4, 2)
    dropped = ids.clone()
    dropped[:, 1] = -1
    zero_weight = weights.clone()
    zero_weight[:, 1] = 0
    matrices = layer["gate_up"], layer["down"]
    assert torch.equal(fused_experts(x, weights, dropped, *matrices), fused_experts(x, zero_weight, ids, *matrices))


def test_module_computes_the_function():
    layer = random_layer([2, 3], [3, 2], hidden=128, intermediate=128)
    call = random_call(3, 128, 2, 1)
    module = experts_class("reference").prepare(**layer)
    assert torch.equal(module(*call), fused_experts(*call, layer["gate_up"], layer["down"]))


def test_module_adds_biases():
    layer = random_layer([2, 3], [3, 2], 128, 128, function=GPT_OSS)
    biases, call = random_biases(2, 128, 128), random_call(3, 128, 2, 1)
    module = experts_class("reference").prepare(**layer)
    module.set_biases(**biases)
    matrices = layer["gate_up"], layer["down"]
    named = {f"{part}_bias": bias for part, bias in biases.items()}
    assert torch.equal(module(*call), fused_experts(*call, *matrices, function=GPT_OSS, **named))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="no kernel backend 'abacus'"):
        experts_class("abacus")


def test_a_matrix_other_than_announced_is_refused():
    layer = random_layer([2, 3], [3, 2], hidden=128, intermediate=128) | {"down_codes": [Code(3), Code(4)]}
    with pytest.raises(ValueError, match=r"down of expert 1: expected 4 bits .* found 2 bits"):
        experts_class("reference").prepare(**layer)
