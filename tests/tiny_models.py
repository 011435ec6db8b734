"""Random models of real transformers classes, small enough to quantise and serve in seconds."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # the default 0.02 gives such a small model nearly uniform predictions
    "tie_word_embeddings": False,  # a tied head would give logits of hundreds
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# vLLM's reference attention for multi-head latent attention on CPUs is compiled for the sizes of the released models.
MLA_SIZES = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    # As the released models have it; vLLM computes the default rotation by other code, see docs/architectures.md.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}


@dataclass(frozen=True)
class TinyModel:
    """How to make a model: its config class, sizes besides SIZES, and the name on the hub if transformers' differs.

    moe_layers   decoder layers that have experts
    """

    config: type[PretrainedConfig]
    sizes: dict[str, Any]
    moe_layers: tuple[int, ...] = (0, 1)
    architecture: str | None = None
    finish: Callable[[PreTrainedModel], None] = field(default=lambda model: None)


def _spread_correction_bias(model: PreTrainedModel) -> None:
    """Large enough to change which experts are selected."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)


TINY_MODELS: dict[str, TinyModel] = {
    "mixtral": TinyModel(MixtralConfig, {"num_local_experts": 4}),
    "qwen2": TinyModel(
        Qwen2MoeConfig,
        {
            "num_experts": 8,
            "moe_intermediate_size": 128,
            "intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
    ),
    "qwen3": TinyModel(
        Qwen3MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 128,
            "intermediate_size": 256,
            "head_dim": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
    ),
    "olmoe": TinyModel(OlmoeConfig, {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4}),
    "glm4": TinyModel(
        Glm4MoeConfig,
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 128,
            "intermediate_size": 256,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "head_dim": 64,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
    ),
    "deepseek-v2": TinyModel(
        DeepseekV2Config,
        MLA_SIZES
        | {
            "n_routed_experts": 8,
            "moe_intermediate_size": 128,
            "intermediate_size": 256,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "scoring_func": "softmax",
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 3.0,
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
    ),
    "deepseek-v3": TinyModel(
        DeepseekV3Config,
        MLA_SIZES
        | {
            "n_routed_experts": 8,
            "moe_intermediate_size": 128,
            "intermediate_size": 256,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "q_lora_rank": 128,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 0,
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
    ),
    "phi": TinyModel(
        PhimoeConfig,
        {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01},
        architecture="PhiMoEForCausalLM",
    ),
    "granite": TinyModel(
        GraniteMoeConfig,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
}


def make_tiny(kind: str, directory: Path, tokenizer_from: Path, **changes: Any) -> Path:
    """A random model of TINY_MODELS in bfloat16, with a tokenizer; changes: keys of config.json."""
    tiny = TINY_MODELS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.config(**(SIZES | tiny.sizes | changes)))
    if not model.config.tie_word_embeddings:
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    tiny.finish(model)
    model.bfloat16().save_pretrained(directory)
    if tiny.architecture is not None:
        edit_config(directory, architectures=[tiny.architecture])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(tokenizer_from / name, directory / name)
    return directory


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def make_qwen3(directory: Path, tokenizer_from: Path, **changes: Any) -> Path:
    """A random Qwen3-MoE: a dense layer, then two MoE layers of 8 experts, top-3; hidden and intermediate 128."""
    return make_tiny("qwen3", directory, tokenizer_from, **changes)
