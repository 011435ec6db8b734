"""Google's Gemma 4 with experts: beside a dense MLP, under a router of their own, in the decoder layer itself."""

from dataclasses import replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from vllm_mcmoe.calibration.model.families.family import (
    ATTENTION,
    VISION_NOTE,
    ModelFamily,
    dense_mlp,
)
from vllm_mcmoe.kernels.expert_function import ExpertFunction


def _function(config: PretrainedConfig) -> ExpertFunction:
    if config.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation is {config.hidden_activation!r}; supported: gelu_pytorch_tanh")
    return ExpertFunction("gelu_tanh")


def _fill_embedding_scale(model: PreTrainedModel) -> None:
    """No longer a buffer: it stays where it is when the embedding goes back to no memory."""
    embedding = model.get_input_embeddings()
    del embedding.embed_scale
    embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)


def _refuse(config: PretrainedConfig) -> str | None:
    if not config.enable_moe_block:
        return "enable_moe_block is not true: vLLM computes experts where there are any, transformers does not"
    if config.num_kv_shared_layers:
        return "num_kv_shared_layers is not 0: layers that attend to other layers' keys cannot be calibrated one by one"
    if config.hidden_size_per_layer_input:
        return "hidden_size_per_layer_input is not 0: layers with embeddings of their own are not calibrated"
    if config.use_bidirectional_attention == "all":
        return "use_bidirectional_attention is 'all', which vLLM's Gemma 4 is not for text"
    return None


GEMMA4 = ModelFamily(
    num_experts="num_experts",
    intermediate_size="moe_intermediate_size",
    top_k="top_k_experts",
    function=_function,
    layer_kinds=("sliding_attention", "full_attention"),
    experts="experts",
    fused_experts={"gate_up": "experts.gate_up_proj", "down": "experts.down_proj"},
    moe_module="",
    router="router",
    router_scores="given",
    logits_softcap="final_logit_softcapping",
    fill_buffers=_fill_embedding_scale,
    filled_arguments=("shared_kv_states",),
    linears=ATTENTION + dense_mlp("mlp"),
    linear_ignore=("lm_head", r"re:.*\.router\.proj$"),
    refuse=_refuse,
)


GEMMA4_WRAPPED = replace(
    GEMMA4,
    text_prefix="model.language_model.",
    passed_through=("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio."),
    linear_ignore=(*GEMMA4.linear_ignore, r"re:.*(vision_tower|embed_vision|audio_tower|embed_audio).*"),
    notes=(VISION_NOTE,),
)
