"""Tencent's Hunyuan-A13B, which vLLM serves by transformers' own model, and Hy3."""

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.family import (
    ATTENTION,
    ModelFamily,
    built_into_vllm,
    dense_mlp,
    differing_dense_layers,
    is_sparse_layer,
)


def _refuse_hy3(config: PretrainedConfig) -> str | None:
    expert_size = getattr(config, "expert_hidden_dim", None)
    if expert_size != config.moe_intermediate_size:
        return f"expert_hidden_dim is {expert_size}, which vLLM goes by; moe_intermediate_size is not the same"
    for key in ("route_norm", "qk_norm"):
        found = getattr(config, key, None)
        if found is not True:
            return f"{key} is {found!r}; transformers' Hy3 has True, and vLLM does as config.json says"
    values = {"attention_bias": False, "mlp_bias": False}
    return differing_dense_layers(config) or built_into_vllm(config, "Hy3", **values)


HY3 = ModelFamily(
    num_experts="num_experts",
    intermediate_size="moe_intermediate_size",
    is_moe_layer=is_sparse_layer,
    linears=ATTENTION + dense_mlp("mlp") + dense_mlp("mlp.shared_mlp"),
    linear_ignore=("lm_head", r"re:.*\.mlp\.(router\.)?gate$"),
    module_names={
        "mlp.router.gate.": "mlp.gate.",
        "mlp.expert_bias": "mlp.e_score_correction_bias",
        "mlp.shared_mlp.": "mlp.shared_experts.",
    },
    router_scores="sigmoid",
    refuse=_refuse_hy3,
)


def _refuse_a13b(config: PretrainedConfig) -> str | None:
    if not isinstance(config.moe_topk, int):
        return f"moe_topk is {config.moe_topk!r}; layers with different numbers are not calibrated"
    return None


HUNYUAN_A13B = ModelFamily(
    num_experts="num_experts",
    intermediate_size="intermediate_size",
    top_k="moe_topk",
    linears=ATTENTION + dense_mlp("mlp.shared_mlp"),
    linear_ignore=("lm_head", r"re:.*\.mlp\.gate\.wg$"),
    head_packed=False,
    refuse=_refuse_a13b,
)
