"""The reference, against float computations written without it."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.matrices import random_call, random_layer, random_matrix
from vllm_mcmoe.kernels import experts_class, supported_activations
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


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_int8_linear_equals_dequantized_weights_times_dequantized_activations(bits):
    matrix = random_matrix(bits, 48, 384, torch.Generator().manual_seed(0))
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize_activations(x)
    dequantized = codes.double() * scales.double().repeat_interleave(128, dim=1)
    expected = dequantized @ matrix.dequantize(torch.float64).T
    # float32 rounding of 3 groups: a few units of 6e-8 of the largest term
    torch.testing.assert_close(
        linear_int8(x, matrix).double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max())
    )


def plain_moe(layer: dict, x, topk_weights, topk_ids, activation) -> torch.Tensor:
    """Token by token with dequantised weights, as a textbook writes it."""
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for routing_weight, expert in zip(topk_weights[token], topk_ids[token].tolist(), strict=True):
            if expert >= 0:
                gate, up = (layer["gate_up"][expert].dequantize() @ x[token]).chunk(2)
                out[token] += routing_weight * (layer["down"][expert].dequantize() @ (activation(gate) * up))
    return out


def test_float_activations_give_the_plain_dequantized_layer():
    layer = random_layer([1, 2, 3, 4, 8], [8, 4, 3, 2, 1], hidden=256, intermediate=128)
    x, weights, ids = random_call(7, 256, 5, 2)
    ids[0] = -1
    ids[1, 1] = -1
    found = fused_experts(x, weights, ids, layer["gate_up"], layer["down"], activations="float")
    expected = plain_moe(layer, x, weights, ids, F.silu)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


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


def test_every_backend_names_its_activations():
    assert supported_activations("reference") == supported_activations("cpu") == ("silu", "gelu", "gelu_tanh")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="no kernel backend 'abacus'"):
        experts_class("abacus")


def test_a_matrix_other_than_announced_is_refused():
    layer = random_layer([2, 3], [3, 2], hidden=128, intermediate=128) | {"down_bits": [3, 4]}
    with pytest.raises(ValueError, match=r"down of expert 1: expected 4 bits .* found 2 bits"):
        experts_class("reference").prepare(**layer)


def test_an_unsupported_activation_is_refused():
    layer = random_layer([2], [2], hidden=128, intermediate=128)
    with pytest.raises(ValueError, match="reference kernels have no activation 'relu2'; supported: silu"):
        experts_class("reference").prepare(**layer, activation="relu2")
