"""Which models and MoE layers can be quantised and served; others are refused before weights are read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_mcmoe.checkpoint import ExpertBits
from vllm_mcmoe.errors import FormatError, UnsupportedModelError
from vllm_mcmoe.kernels.expert_function import GPT_OSS, ExpertFunction
from vllm_mcmoe.kernels.packing import GROUP_SIZE, group_count

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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


# vLLM's names of what experts compute. A parameter beside a name that has none would change what vLLM computes.
_FUNCTIONS = {
    "silu": ExpertFunction(),
    "gelu": ExpertFunction("gelu"),
    "gelu_tanh": ExpertFunction("gelu_tanh"),
    "swigluoai": GPT_OSS,
    "silu_no_mul": ExpertFunction("silu", gated=False),
    "gelu_no_mul": ExpertFunction("gelu", gated=False),
    "gelu_tanh_no_mul": ExpertFunction("gelu_tanh", gated=False),
    "relu2_no_mul": ExpertFunction("relu2", gated=False),
}
_WITH_LIMIT = "silu"  # vLLM clamps it where there is a limit
_WITH_PARAMETERS = "swigluoai_uninterleave"


def expert_function(
    name: str, activation: str, *, limit: float | None, alpha: float | None, beta: float | None
) -> ExpertFunction:
    """What vLLM has this layer's experts compute between their projections.

    activation           vLLM's name
    limit, alpha, beta   vLLM's swiglu_limit and so on, beside the name; None where not given

    Raises UnsupportedModelError, naming the layer, for what the kernels do not compute.
    """
    if limit is not None and not limit > 0:
        raise UnsupportedModelError(f"{name}: swiglu_limit is {limit}, expected a positive number.")
    if activation == _WITH_PARAMETERS:
        if limit is None:
            raise UnsupportedModelError(f"{name}: activation {activation!r} comes without a swiglu_limit.")
        return ExpertFunction(
            "silu", limit=limit, alpha=1.0 if alpha is None else alpha, beta=0.0 if beta is None else beta
        )
    function = _FUNCTIONS.get(activation)
    if function is None:
        raise UnsupportedModelError(
            f"{name}: activation {activation!r} is not supported; the kernels have "
            f"{', '.join([*_FUNCTIONS, _WITH_PARAMETERS])}. Serve the 16-bit model."
        )
    if activation == _WITH_LIMIT and limit is not None:
        function = ExpertFunction("silu", limit=limit)
    for parameter, value, built_in in (
        ("swiglu_limit", limit, function.limit),
        ("swiglu_alpha", alpha, function.alpha),
        ("swiglu_beta", beta, function.beta),
    ):
        if value not in (None, built_in):
            raise UnsupportedModelError(
                f"{name}: {parameter} is {value}, beside the activation {activation!r}, which the kernels compute "
                f"with {built_in}; the model's answers would be wrong. Serve the 16-bit model."
            )
    return function


def check_layer(
    name: str,
    bits: ExpertBits,
    *,
    num_experts: int,
    intermediate_size: int,
    tp_size: int,
    top_k: int,
    weight_on_input: bool,
    fused_shared_experts: int,
    own_class: str | None,
) -> None:
    """Raises FormatError or UnsupportedModelError naming the layer, what was found and what to do.

    num_experts        of the whole layer, over all ranks
    intermediate_size  of the whole layer, over all ranks
    weight_on_input    the model multiplies the routing weight into the experts' input, not their output
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
    if weight_on_input and top_k != 1:
        raise UnsupportedModelError(
            f"{name}: the model applies routing weights to the input of {top_k} experts a token; the kernels have one "
            "input for all of them. Serve the 16-bit model."
        )
    groups = group_count(intermediate_size)
    if groups < tp_size:
        raise UnsupportedModelError(
            f"{name}: the experts' intermediate size {intermediate_size} has {groups} groups of {GROUP_SIZE}, fewer "
            f"than the {tp_size} tensor parallel ranks that share them. Use a smaller tensor parallel size, or "
            "--enable-expert-parallel, which keeps experts whole."
        )


def check_parallelism(
    name: str, *, gathers_tokens: bool, can_gather: bool, all2all_backend: str, pcp_size: int
) -> None:
    """Raises UnsupportedModelError where ranks with tokens of their own cannot exchange them.

    gathers_tokens    data parallel, or tensor parallel ranks that share out the sequence
    can_gather        the platform's communicator can do so
    all2all_backend   vLLM's, which matters to ranks that gather only
    pcp_size          prefill context parallel ranks
    """
    if pcp_size > 1:
        raise UnsupportedModelError(
            f"{name}: prefill context parallelism is not supported with mcmoe checkpoints. "
            "Drop --prefill-context-parallel-size."
        )
    if gathers_tokens and all2all_backend != "allgather_reducescatter":
        raise UnsupportedModelError(
            f"{name}: --all2all-backend {all2all_backend} sends tokens in a layout that the kernels do not read. "
            "Use --all2all-backend allgather_reducescatter."
        )
    if gathers_tokens and not can_gather:
        raise UnsupportedModelError(
            f"{name}: vLLM cannot gather the tokens of data parallel ranks on this platform, for no mixture of "
            "experts. Start one server per replica, without --data-parallel-size, behind a load balancer."
        )


def check_options(name: str, config: "VllmConfig", backend: str) -> None:
    """Raises UnsupportedModelError for an option of vLLM's that this layer would disregard or break under."""
    from vllm import envs
    from vllm.lora.utils import is_in_target_modules

    lora = config.lora_config
    if lora is not None and is_in_target_modules(name, lora.target_modules):
        raise UnsupportedModelError(
            f"{name}: adapters (--enable-lora) cannot change quantised experts. Name the linears to adapt, for example "
            "--lora-target-modules q_proj k_proj v_proj o_proj, and serve adapters that change nothing else."
        )
    offload = config.offload_config
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        raise UnsupportedModelError(
            f"{name}: experts are repacked into the device's memory and stay there, so --cpu-offload-gb and "
            "--offload-group-size would not save what they promise. Spread the model over more devices "
            "(--tensor-parallel-size, --pipeline-parallel-size), or quantise it to fewer bits."
        )
    if envs.VLLM_BATCH_INVARIANT and backend != "reference":
        raise UnsupportedModelError(
            f"{name}: VLLM_BATCH_INVARIANT is set, but the {backend} kernels add up in an order that depends on the "
            "number of tokens. Unset it, or set VLLM_MCMOE_BACKEND=reference, which is slow."
        )


def check_cpu_routing(name: str, *, scoring: str, has_correction_bias: bool, own_function: bool, grouped: bool) -> None:
    """Raises UnsupportedModelError where vLLM's router for CPUs fails, or chooses other experts than its one for GPUs.

    scoring        of logits: "softmax", "sigmoid", ...
    own_function   the model brings the whole routing; the rest is not used then
    grouped        the router chooses groups of experts first, a code path that has all of it
    """
    if grouped or own_function:
        return
    if scoring == "sigmoid":
        problem = "cannot route by sigmoid without groups of experts"
    elif scoring == "softmax" and has_correction_bias:
        problem = "leaves out the router's correction bias, and would choose other experts"
    else:
        return
    raise UnsupportedModelError(f"{name}: on CPUs vLLM {problem}. Serve this model on a GPU.")
