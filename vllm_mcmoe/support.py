"""Which MoE layers the plugin serves; everything else is refused while the model is built, before weights are read."""

from vllm_mcmoe.checkpoint import ExpertBits
from vllm_mcmoe.errors import FormatError, UnsupportedModelError
from vllm_mcmoe.kernels import supported_activations
from vllm_mcmoe.kernels.packing import GROUP_SIZE, group_count


def check_layer(
    name: str,
    bits: ExpertBits,
    *,
    num_experts: int,
    intermediate_size: int,
    tp_size: int,
    activation: str,
    backend: str,
    has_bias: bool,
    weight_on_input: bool,
) -> None:
    """Raises FormatError or UnsupportedModelError naming the layer, what was found and what to do.

    num_experts        of the whole layer, over all ranks
    intermediate_size  of the whole layer, over all ranks
    weight_on_input    the model multiplies the routing weight into the experts' input, not their output
    """
    if num_experts != bits.num_experts:
        raise FormatError(
            f"{name}: the model has {num_experts} experts, quantization_config.experts lists {bits.num_experts}."
        )
    groups = group_count(intermediate_size)
    if groups < tp_size:
        raise UnsupportedModelError(
            f"{name}: the experts' intermediate size {intermediate_size} has {groups} groups of {GROUP_SIZE}, fewer "
            f"than the {tp_size} tensor parallel ranks that share them. Use a smaller tensor parallel size, or "
            "--enable-expert-parallel, which keeps experts whole."
        )
    if activation not in supported_activations(backend):
        raise UnsupportedModelError(
            f"{name}: activation {activation!r} is not supported; the {backend} kernels have "
            f"{', '.join(supported_activations(backend))}."
        )
    if weight_on_input:
        raise UnsupportedModelError(f"{name}: models that apply routing weights to the input are not supported.")
    if has_bias:
        raise UnsupportedModelError(f"{name}: experts with biases are not supported.")
