import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from vllm_mcmoe.calibration.matrix.gptq import HessianFactor
from vllm_mcmoe.calibration.matrix.linears import (
    GROUP_SIZES,
    LinearShape,
    choose_group_size,
    dequantize_linear,
    linear_config,
    linear_widths,
    quantize_linear,
    tensor_parallel_sizes,
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
    assert linear_widths(config)("model.layers.0.self_attn.q_proj") == 4


# attention heads, [out, in] of what compressed-tensors packs, in released models
DOWN, OUTPUT, QUERY, SHARED = "mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj", "mlp.shared_experts.down_proj"
RELEASED = {
    "Mixtral": (32, {QUERY: (4096, 4096), OUTPUT: (4096, 4096)}, 128, []),
    "SmolLM2": (9, {QUERY: (576, 576), OUTPUT: (576, 576)}, 64, []),
    "Qwen1.5-MoE": (16, {OUTPUT: (2048, 2048), "mlp.shared_expert.down_proj": (2048, 5632)}, 64, []),
    "DeepSeek-V2-Lite": (16, {OUTPUT: (2048, 2048), SHARED: (2048, 2816), DOWN: (2048, 10944)}, 32, [DOWN]),
    "GLM-4.5-Air": (96, {OUTPUT: (4096, 12288), SHARED: (4096, 1408), DOWN: (4096, 10944)}, 128, [SHARED, DOWN]),
    "128 and 96 inputs": (2, {QUERY: (256, 128), "mlp.up_proj": (256, 96)}, 32, []),
    "80 inputs": (2, {QUERY: (256, 256), "mlp.up_proj": (256, 80)}, 128, ["mlp.up_proj"]),
    "few of 96": (32, {QUERY: (4096, 4096), "mlp.up_proj": (32, 96)}, 128, ["mlp.up_proj"]),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_group_size_makes_the_fewest_bytes_and_lets_ranks_share(name):
    """What 2, 4 and 8 ranks, as far as heads can be shared among them, could not share stays in 16 bits."""
    heads, shapes, expected, left = RELEASED[name]
    ranks = tensor_parallel_sizes(heads)
    linears = [LinearShape(linear, *shape, ranks) for linear, shape in shapes.items()]
    assert choose_group_size(linears, 4) == expected
    assert [linear.name for linear in linears if not linear.can_be_packed(expected)] == left
    for linear in linears:
        if linear.name.endswith(("o_proj", "down_proj")) and linear.name not in left and linear.in_features > 1024:
            assert all(linear.in_features // among % expected == 0 for among in ranks)


def test_a_config_that_is_none_is_refused():
    with pytest.raises(FormatError, match="linear is not a compressed-tensors config"):
        linear_widths({"config_groups": {}})


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
