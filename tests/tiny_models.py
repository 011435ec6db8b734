"""Random models of real transformers classes, small enough to quantise and serve in seconds."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Ernie4_5_MoeConfig,
    Gemma4Config,
    Gemma4TextConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmMoeDsaConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    HunYuanMoEV1Config,
    HYV3Config,
    Kimi_K25Config,
    Lfm2MoeConfig,
    MiMoV2FlashConfig,
    MiniMaxM2Config,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLMoeConfig,
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
    more         keys of the released models' config.json that vLLM reads, and transformers' class does not write
    cpu_refusal  how the plugin refuses to serve it on CPUs, where vLLM cannot: tests/vllm_mcmoe/test_refusals.py
    bfloat16     vLLM on CPUs has it in no other dtype
    around       keys of config.json around the text model's, of a model that takes pictures, too
    renamed      prefix that transformers gives tensors when it saves the model -> that of released files
    not_served   why it is not served in these tests
    stacked      part -> name of the tensor that all experts of a layer are stacked in, where released files have that
    """

    config: type[PretrainedConfig]
    sizes: dict[str, Any]
    moe_layers: tuple[int, ...] = (0, 1)
    architecture: str | None = None
    finish: Callable[[PreTrainedModel], None] = field(default=lambda model: None)
    more: dict[str, Any] = field(default_factory=dict)
    cpu_refusal: str | None = None
    bfloat16: bool = False
    around: dict[str, Any] | None = None
    not_served: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    stacked: dict[str, str] = field(default_factory=dict)


def _spread_correction_bias(model: PreTrainedModel) -> None:
    """Large enough to change which experts are selected."""
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.normal_(std=0.2)


def _spread_expert_scales(model: PreTrainedModel) -> None:
    """Of Gemma's experts and layers, which are 1 in a random model; and the head, to which a wrapper gives its own
    initializer_range."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith((".router.scale", ".per_expert_scale", ".layer_scalar")):
            tensor.data.uniform_(0.5, 1.5)
        elif name == "lm_head.weight":
            tensor.data.normal_(std=0.1)


def _reach_limits(model: PreTrainedModel) -> None:
    """Of gpt-oss's gate and up, which are of size 1 in a random model, at 7; and as much less down."""
    for name, parameter in model.named_parameters():
        if ".experts.gate_up_proj" in name:
            parameter.data.mul_(5)
        elif ".experts.down_proj" in name:
            parameter.data.div_(5)


# Of a gated delta net, as vLLM's kernels for CPUs have it.
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
}


DEEPSEEK_V3 = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 128,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_hidden_layers": 3,
}
DEEPSEEK_V3_MORE = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0}
SPARSE_ATTENTION = {"index_topk": 16, "index_head_dim": 128, "index_n_heads": 2}


QWEN3_5 = DELTA_NET | {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "head_dim": 64,
}


# Heads of another size in layers of full attention, whose values are their keys; logits that reach their limit.
GEMMA4 = {
    "num_experts": 8,
    "top_k_experts": 3,
    "enable_moe_block": True,
    "moe_intermediate_size": 160,
    "intermediate_size": 256,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 4.0,
}


NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 160,
    "moe_shared_expert_intermediate_size": 256,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "head_dim": 64,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
}
NO_GATE = "vLLM has no experts without a gate on CPUs"


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
        MLA_SIZES | DEEPSEEK_V3 | DEEPSEEK_V3_MORE,
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
    ),
    "deepseek-v32": TinyModel(
        DeepseekV32Config,
        MLA_SIZES | DEEPSEEK_V3 | SPARSE_ATTENTION,
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
        more=DEEPSEEK_V3_MORE,
        not_served="sparse attention",
    ),
    "glm-dsa": TinyModel(
        GlmMoeDsaConfig,
        MLA_SIZES | DEEPSEEK_V3 | SPARSE_ATTENTION,
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
        more=DEEPSEEK_V3_MORE,
        not_served="sparse attention",
    ),
    "kimi-k2.5": TinyModel(
        Kimi_K25Config,
        MLA_SIZES | DEEPSEEK_V3 | DEEPSEEK_V3_MORE,
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
        architecture="KimiK25ForConditionalGeneration",
        around={
            "vision_config": {
                "num_hidden_layers": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
            },
            "projection_hidden_size": 64,
            "tie_word_embeddings": False,
        },
        renamed={
            "language_model.model.blocks.": "language_model.model.layers.",
            "model.mm_projector.": "mm_projector.",
        },
        not_served="vLLM wants its preprocessor of pictures, also for text",
    ),
    "qwen3-vl": TinyModel(
        Qwen3VLMoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 192,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
            },
        },
        architecture="Qwen3VLMoeForConditionalGeneration",
        more={"norm_topk_prob": True},
        around={
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 128,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
            "tie_word_embeddings": False,
        },
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
    "granite-shared": TinyModel(
        GraniteMoeSharedConfig, {"num_local_experts": 8, "num_experts_per_tok": 3, "shared_intermediate_size": 256}
    ),
    "granite-hybrid": TinyModel(
        GraniteMoeHybridConfig,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "shared_intermediate_size": 256,
            "layer_types": ["linear_attention", "full_attention"],
            "position_embedding_type": "nope",
            "mamba_n_heads": 4,
            "mamba_d_head": 64,
            "mamba_d_state": 64,
            "attention_multiplier": 0.1,
        },
    ),
    "glm4-lite": TinyModel(
        Glm4MoeLiteConfig,
        MLA_SIZES
        | {
            "n_routed_experts": 8,
            "moe_intermediate_size": 128,
            "intermediate_size": 256,
            "q_lora_rank": 128,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.8,
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
        more={"first_k_dense_replace": 1, "topk_method": "noaux_tc"},
    ),
    "qwen3-next": TinyModel(
        Qwen3NextConfig,
        DELTA_NET
        | {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
            "head_dim": 64,
        },
        bfloat16=True,
    ),
    "qwen3.5": TinyModel(Qwen3_5MoeTextConfig, QWEN3_5, architecture="Qwen3_5MoeForCausalLM", bfloat16=True),
    "qwen3.5-vision": TinyModel(
        Qwen3_5MoeConfig,
        QWEN3_5,
        architecture="Qwen3_5MoeForConditionalGeneration",
        bfloat16=True,
        around={
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 128,
                "num_position_embeddings": 16,
            },
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
        stacked={"gate_up": "gate_up_proj", "down": "down_proj"},
    ),
    "hy3": TinyModel(
        HYV3Config,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 256,
            "intermediate_size": 256,
            "head_dim": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
        more={"first_k_dense_replace": 1, "expert_hidden_dim": 256, "route_norm": True, "qk_norm": True},
    ),
    "ernie": TinyModel(
        Ernie4_5_MoeConfig,
        {
            "moe_num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 128,
            "moe_num_shared_experts": 1,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
        cpu_refusal="leaves out the router's correction bias",
    ),
    "lfm2": TinyModel(
        Lfm2MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 128,
            "intermediate_size": 256,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_hidden_layers": 3,
        },
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
        cpu_refusal="cannot route by sigmoid without groups of experts",
    ),
    "minimax-m2": TinyModel(
        MiniMaxM2Config,
        {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 32},
        finish=_spread_correction_bias,
        more={"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
        cpu_refusal="cannot route by sigmoid without groups of experts",
    ),
    "gpt-oss": TinyModel(
        GptOssConfig,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 160,
            "head_dim": 64,
            "sliding_window": 16,
        },
        finish=_reach_limits,
    ),
    "nemotron-h": TinyModel(
        NemotronHConfig,
        NEMOTRON_H,
        moe_layers=(1, 4),
        finish=_spread_correction_bias,
        not_served=NO_GATE,
    ),
    "nemotron-h-latent": TinyModel(
        NemotronHConfig,
        NEMOTRON_H | {"moe_latent_size": 256},
        moe_layers=(1, 4),
        finish=_spread_correction_bias,
        not_served=NO_GATE,
    ),
    "gemma4": TinyModel(Gemma4TextConfig, GEMMA4, architecture="Gemma4ForCausalLM", finish=_spread_expert_scales),
    "gemma4-vision": TinyModel(
        Gemma4Config,
        GEMMA4,
        architecture="Gemma4ForConditionalGeneration",
        finish=_spread_expert_scales,
        around={
            "vision_config": {
                "num_hidden_layers": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
            },
            "audio_config": None,
            "tie_word_embeddings": False,
        },
    ),
    "mimo-v2": TinyModel(
        MiMoV2FlashConfig,
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "v_head_dim": 64,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_hidden_layers": 3,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
                for kind, theta in (("full_attention", 5e6), ("sliding_attention", 1e4))
            },
        },
        moe_layers=(1, 2),
        finish=_spread_correction_bias,
        more={
            "hybrid_layer_pattern": [0, 1, 0],
            "moe_layer_freq": [0, 1, 1],
            "layernorm_epsilon": 1e-5,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 64,
            "swa_v_head_dim": 64,
            "sliding_window_size": 16,
            "rope_theta": 5e6,
            "swa_rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "add_swa_attention_sink_bias": True,
            "scoring_func": "sigmoid",
        },
    ),
    "hunyuan": TinyModel(HunYuanMoEV1Config, {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": 32}),
}


def make_tiny(kind: str, directory: Path, tokenizer_from: Path, **changes: Any) -> Path:
    """A random model of TINY_MODELS in bfloat16, with a tokenizer; changes: keys of config.json."""
    tiny = TINY_MODELS[kind]
    torch.manual_seed(0)
    sizes = SIZES | tiny.sizes | changes
    if tiny.around is None:
        model = AutoModelForCausalLM.from_config(tiny.config(**sizes))
    else:
        model = AutoModelForImageTextToText.from_config(tiny.config(text_config=sizes, **tiny.around))
    if not model.config.tie_word_embeddings:
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    tiny.finish(model)
    model.bfloat16().save_pretrained(directory)
    if tiny.architecture is not None:
        edit_config(directory, architectures=[tiny.architecture])
    more = tiny.more
    if tiny.around is not None:
        more = {"text_config": json.loads((directory / "config.json").read_text())["text_config"] | tiny.more}
    edit_config(directory, **more)
    if tiny.renamed:
        tensors = load_file(directory / "model.safetensors")
        save_file(
            {rename(name, tiny.renamed): tensor for name, tensor in tensors.items()}, directory / "model.safetensors"
        )
    if tiny.stacked:
        stack_experts(directory / "model.safetensors", tiny.stacked)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(tokenizer_from / name, directory / name)
    return directory


def rename(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def stack_experts(file: Path, names: dict[str, str]) -> None:
    """Merge the experts of a layer, gate rows above up rows, as released files have them."""
    tensors = load_file(file)
    layers = sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name})
    for layer in layers:
        count = sum(name.startswith(f"{layer}.experts.") for name in tensors) // 3
        matrices = {
            projection: [tensors.pop(f"{layer}.experts.{expert}.{projection}.weight") for expert in range(count)]
            for projection in ("gate_proj", "up_proj", "down_proj")
        }
        gate_up = [torch.cat(pair) for pair in zip(matrices["gate_proj"], matrices["up_proj"], strict=True)]
        tensors[f"{layer}.experts.{names['gate_up']}"] = torch.stack(gate_up)
        tensors[f"{layer}.experts.{names['down']}"] = torch.stack(matrices["down_proj"])
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def make_qwen3(directory: Path, tokenizer_from: Path, **changes: Any) -> Path:
    """A random Qwen3-MoE: a dense layer, then two MoE layers of 8 experts, top-3; hidden and intermediate 128."""
    return make_tiny("qwen3", directory, tokenizer_from, **changes)
