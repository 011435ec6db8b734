"""Baidu's Ernie 4.5."""

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.family import (
    ATTENTION,
    NOT_ROUTED_ON_CPUS,
    ModelFamily,
    built_into_vllm,
    dense_mlp,
)


def _is_moe_layer(config: PretrainedConfig, layer: int) -> bool:
    within = config.moe_layer_start_index <= layer <= config.moe_layer_end_index
    return within and (layer + 1) % config.moe_layer_interval == 0


def _refuse_ernie(config: PretrainedConfig) -> str | None:
    return built_into_vllm(config, "Ernie-4.5", use_bias=False)


ERNIE4_5 = ModelFamily(
    num_experts="moe_num_experts",
    intermediate_size="moe_intermediate_size",
    is_moe_layer=_is_moe_layer,
    linears=ATTENTION + dense_mlp("mlp") + dense_mlp("mlp.shared_experts"),
    linear_ignore=("lm_head", r"re:.*\.mlp\.gate$"),
    module_names={"mlp.moe_statics.": "mlp.gate.moe_statics."},
    refuse=_refuse_ernie,
    notes=(NOT_ROUTED_ON_CPUS,),
)
