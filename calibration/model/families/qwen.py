"""Qwen's mixtures of experts, and OLMoE, which has the same layout."""

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.family import (
    ATTENTION,
    ModelFamily,
    built_into_vllm,
    common_head_size,
    dense_mlp,
)


def _qwen_is_moe_layer(config: PretrainedConfig, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def _refuse_olmoe(config: PretrainedConfig) -> str | None:
    if config.norm_topk_prob:
        return "norm_topk_prob is true, which vLLM's OLMoE ignores"
    if config.clip_qkv is not None:
        return f"clip_qkv is {config.clip_qkv}, which vLLM's OLMoE ignores"
    head_size = common_head_size(config)
    return built_into_vllm(config, "OLMoE", attention_bias=False, rms_norm_eps=1e-5, head_dim=head_size)


def _refuse_qwen2(config: PretrainedConfig) -> str | None:
    return built_into_vllm(config, "Qwen2-MoE", qkv_bias=True, head_dim=common_head_size(config))


QWEN2 = ModelFamily(
    num_experts="num_experts",
    intermediate_size="moe_intermediate_size",
    is_moe_layer=_qwen_is_moe_layer,
    linears=ATTENTION + dense_mlp("mlp") + dense_mlp("mlp.shared_expert"),
    linear_ignore=("lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.mlp\.shared_expert_gate$"),
    refuse=_refuse_qwen2,
)


QWEN3 = ModelFamily(
    num_experts="num_experts",
    intermediate_size="moe_intermediate_size",
    is_moe_layer=_qwen_is_moe_layer,
    linears=ATTENTION + dense_mlp("mlp"),
    linear_ignore=("lm_head", r"re:.*\.mlp\.gate$"),
)


OLMOE = ModelFamily(
    num_experts="num_experts",
    intermediate_size="intermediate_size",
    linears=ATTENTION,
    linear_ignore=("lm_head", r"re:.*\.mlp\.gate$"),
    refuse=_refuse_olmoe,
)
