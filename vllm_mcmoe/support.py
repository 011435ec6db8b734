"""Which models and MoE layers can be quantised and served; others are refused before weights are read."""

from collections.abc import Mapping
from typing import Any

from vllm_mcmoe.checkpoint import ExpertBits
from vllm_mcmoe.errors import FormatError, UnsupportedModelError
from vllm_mcmoe.kernels import supported_activations
from vllm_mcmoe.kernels.packing import GROUP_SIZE, group_count


def check_model(where: str, config: Any) -> None:
    """Raises UnsupportedModelError for a model that lists experts as replaced by constants (MoNE, arXiv 2507.00390).

    where    how the message begins, the file
    config   transformers' config of the model

    vLLM computes these from 0.33 on, for experts in 16 bits, in a layer that holds the others only.
    """
    for part in (config, config.get_text_config()):
        compression = getattr(part, "compression_config", None)
        transforms = compression.get("transform_config") if isinstance(compression, Mapping) else None
        substitution = transforms.get("expert_substitution") if isinstance(transforms, Mapping) else None
        for key, replaced in (
            ("approximate_experts", getattr(part, "approximate_experts", None)),
            ("compression_config.transform_config.expert_substitution", substitution),
        ):
            if replaced:
                raise UnsupportedModelError(
                    f"{where}: {key} replaces experts by constants (vLLM's expert substitution), which is not "
                    "supported together with quantised experts. Quantise the model it was made from, with all its "
                    "experts, or serve this one in 16 bits."
                )


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
    swiglu_limit: float | None,
    swiglu_alpha: float | None,
    swiglu_beta: float | None,
    fused_shared_experts: int,
    own_class: str | None,
) -> None:
    """Raises FormatError or UnsupportedModelError naming the layer, what was found and what to do.

    num_experts        of the whole layer, over all ranks
    intermediate_size  of the whole layer, over all ranks
    weight_on_input    the model multiplies the routing weight into the experts' input, not their output
    swiglu_*           of clamp(gate) * sigmoid(alpha * clamp(gate)) * (clamp(up) + beta); None where not given. vLLM
                       has them beside the activation's name, which for a clamped model may be plain "silu"
    fused_shared_experts   shared experts that vLLM computes as if the router had chosen them, in the same layer
    own_class          the model's own class of layers or MoE configs, which adds to what experts compute, or None
    """
    if own_class is not None:
        raise UnsupportedModelError(
            f"{name}: vLLM has a class of its own for this layer, {own_class}, which computes more than experts' "
            "weighted sum; the kernels do not. Serve the 16-bit model."
        )
    if fused_shared_experts:
        raise UnsupportedModelError(
            f"{name}: vLLM fuses the model's shared experts into this layer, for which the checkpoint has no widths. "
            "Set VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0, which keeps them as linears."
        )
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
    for parameter, value, neutral in (
        ("swiglu_limit", swiglu_limit, None),
        ("swiglu_alpha", swiglu_alpha, 1.0),
        ("swiglu_beta", swiglu_beta, 0.0),
    ):
        if value not in (None, neutral):
            raise UnsupportedModelError(
                f"{name}: {parameter} is {value}, beside the activation {activation!r}; the kernels have no clamp, "
                "no slope and no offset, so the model's answers would be wrong. Serve the 16-bit model."
            )
    if weight_on_input:
        raise UnsupportedModelError(f"{name}: models that apply routing weights to the input are not supported.")
    if has_bias:
        raise UnsupportedModelError(f"{name}: experts with biases are not supported.")
