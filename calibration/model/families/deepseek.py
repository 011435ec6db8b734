"""DeepSeek-V2, V3 and GLM-4.7-Flash with multi-head latent attention, and GLM-4.5 to 4.7, which route alike."""

from dataclasses import replace

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.family import (
    ATTENTION,
    VISION_NOTE,
    ModelFamily,
    Stages,
    after_dense_layers,
    built_into_vllm,
    dense_mlp,
    differing_dense_layers,
    is_sparse_layer,
)

# Multi-head latent attention. kv_b_proj stays in 16 bits: vLLM multiplies it into the queries and outputs, for which it
# must have the matrix itself, and where it is dequantised depends on the attention backend.
MLA: Stages = (
    ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.o_proj",),
)


MLA_NOTES = (
    "vLLM on CPUs with AMX serves it in float32 with --attention-backend CPU_MLA only.",
    "vLLM 0.32 on CPUs computes a rotation without rope scaling wrongly, in 16 bits, too; the yarn of the released "
    "models is right.",
)


PREDICTION_NOTE = "Layers for multi-token prediction are left out of the checkpoint: no speculative decoding with them."


def _refuse_sparse_step(config: PretrainedConfig) -> str | None:
    step = getattr(config, "moe_layer_freq", 1)
    return None if step == 1 else f"moe_layer_freq is {step}, which transformers ignores and vLLM does not"


def _refuse_deepseek_v2(config: PretrainedConfig) -> str | None:
    if config.norm_topk_prob:
        return "norm_topk_prob is true, which transformers' DeepSeek-V2 ignores and vLLM does not"
    if config.topk_method == "greedy" and (config.n_group or 1) != 1:
        return f"topk_method is greedy with n_group {config.n_group}, which vLLM selects in groups all the same"
    values = {"attention_bias": False, "mlp_bias": False, "scoring_func": "softmax"}
    return built_into_vllm(config, "DeepSeek-V2", **values) or _refuse_sparse_step(config)


def _refuse_deepseek_v3(config: PretrainedConfig) -> str | None:
    for key, expected in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        found = getattr(config, key, None)
        if found != expected:
            return f"{key} is {found!r}; transformers' DeepSeek-V3 is {expected!r}, and vLLM does as config.json says"
    values = {"attention_bias": False, "rope_interleave": True}
    return built_into_vllm(config, "DeepSeek-V3", **values) or _refuse_sparse_step(config)


def _refuse_sparse_attention(config: PretrainedConfig) -> str | None:
    return _refuse_deepseek_v3(config) or differing_dense_layers(config)


def _refuse_glm_dsa(config: PretrainedConfig) -> str | None:
    if "shared" in config.indexer_types:
        return "indexer_types has layers that take over the choice of the one before, and calibration runs them singly"
    return _refuse_sparse_attention(config)


SPARSE_ATTENTION_NOTE = "Texts of calibration are no longer than what sparse attention keeps: its choice is not tried."


def _refuse_glm4_lite(config: PretrainedConfig) -> str | None:
    built_in = built_into_vllm(config, "GLM-4.7-Flash", attention_bias=False, rope_interleave=True)
    return built_in or differing_dense_layers(config) or _refuse_sparse_step(config)


DEEPSEEK = ModelFamily(
    num_experts="n_routed_experts",
    intermediate_size="moe_intermediate_size",
    is_moe_layer=after_dense_layers,
    linears=MLA + dense_mlp("mlp") + dense_mlp("mlp.shared_experts"),
    linear_ignore=("lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.self_attn\.kv_b_proj$"),
)


DEEPSEEK_V2 = replace(DEEPSEEK, refuse=_refuse_deepseek_v2, notes=MLA_NOTES)


DEEPSEEK_V3 = replace(
    DEEPSEEK, router_scores="sigmoid", refuse=_refuse_deepseek_v3, notes=(*MLA_NOTES, PREDICTION_NOTE)
)


GLM4 = ModelFamily(
    num_experts="n_routed_experts",
    intermediate_size="moe_intermediate_size",
    is_moe_layer=after_dense_layers,
    linears=ATTENTION + dense_mlp("mlp") + dense_mlp("mlp.shared_experts"),
    linear_ignore=("lm_head", r"re:.*\.mlp\.gate$"),
    router_scores="sigmoid",
    notes=(PREDICTION_NOTE,),
)


GLM4_LITE = replace(
    DEEPSEEK_V3, is_moe_layer=is_sparse_layer, refuse=_refuse_glm4_lite, notes=(*MLA_NOTES, PREDICTION_NOTE)
)


# Sparse attention: the indexer, which chooses the tokens that are attended to, stays in 16 bits.
DEEPSEEK_V32 = replace(
    DEEPSEEK_V3,
    is_moe_layer=is_sparse_layer,
    layer_kinds=("indexed_attention",),
    linear_ignore=(*DEEPSEEK_V3.linear_ignore, r"re:.*\.self_attn\.indexer\..*"),
    refuse=_refuse_sparse_attention,
    notes=(*DEEPSEEK_V3.notes, SPARSE_ATTENTION_NOTE),
)


GLM_DSA = replace(DEEPSEEK_V32, layer_outputs=2, refuse=_refuse_glm_dsa)


KIMI_K25 = replace(
    DEEPSEEK_V3,
    text_prefix="language_model.model.",
    head="language_model.lm_head",
    passed_through=("vision_tower.", "mm_projector."),
    linear_ignore=(*DEEPSEEK_V3.linear_ignore, r"re:.*(vision_tower|mm_projector)\..*"),
    notes=(*DEEPSEEK_V3.notes, VISION_NOTE),
)
