"""The reference of linears, against compressed-tensors and the definition."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from tests.kernels.linear_cases import random_inputs, random_linear
from vllm_mcmoe.kernels.packing import pack_codes
from vllm_mcmoe.kernels.reference import quantize_activations
from vllm_mcmoe.kernels.reference.linear import symmetric_linear, unpack_symmetric


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_compressed_tensors_packs(bits):
    packed, _ = random_linear(bits, 32, 5, 96)
    values = unpack_from_int32(packed, bits, torch.Size([5, 96]))
    assert torch.equal(unpack_symmetric(packed, bits).int() - (1 << (bits - 1)), values.int())
    assert torch.equal(pack_to_int32(values, bits), packed)


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_in_the_order_of_our_own_planes(bits):
    packed, _ = random_linear(bits, 128, 3, 256)
    assert torch.equal(pack_codes(unpack_symmetric(packed, bits), bits).flatten(1), packed.view(torch.uint8))


@pytest.mark.parametrize("group_size", [128, 64, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_the_float_product_of_dequantised_weights_and_rounded_inputs(bits, group_size):
    packed, scales = random_linear(bits, group_size, 7, 256)
    x, bias = random_inputs(4, 256), random_inputs(7, seed=2)
    values = unpack_symmetric(packed, bits).double() - (1 << (bits - 1))
    weight = (values.unflatten(1, (-1, group_size)) * scales.double().unsqueeze(-1)).flatten(1)
    codes, a_scales = quantize_activations(x, group_size)
    rounded = (codes.double().unflatten(1, (-1, group_size)) * a_scales.double().unsqueeze(-1)).flatten(1)
    expected = rounded @ weight.T + bias
    # float32 holds the differences of sums up to 128 * 255 * 127 to a relative 6e-8
    torch.testing.assert_close(
        symmetric_linear(x, packed, scales, bits, bias).double(), expected, rtol=0, atol=2e-6 * expected.abs().max()
    )
