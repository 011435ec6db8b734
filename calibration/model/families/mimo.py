"""Xiaomi's MiMo-V2-Flash: GLM-4.5's routing over sliding windows with attention sinks."""

from dataclasses import replace

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.deepseek import GLM4
from vllm_mcmoe.calibration.model.families.family import is_sparse_layer


def _refuse(config: PretrainedConfig) -> str | None:
    """vLLM goes by other keys than transformers, nearly throughout."""
    full, sliding = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    equivalents = {
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in config.layer_types],
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
        "layernorm_epsilon": config.rms_norm_eps,
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_num_key_value_heads": 2 * config.num_key_value_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "sliding_window_size": config.sliding_window,
        "rope_theta": full["rope_theta"],
        "swa_rope_theta": sliding["rope_theta"],
        "partial_rotary_factor": full["partial_rotary_factor"],
        "add_swa_attention_sink_bias": True,
        "scoring_func": "sigmoid",
    }
    for key, expected in equivalents.items():
        found = getattr(config, key, None)
        if found != expected:
            return f"{key} is {found!r}, which vLLM's MiMo-V2 goes by; transformers' has {expected!r}"
    return None


MIMO_V2 = replace(
    GLM4,
    is_moe_layer=is_sparse_layer,
    layer_kinds=("sliding_attention", "full_attention"),
    module_names={"self_attn.attention_sink_bias": "self_attn.sinks"},
    refuse=_refuse,
    notes=(
        *GLM4.notes,
        "Attention with sinks is calibrated by its definition, which takes memory for all pairs of tokens.",
    ),
)
