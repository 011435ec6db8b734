"""Mixtral and its kin: experts under `block_sparse_moe`."""

from dataclasses import replace

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.family import ATTENTION, ModelFamily, built_into_vllm, common_head_size


def _refuse_phi(config: PretrainedConfig) -> str | None:
    return built_into_vllm(
        config,
        "Phi-3.5-MoE",
        router_jitter_noise=0.01,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
    )


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
