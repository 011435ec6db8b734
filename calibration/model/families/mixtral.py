"""Mixtral and its kin, MiniMax-M2 among them: experts under `block_sparse_moe`."""

from dataclasses import replace

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.family import (
    ATTENTION,
    NOT_ROUTED_ON_CPUS,
    ModelFamily,
    built_into_vllm,
    common_head_size,
    ignored_by_transformers,
)


def _refuse_phi(config: PretrainedConfig) -> str | None:
    return built_into_vllm(
        config,
        "Phi-3.5-MoE",
        router_jitter_noise=0.01,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
    )


def _refuse_minimax(config: PretrainedConfig) -> str | None:
    if getattr(config, "scoring_func", None) != "sigmoid":
        return f"scoring_func is {getattr(config, 'scoring_func', None)!r}; transformers' MiniMax-M2 has 'sigmoid'"
    if not getattr(config, "use_routing_bias", False):
        return "use_routing_bias is not true, without which vLLM leaves out the router's correction bias"
    if getattr(config, "rotary_dim", None) is None:
        return "rotary_dim is missing, by which vLLM knows how much of a head is rotated"
    return ignored_by_transformers(config, "MiniMax-M2", attention_bias=False)


def _refuse_granite(config: PretrainedConfig) -> str | None:
    return built_into_vllm(config, "Granite-MoE", attention_bias=False, head_dim=common_head_size(config))


MIXTRAL = ModelFamily(
    num_experts="num_local_experts",
    intermediate_size="intermediate_size",
    experts="block_sparse_moe.experts",
    gate="w1",
    up="w3",
    down="w2",
    linears=ATTENTION,
    linear_ignore=("lm_head", r"re:.*\.block_sparse_moe\.gate$"),
    module_names={"block_sparse_moe.": "mlp."},
)


PHI = replace(
    MIXTRAL,
    module_names={"block_sparse_moe.gate.": "mlp.router.", "block_sparse_moe.": "mlp."},
    head_packed=False,
    router="router",
    refuse=_refuse_phi,
    notes=(
        "vLLM 0.32 and 0.33 leave lm_head.bias out of the logits, in 16 bits, too; evaluation does not.",
        "With longrope, vLLM chooses its factors by --max-model-len, transformers by the length of the text.",
    ),
)


GRANITE = ModelFamily(
    num_experts="num_local_experts",
    intermediate_size="intermediate_size",
    experts="block_sparse_moe.experts",
    fused_experts={
        "gate_up": "block_sparse_moe.input_linear.weight",
        "down": "block_sparse_moe.output_linear.weight",
    },
    linears=ATTENTION,
    linear_ignore=("lm_head", r"re:.*\.block_sparse_moe\.router.*"),
    module_names={"block_sparse_moe.router.layer.": "block_sparse_moe.router."},
    moe_module="block_sparse_moe",
    router="router",
    router_logits=2,
    refuse=_refuse_granite,
    embedding_multiplier="embedding_multiplier",
    logits_divisor="logits_scaling",
)


# Its shared expert keeps gate and up in one tensor, which stays in 16 bits with the router.
GRANITE_SHARED = replace(
    GRANITE, linear_ignore=("lm_head", r"re:.*\.block_sparse_moe\.router.*", r"re:.*\.shared_mlp\..*")
)


MINIMAX_M2 = replace(MIXTRAL, router_scores="sigmoid", refuse=_refuse_minimax, notes=(NOT_ROUTED_ON_CPUS,))


# Granite-4-H. What vLLM calls a layer's mixer, transformers calls mamba.
GRANITE_HYBRID = replace(
    GRANITE_SHARED,
    layer_kinds=("linear_attention", "full_attention"),
    linear_ignore=(*GRANITE_SHARED.linear_ignore, r"re:.*\.(mamba|mixer)\..*"),
    notes=("Mamba layers and shared experts stay in 16 bits.",),
)
