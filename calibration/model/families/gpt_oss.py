"""OpenAI's gpt-oss: biases, clamped activations, attention sinks and sliding windows."""

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.family import ATTENTION, ModelFamily, built_into_vllm
from vllm_mcmoe.kernels.expert_function import ExpertFunction


def _function(config: PretrainedConfig) -> ExpertFunction:
    return ExpertFunction("silu", limit=config.swiglu_limit, alpha=config.swiglu_alpha, beta=1.0)


def _refuse(config: PretrainedConfig) -> str | None:
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(config.num_hidden_layers)]
    if list(config.layer_types) != kinds:
        return "layer_types does not begin with sliding attention and alternate, as vLLM's gpt-oss does"
    return built_into_vllm(
        config,
        "gpt-oss",
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        rms_norm_eps=1e-5,
        attention_bias=True,
        tie_word_embeddings=False,
    )


GPT_OSS = ModelFamily(
    num_experts="num_local_experts",
    intermediate_size="intermediate_size",
    function=_function,
    layer_kinds=("sliding_attention", "full_attention"),
    fused_experts={"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"},
    fused_transposed="always",
    fused_biases={"gate_up": "mlp.experts.gate_up_proj_bias", "down": "mlp.experts.down_proj_bias"},
    experts_transposed=True,
    experts_interleaved=True,
    linears=ATTENTION,
    linear_ignore=("lm_head", r"re:.*\.mlp\.router$"),
    head_packed=False,
    router="router",
    refuse=_refuse,
    notes=("Attention with sinks is calibrated by its definition, which takes memory for all pairs of tokens.",),
)
