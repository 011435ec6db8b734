"""4- and 8-bit linears on CPUs: by our kernels, or by vLLM's own operator where ours lack the layer or the CPU.

Where both can serve a linear of 4 bits, ours are faster: with AMX, and by more with AVX-512 alone (make bench-linear).
vLLM picks a kernel by type and shape alone. Its operator for 4-bit linears is missing from the build for CPUs without
AVX-512, computes in 16 bits only, and none of its builds has 8 bits, which a user would learn from the first request.
So the plugin asks before it delegates, layer by layer, while the model is built.
"""

import torch
from vllm import envs
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsWNA16,
)
from vllm.model_executor.parameter import BasevLLMParameter, GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import CpuArchEnum, current_platform

from vllm_mcmoe.errors import FormatError, UnsupportedModelError
from vllm_mcmoe.graph_cache import add_to_cache_key
from vllm_mcmoe.kernels.cpu import PORTABLE, CpuLinear, select_isa
from vllm_mcmoe.kernels.cpu.linear import check_linear
from vllm_mcmoe.linear_choice import AUTO, LINEARS_VARIABLE, MCMOE, VLLM
from vllm_mcmoe.memory import release_freed_memory


def why_not_vllm(config: MPLinearLayerConfig) -> str | None:
    """What keeps vLLM from computing such a linear on this CPU, or None."""
    try:
        kernel = choose_mp_linear_kernel(config)
    except ValueError as error:
        return " ".join(str(error).split())
    if kernel is not CPUWNA16LinearKernel:  # the others ask for their operators themselves
        return None
    amx_or_riscv = (
        torch.cpu._is_amx_tile_supported() or current_platform.get_cpu_architecture() == CpuArchEnum.RISCV
    )  # as CPUWNA16LinearKernel decides
    int8_activations = envs.VLLM_CPU_INT4_W4A8 and config.act_type == torch.bfloat16 and amx_or_riscv
    operator = "int4_scaled_mm_cpu" if int8_activations else "cpu_gemm_wna16"
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, operator):
        return f"its build for this CPU lacks the operator {operator}"
    if config.act_type not in (torch.bfloat16, torch.float16):
        return f"its operator {operator} computes in 16 bits, this model in {config.act_type}"
    return None


def why_not_mcmoe(config: MPLinearLayerConfig) -> str | None:
    """What keeps our kernels from computing such a linear, or None."""
    inputs, _ = config.partition_weight_shape
    if config.zero_points:
        return "its weights are not symmetric"
    try:
        check_linear(config.weight_type.size_bits, config.group_size)
    except ValueError as error:
        return str(error)
    if inputs % config.group_size:
        all_inputs = config.full_weight_shape[0]
        return f"{inputs} inputs, of {all_inputs} on all ranks, are no whole groups of {config.group_size}"
    return None


def choose_server(name: str, config: MPLinearLayerConfig, request: str) -> str:
    """VLLM or MCMOE, for the linear of this name; request: one of them, or AUTO.

    Raises UnsupportedModelError, naming the layer, where nobody can serve it or who is asked for cannot.
    """
    vllm, mcmoe = why_not_vllm(config), why_not_mcmoe(config)
    if request == VLLM and vllm is not None:
        raise UnsupportedModelError(
            f"{name}: {LINEARS_VARIABLE}={VLLM}, but vLLM cannot serve this linear: {vllm}. Unset the variable to "
            "let vllm-mcmoe's own kernels serve it."
        )
    if request == MCMOE and mcmoe is not None:
        raise UnsupportedModelError(
            f"{name}: {LINEARS_VARIABLE}={MCMOE}, but vllm-mcmoe's kernels cannot serve this linear: {mcmoe}."
        )
    if request != AUTO:
        return request
    # The portable kernels are for CPUs that were not measured: what vLLM has for one was written for it.
    if mcmoe is None and (vllm is not None or select_isa() != PORTABLE):
        return MCMOE
    if vllm is None:
        return VLLM
    raise UnsupportedModelError(
        f"{name}: nobody can serve this linear on this CPU. vLLM: {vllm}. vllm-mcmoe: {mcmoe}. Use a smaller tensor "
        "parallel size if its inputs are shared out, or quantise with --linear-bits 16."
    )


