"""Qwen's mixtures of experts, and OLMoE, which has the same layout."""

from dataclasses import replace

from transformers import PretrainedConfig, Qwen3MoeConfig

from vllm_mcmoe.calibration.model.families.family import (
    ATTENTION,
    VISION_NOTE,
    ModelFamily,
    built_into_vllm,
    common_head_size,
    dense_mlp,
    every_layer,
    ignored_by_transformers,
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


def _refuse_qwen3_next(config: PretrainedConfig) -> str | None:
    own = {"attn_output_gate": True, "qkv_bias": False, "layer_scale": False, "norm_topk_prob": True}
    if config.model_type == "qwen3_next":
        del own["norm_topk_prob"]  # which transformers reads there
    return built_into_vllm(config, "Qwen3-Next", attention_bias=False) or ignored_by_transformers(
        config, "Qwen3-Next", **own, dual_chunk_attention_config=None
    )


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


# Gated delta nets. What the decay and the step size of a head are computed from, in_proj_a and in_proj_b, is small and
# decides how long a state lasts: it stays in 16 bits, as the convolution does.
DELTA_NET_NOTE = "vLLM on CPUs serves its linear attention in bfloat16 only, with heads of 128."


QWEN3_NEXT = replace(
    QWEN2,
    linears=(("linear_attn.in_proj_qkvz",), ("linear_attn.out_proj",), *QWEN2.linears),
    linear_ignore=(*QWEN2.linear_ignore, r"re:.*\.linear_attn\.(conv1d|in_proj_ba)$"),
    head_packed=False,
    layer_kinds=("linear_attention", "full_attention"),
    refuse=_refuse_qwen3_next,
    notes=(DELTA_NET_NOTE,),
)


QWEN3_5 = replace(
    QWEN3_NEXT,
    head_packed=True,
    is_moe_layer=every_layer,
    fused_experts={"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"},
    linears=(("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), ("linear_attn.out_proj",), *QWEN2.linears),
    linear_ignore=(*QWEN2.linear_ignore, r"re:.*\.linear_attn\.(conv1d|in_proj_a|in_proj_b|in_proj_ba)$"),
)


QWEN3_5_WRAPPED = replace(
    QWEN3_5,
    text_prefix="model.language_model.",
    passed_through=("model.visual.",),
    linear_ignore=(*QWEN3_5.linear_ignore, r"re:.*visual\..*"),
    notes=(DELTA_NET_NOTE, VISION_NOTE),
)


# What Qwen3-VL's text model has beside Qwen3-MoE's: positions in three dimensions, which are one for text, and what
# the tower adds to the hidden states of pictures.
_OF_PICTURES = ("mrope_section", "mrope_interleaved")


def _as_qwen3_moe(config: PretrainedConfig) -> Qwen3MoeConfig:
    values = config.to_dict()
    rotation = {key: value for key, value in values.pop("rope_parameters").items() if key not in _OF_PICTURES}
    values.pop("model_type")
    return Qwen3MoeConfig(**values, rope_parameters=rotation)


def _refuse_qwen3_vl(config: PretrainedConfig) -> str | None:
    if not config.norm_topk_prob:
        return "norm_topk_prob is not true, as transformers' Qwen3-VL has it whatever config.json says; vLLM has not"
    return None


QWEN3_VL = replace(
    QWEN3,
    text_config=_as_qwen3_moe,
    refuse=_refuse_qwen3_vl,
    text_prefix="model.language_model.",
    passed_through=("model.visual.",),
    fused_experts={"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"},
    fused_transposed="maybe",
    linear_ignore=(*QWEN3.linear_ignore, r"re:.*visual\..*"),
    notes=(VISION_NOTE,),
)
