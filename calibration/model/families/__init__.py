"""The architectures that can be quantised: config.json's name -> what calibration must know of it.

To add one: an entry here, its `ModelFamily` in a module of its kin, and a tiny random model in tests/tiny_models.py.
Read family.py first.
"""

from vllm_mcmoe.calibration.model.families import (
    deepseek,
    ernie,
    gemma,
    gpt_oss,
    hunyuan,
    lfm,
    mimo,
    mixtral,
    nemotron,
    qwen,
)
from vllm_mcmoe.calibration.model.families.family import ModelFamily

FAMILIES: dict[str, ModelFamily] = {
    "MixtralForCausalLM": mixtral.MIXTRAL,
    "Qwen2MoeForCausalLM": qwen.QWEN2,
    "Qwen3MoeForCausalLM": qwen.QWEN3,
    "OlmoeForCausalLM": qwen.OLMOE,
    "Glm4MoeForCausalLM": deepseek.GLM4,
    "DeepseekV2ForCausalLM": deepseek.DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": deepseek.DEEPSEEK_V3,
    "PhiMoEForCausalLM": mixtral.PHI,
    "GraniteMoeForCausalLM": mixtral.GRANITE,
    "GraniteMoeSharedForCausalLM": mixtral.GRANITE_SHARED,
    "GraniteMoeHybridForCausalLM": mixtral.GRANITE_HYBRID,
    "Glm4MoeLiteForCausalLM": deepseek.GLM4_LITE,
    "Qwen3NextForCausalLM": qwen.QWEN3_NEXT,
    "Qwen3_5MoeForCausalLM": qwen.QWEN3_5,
    "Qwen3_5MoeForConditionalGeneration": qwen.QWEN3_5_WRAPPED,
    "Qwen3VLMoeForConditionalGeneration": qwen.QWEN3_VL,
    "DeepseekV32ForCausalLM": deepseek.DEEPSEEK_V32,
    "GlmMoeDsaForCausalLM": deepseek.GLM_DSA,
    "KimiK25ForConditionalGeneration": deepseek.KIMI_K25,
    "Lfm2MoeForCausalLM": lfm.LFM2,
    "HYV3ForCausalLM": hunyuan.HY3,
    "Ernie4_5_MoeForCausalLM": ernie.ERNIE4_5,
    "MiniMaxM2ForCausalLM": mixtral.MINIMAX_M2,
    "GptOssForCausalLM": gpt_oss.GPT_OSS,
    "NemotronHForCausalLM": nemotron.NEMOTRON_H,
    "MiMoV2FlashForCausalLM": mimo.MIMO_V2,
    "HunYuanMoEV1ForCausalLM": hunyuan.HUNYUAN_A13B,
    "Gemma4ForCausalLM": gemma.GEMMA4,
    "Gemma4ForConditionalGeneration": gemma.GEMMA4_WRAPPED,
}

# Architectures that were looked at and are not supported yet, and why.
_LLAMA4 = (
    "its experts are called with inputs that are weighted and repeated already, which calibration does not take apart"
)
REFUSED: dict[str, str] = {
    "DeepseekV4ForCausalLM": (
        "its first layers choose experts by token id and its hidden states are several streams, which calibration does "
        "not run layer by layer"
    ),
    "Llama4ForConditionalGeneration": _LLAMA4,
    "Llama4ForCausalLM": _LLAMA4,
}
