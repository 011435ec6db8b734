"""Who serves a 4- or 8-bit linear on a CPU, and what is refused while the model is built."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
from vllm.scalar_type import scalar_types

from tests.kernels.linear_cases import random_inputs, random_linear
from tests.vllm_mcmoe.wna16_operator import provide_where_missing
from vllm_mcmoe.errors import FormatError, UnsupportedModelError
from vllm_mcmoe.graph_cache import add_to_cache_key
from vllm_mcmoe.kernels.cpu import ISA_VARIABLE, PORTABLE
from vllm_mcmoe.kernels.reference.linear import symmetric_linear
from vllm_mcmoe.linear_choice import AUTO, LINEARS_VARIABLE, MCMOE, VLLM, linears_request
from vllm_mcmoe.linear_scheme import CpuWNA16, choose_server, why_not_vllm

NAME = "model.layers.3.self_attn.qkv_proj"


@pytest.fixture
def vllm_config():
    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


def linear_config(
    *,
    bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    inputs: int = 256,
    outputs: int = 96,
    group_size: int = 128,
    ranks: int = 1,
) -> MPLinearLayerConfig:
    """Of a row-parallel linear."""
    return MPLinearLayerConfig(
        full_weight_shape=(inputs, outputs),
        partition_weight_shape=(inputs // ranks, outputs),
        weight_type={4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits],
        act_type=dtype,
        group_size=group_size,
        zero_points=False,
    )


def test_ours_serve_4_bits_in_bfloat16_being_the_faster(vllm_config):
    provide_where_missing()
    assert why_not_vllm(linear_config()) is None
    assert choose_server(NAME, linear_config(), AUTO) == MCMOE


def test_vllm_serves_4_bits_on_cpus_that_ours_were_not_written_for(vllm_config, monkeypatch):
    provide_where_missing()
    monkeypatch.setenv(ISA_VARIABLE, PORTABLE)
    assert choose_server(NAME, linear_config(), AUTO) == VLLM


def test_vllm_serves_4_bits_that_ours_lack(vllm_config):
    provide_where_missing()
    assert choose_server(NAME, linear_config(group_size=256), AUTO) == VLLM


@pytest.mark.parametrize(
    "linear",
    [linear_config(bits=8), linear_config(dtype=torch.float32), linear_config(outputs=80)],
    ids=["8 bits", "float32", "80 outputs"],
)
def test_ours_serve_what_vllm_has_no_kernel_for(vllm_config, linear):
    assert choose_server(NAME, linear, AUTO) == MCMOE


def test_ours_serve_where_they_are_asked_for(vllm_config):
    assert choose_server(NAME, linear_config(), MCMOE) == MCMOE


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (linear_config(bits=8), r"Quant type \(.*uint8b128\) not supported by CPUWNA16"),
        (linear_config(outputs=80), r"Output size \(80\) not supported by CPUWNA16"),
        # on a CPU that has no operator, that reason comes first
        (linear_config(dtype=torch.float32), "computes in 16 bits, this model in torch.float32|lacks the operator"),
    ],
    ids=["8 bits", "80 outputs", "float32"],
)
def test_asking_for_vllm_where_it_cannot_is_refused_by_name(vllm_config, linear, reason):
    with pytest.raises(UnsupportedModelError, match=f"{NAME}: {LINEARS_VARIABLE}=vllm, but vLLM cannot .*({reason})"):
        choose_server(NAME, linear, VLLM)


def test_asking_for_ours_where_they_cannot_is_refused_by_name(vllm_config):
    message = f"{NAME}: {LINEARS_VARIABLE}=mcmoe, but .*: 192 inputs, of 384 on all ranks, are no whole groups of 128"
    with pytest.raises(UnsupportedModelError, match=message):
        choose_server(NAME, linear_config(inputs=384, ranks=2), MCMOE)


def test_a_linear_nobody_can_serve_is_refused_by_name(vllm_config):
    message = f"{NAME}: nobody can serve this linear.*CPUWNA16.*192 inputs, of 384 on all ranks.*--linear-bits 16"
    with pytest.raises(UnsupportedModelError, match=message):
        choose_server(NAME, linear_config(bits=8, inputs=384, ranks=2), AUTO)


def test_an_unknown_request_is_refused(monkeypatch):
    monkeypatch.setenv(LINEARS_VARIABLE, "marlin")
    with pytest.raises(UnsupportedModelError, match="VLLM_MCMOE_LINEARS=marlin: expected one of auto, mcmoe, vllm"):
        linears_request()


def loaded_layer(packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> torch.nn.Module:
    """What vLLM's loader leaves."""
    layer = torch.nn.Module()
    for name, tensor in (("weight_packed", packed), ("weight_scale", scales), ("bias", bias)):
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    layer.register_parameter("weight_shape", torch.nn.Parameter(torch.tensor([72, 256]), requires_grad=False))
    return layer


def scheme(bits: int) -> CpuWNA16:
    return CpuWNA16(CompressedTensorsWNA16("group", bits, group_size=128, layer_name=NAME), MCMOE)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_loaded_layer_computes_and_keeps_one_copy_of_its_weights(bits):
    packed, scales = random_linear(bits, 128, 72, 256)
    bias, x = random_inputs(72, dtype=torch.bfloat16, seed=2), random_inputs(5, 256, dtype=torch.bfloat16)
    layer = loaded_layer(packed, scales.float(), bias)
    for _ in range(2):  # vLLM may call it twice
        scheme(bits).process_weights_after_loading(layer)
    found = scheme(bits).apply_weights(layer, x, layer.bias)
    # two sums that differ in float32's last bits may round to neighbours in bfloat16
    torch.testing.assert_close(found, symmetric_linear(x, packed, scales, bits, bias), rtol=2**-7, atol=1e-3)
    assert {name for name, _ in layer.named_parameters()} == {"weight_packed", "bias"}
    assert layer.weight_packed.data_ptr() == layer.mcmoe_linear.records.data_ptr()


def test_scales_that_were_not_loaded_are_reported_by_name():
    packed, scales = random_linear(4, 128, 72, 256)
    layer = loaded_layer(packed, torch.full(scales.shape, torch.nan), random_inputs(72))
    with pytest.raises(FormatError, match=f"{NAME}: weight_packed and weight_scale are damaged or incomplete: scales"):
        scheme(4).process_weights_after_loading(layer)


def test_compiled_graphs_are_cached_apart_by_what_the_environment_decides(vllm_config):
    hashes = [vllm_config.compute_hash()]
    for value in ("vllm", "mcmoe", "mcmoe"):
        add_to_cache_key("linears", value)
        hashes.append(vllm_config.compute_hash())
    assert len(set(hashes)) == 3 and hashes[2] == hashes[3]
