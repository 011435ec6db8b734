import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from vllm_mcmoe.calibration.matrix.gptq import HessianFactor
from vllm_mcmoe.calibration.quantize.linears import (
    GROUP_SIZES,
    choose_group_size,
    dequantize_linear,
    linear_bits,
    linear_config,
    quantize_linear,
)
from vllm_mcmoe.errors import FormatError


@pytest.fixture
def inputs():
    """Correlated inputs, as real ones are: [2000, 256]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2000, 64, generator=generator) @ torch.randn(64, 256, generator=generator) + torch.randn(
        2000, 256, generator=generator
    )


@pytest.fixture
def weight():
    return 0.02 * torch.randn(96, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_written_tensors_hold_exactly_the_weight_that_was_calibrated(weight, inputs, bits, group_size):
    factor = HessianFactor.build(inputs.t() @ inputs)
    quantized, tensors = quantize_linear(weight, factor, bits, group_size, torch.bfloat16)
    assert tensors["weight_scale"].shape == (96, 256 // group_size)
    assert torch.equal(dequantize_linear(tensors, bits), quantized)


@pytest.mark.parametrize("bits", [4, 8])
def test_tensors_have_the_pack_quantized_layout(weight, inputs, bits):
    factor = HessianFactor.build(inputs.t() @ inputs)
    _, tensors = quantize_linear(weight, factor, bits, 128, torch.bfloat16)
    assert tensors["weight_packed"].dtype == torch.int32
    assert tensors["weight_packed"].shape == (96, 256 * bits // 32)
    assert tensors["weight_scale"].dtype == torch.bfloat16
    assert tensors["weight_scale"].shape == (96, 2)
    assert tensors["weight_shape"].tolist() == [96, 256]


def test_compensation_halves_the_squared_error_of_rounding(weight, inputs):
    """Measured 0.29 on inputs this correlated; an identity Hessian is plain rounding."""
    errors = []
    for moment in (inputs.t() @ inputs, torch.eye(256)):
        quantized, _ = quantize_linear(weight, HessianFactor.build(moment), 4, 128, torch.float32)
        errors.append(float((inputs @ (quantized - weight).t()).square().sum()))
    assert errors[0] < 0.5 * errors[1]


def test_rows_of_zeros_stay_zero(inputs):
    factor = HessianFactor.build(inputs.t() @ inputs)
    quantized, _ = quantize_linear(torch.zeros(32, 256), factor, 4, 128, torch.bfloat16)
    assert torch.equal(quantized, torch.zeros(32, 256))


def test_the_config_is_one_that_compressed_tensors_reads():
    config = linear_config(4, 128, ["lm_head", r"re:.*\.gate$"])
    parsed = QuantizationConfig.model_validate(config)
    (group,) = parsed.config_groups.values()
    assert parsed.format == "pack-quantized"
    assert parsed.ignore == ["lm_head", r"re:.*\.gate$"]
    assert (group.weights.num_bits, group.weights.group_size, group.weights.symmetric) == (4, 128, True)
    assert linear_bits(config) == 4


@pytest.mark.parametrize(
    ("in_features", "expected"),
    [([4096, 14336], 128), ([576], 64), ([2048, 10944], 64), ([128, 96], 32), ([256, 80], 128)],
    ids=["Mixtral", "SmolLM2", "DeepSeek-V2-Lite", "32", "80 stays in 16 bits"],
)
def test_one_group_size_divides_the_inputs_of_all_linears(in_features, expected):
    assert choose_group_size(in_features) == expected


def test_a_config_that_is_none_is_refused():
    with pytest.raises(FormatError, match="linear is not a compressed-tensors config"):
        linear_bits({"config_groups": {}})


def test_vllm_chooses_its_weight_only_scheme_for_every_fused_linear():
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
        find_matched_target,
        should_ignore_layer,
    )

    config = linear_config(4, 128, ["lm_head", r"re:.*\.block_sparse_moe\.gate$"])
    parsed = CompressedTensorsConfig.from_config(config)
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    class QKVParallelLinear(torch.nn.Module):
        pass

    name = "model.layers.0.self_attn.qkv_proj"
    assert not should_ignore_layer(name, parsed.ignore, fused)
    target = find_matched_target(name, QKVParallelLinear(), parsed.target_scheme_map, fused)
    assert parsed.target_scheme_map[target]["weights"].num_bits == 4
    assert should_ignore_layer("model.layers.0.block_sparse_moe.gate", parsed.ignore, fused)
