"""The config.json of models that people run, written from their published sizes.

Keys that a released file has and transformers' class has the same default for are left to the class.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
}
DEEPSEEK_V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0}
KIMI_K2 = DEEPSEEK_V3 | {
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
}
QWEN3_VL_30B = {
    "vocab_size": 151936,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
QWEN3_30B = {key: value for key, value in QWEN3_VL_30B.items() if key != "rope_parameters"}
QWEN3_235B = QWEN3_30B | {
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
}
GEMMA_4_26B = {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
    "final_logit_softcapping": 30.0,
}
NEMOTRON_3_NANO = {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "layers_block_type": None,
    "hidden_size": 2688,
    "num_key_value_heads": 2,
    "mamba_num_heads": 64,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
}
GRANITE_4_H_SMALL = {
    "vocab_size": 100352,
    "hidden_size": 4096,
    "intermediate_size": 768,
    "shared_intermediate_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "layer_types": ["full_attention" if layer in (5, 15, 25, 35) else "linear_attention" for layer in range(40)],
    "position_embedding_type": "nope",
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Released:
    """A config.json. text: keys of the text model in a wrapper.

    billions   of the text model's weights, as they are published
    shape      experts, experts per token, hidden and intermediate size
    """

    architecture: str
    model_type: str
    billions: float
    shape: tuple[int, int, int, int]
    values: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None
    form: dict[str, Any] | None = None
    source: str = "16 bits"


RELEASED = {
    "Mixtral-8x7B": Released("MixtralForCausalLM", "mixtral", 46.7, (8, 2, 4096, 14336)),
    "Qwen3-30B-A3B": Released("Qwen3MoeForCausalLM", "qwen3_moe", 30.5, (128, 8, 2048, 768), QWEN3_30B),
    "Qwen3-235B-A22B": Released("Qwen3MoeForCausalLM", "qwen3_moe", 235.1, (128, 8, 4096, 1536), QWEN3_235B),
    "GLM-4.5-Air": Released("Glm4MoeForCausalLM", "glm4_moe", 106.9, (128, 8, 4096, 1408), {"head_dim": 128}),
    "Qwen3.6-35B-A3B": Released(
        "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", 34.7, (256, 8, 2048, 512), text={"attn_output_gate": True}
    ),
    "Qwen3.6-35B-A3B-FP8": Released(
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
        34.7,
        (256, 8, 2048, 512),
        text={},
        form=FP8,
        source="FP8 in blocks of 128 x 128",
    ),
    "Qwen3-VL-30B-A3B": Released(
        "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", 30.5, (128, 8, 2048, 768), text=QWEN3_VL_30B
    ),
    "Qwen3-Next-80B-A3B": Released("Qwen3NextForCausalLM", "qwen3_next", 79.7, (512, 10, 2048, 512)),
    "GLM-4.7-Flash": Released(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        29.9,
        (64, 4, 2048, 1536),
        {"first_k_dense_replace": 1, "topk_method": "noaux_tc"},
    ),
    "GLM-5": Released("GlmMoeDsaForCausalLM", "glm_moe_dsa", 743, (256, 8, 6144, 2048), DEEPSEEK_V3),
    "DeepSeek-V3.2": Released(
        "DeepseekV32ForCausalLM",
        "deepseek_v32",
        671.9,
        (256, 8, 7168, 2048),
        DEEPSEEK_V3,
        form=FP8,
        source="FP8 in blocks of 128 x 128",
    ),
    "Kimi-K2": Released(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        1026,
        (384, 8, 7168, 2048),
        KIMI_K2,
        form=FP8,
        source="FP8 in blocks of 128 x 128",
    ),
    "Kimi-K2.5": Released(
        "KimiK25ForConditionalGeneration",
        "kimi_k25",
        1026,
        (384, 8, 7168, 2048),
        {"tie_word_embeddings": False},
        text=KIMI_K2 | {"model_type": "kimi_k2", "tie_word_embeddings": False},
        form=INT4,
        source="INT4 in groups of 32",
    ),
    "MiniMax-M2": Released(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        228.7,
        (256, 8, 3072, 1536),
        {"rotary_dim": 64, "scoring_func": "sigmoid", "use_routing_bias": True},
        form=FP8,
        source="FP8 in blocks of 128 x 128",
    ),
    "gpt-oss-20b": Released(
        "GptOssForCausalLM",
        "gpt_oss",
        20.9,
        (32, 4, 2880, 2880),
        {"num_hidden_layers": 24, "num_local_experts": 32, "layer_types": ["sliding_attention", "full_attention"] * 12},
        form=MXFP4,
        source="MXFP4 in blocks of 32",
    ),
    "gpt-oss-120b": Released(
        "GptOssForCausalLM", "gpt_oss", 116.8, (128, 4, 2880, 2880), form=MXFP4, source="MXFP4 in blocks of 32"
    ),
    "Gemma-4-26B-A4B": Released(
        "Gemma4ForConditionalGeneration", "gemma4", 25.2, (128, 8, 2816, 704), text=GEMMA_4_26B
    ),
    "Nemotron-3-Nano-30B-A3B": Released(
        "NemotronHForCausalLM", "nemotron_h", 31.6, (128, 6, 2688, 1856), NEMOTRON_3_NANO
    ),
    "Granite-4.0-H-Small": Released(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid", 32.2, (72, 10, 4096, 768), GRANITE_4_H_SMALL
    ),
    "Ernie-4.5-21B-A3B": Released("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", 21.8, (64, 6, 2560, 1536)),
    "LFM2-8B-A1B": Released(
        "Lfm2MoeForCausalLM",
        "lfm2_moe",
        8.3,
        (32, 4, 2048, 1792),
        {"num_hidden_layers": 24, "layer_types": (["conv"] * 2 + ["full_attention"] + ["conv"]) * 6},
    ),
    "Hy3": Released(
        "HYV3ForCausalLM",
        "hy_v3",
        295,
        (192, 8, 4096, 1536),
        {"first_k_dense_replace": 1, "expert_hidden_dim": 1536, "route_norm": True, "qk_norm": True},
    ),
}


def write_config(directory: Path, released: Released) -> Path:
    config = AutoConfig.for_model(released.model_type).to_dict() | released.values
    if released.text is not None:
        text = AutoConfig.for_model(released.model_type).get_text_config().to_dict()
        if "num_experts" in released.text:
            text.pop("num_local_experts", None)  # two names of one value
        config["text_config"] = text | released.text
    config |= {"architectures": [released.architecture], "model_type": released.model_type}
    if released.form is not None:
        config["quantization_config"] = released.form
    (directory / "config.json").write_text(json.dumps(config))
    return directory
