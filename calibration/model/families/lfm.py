"""Liquid's LFM2, most of whose layers are short convolutions."""

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.family import (
    NOT_ROUTED_ON_CPUS,
    ModelFamily,
    always_silu,
    built_into_vllm,
)


def _is_moe_layer(config: PretrainedConfig, layer: int) -> bool:
    return layer >= config.num_dense_layers


def _refuse_lfm2(config: PretrainedConfig) -> str | None:
    return built_into_vllm(config, "LFM2", conv_bias=False)


LFM2 = ModelFamily(
    num_experts="num_experts",
    intermediate_size="moe_intermediate_size",
    is_moe_layer=_is_moe_layer,
    layer_kinds=("conv", "full_attention"),
    experts="feed_forward.experts",
    gate="w1",
    up="w3",
    down="w2",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("feed_forward.w1", "feed_forward.w3"),
        ("feed_forward.w2",),
    ),
    linear_ignore=("lm_head", r"re:.*\.feed_forward\.gate$", r"re:.*\.(short_)?conv\..*"),
    moe_module="feed_forward",
    router_scores="sigmoid",
    final_norm="embedding_norm",
    rotary="pos_emb",
    function=always_silu,
    refuse=_refuse_lfm2,
    notes=(NOT_ROUTED_ON_CPUS,),
)