class CpuWNA16(CompressedTensorsScheme):
    """Weights of 4 or 8 bits, activations int8 per token and group of the weight, or by vLLM's operator."""

    def __init__(self, vllms: CompressedTensorsWNA16, request: str):
        """request: AUTO, or who must serve the layer."""
        self.vllms = vllms
        self.name = vllms.layer_name
        self.request = request

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    def create_weights(
        self,
        layer: torch.nn.Module,
        *,
        output_size: int,
        input_size: int,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader,
    ) -> None:
        """Settles who serves the layer and registers its parameters.

        Raises UnsupportedModelError as choose_server does.
        """
        outputs = sum(output_partition_sizes)
        config = MPLinearLayerConfig(
            full_weight_shape=(input_size, output_size),
            partition_weight_shape=(input_size_per_partition, outputs),
            weight_type=self.vllms.quant_type,
            act_type=params_dtype,
            group_size=self.vllms.group_size,
            zero_points=not self.vllms.symmetric,
        )
        server = choose_server(self.name, config, self.request)
        add_to_cache_key("linears", server)
        if server == VLLM:
            layer.scheme = self.vllms
            self.vllms.create_weights(
                layer,
                output_size=output_size,
                input_size=input_size,
                output_partition_sizes=output_partition_sizes,
                input_size_per_partition=input_size_per_partition,
                params_dtype=params_dtype,
                weight_loader=weight_loader,
            )
            return
        add_to_cache_key("cpu_isa", select_isa())
        packed_inputs = input_size_per_partition * self.vllms.num_bits // 32
        layer.register_parameter(
            "weight_packed",
            PackedvLLMParameter(
                input_dim=1,
                output_dim=0,
                weight_loader=weight_loader,
                packed_factor=self.vllms.pack_factor,
                packed_dim=1,
                data=torch.zeros(outputs, packed_inputs, dtype=torch.int32),
            ),
        )
        # float32 holds what any checkpoint has, whatever dtype the model is served in; NaN shows what was not loaded.
        groups = input_size_per_partition // self.vllms.group_size
        scales = torch.full((outputs, groups), torch.nan, dtype=torch.float32)
        layer.register_parameter(
            "weight_scale",
            GroupQuantScaleParameter(output_dim=0, input_dim=1, weight_loader=weight_loader, data=scales),
        )
        layer.register_parameter(
            "weight_shape",
            BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), weight_loader=weight_loader),
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Repacks into the kernels' layout and drops the checkpoint's form."""
        if hasattr(layer, "mcmoe_linear"):
            return  # vLLM may call this twice; the first call has done it
        try:
            linear = CpuLinear.prepare(layer.weight_packed.data, layer.weight_scale.data, bits=self.vllms.num_bits)
        except ValueError as error:
            raise FormatError(
                f"{self.name}: weight_packed and weight_scale are damaged or incomplete: {error}. Download or quantise "
                "the checkpoint again."
            ) from error
        layer.mcmoe_linear = linear
        # Where vLLM looks for a quantised layer's device, and for what it dequantises by multiplying a unit matrix.
        layer.weight_packed = torch.nn.Parameter(linear.records, requires_grad=False)
        del layer.weight_scale, layer.weight_shape
        if getattr(layer, "bias", None) is not None and not getattr(layer, "skip_bias_add", False):
            layer.bias.data = layer.bias.data.float()  # as the kernels add it, and vLLM's own W4A8 kernel
        release_freed_memory()

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] -> [..., out] in x.dtype."""
        return layer.mcmoe_linear(x, bias)
