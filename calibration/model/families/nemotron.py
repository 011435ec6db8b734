"""NVIDIA's Nemotron-H from Nemotron 3 on: a layer is one of Mamba, attention, an MLP or experts without a gate."""

from transformers import PretrainedConfig

from vllm_mcmoe.calibration.model.families.family import ModelFamily, built_into_vllm, ignored_by_transformers
from vllm_mcmoe.kernels.expert_function import ExpertFunction


def _is_moe_layer(config: PretrainedConfig, layer: int) -> bool:
    return config.layers_block_type[layer] == "moe"


def _function(config: PretrainedConfig) -> ExpertFunction:
    if config.mlp_hidden_act != "relu2":
        raise ValueError(f"mlp_hidden_act is {config.mlp_hidden_act!r}; supported: relu2")
    return ExpertFunction("relu2", gated=False)


def _expert_hidden(config: PretrainedConfig) -> int:
    return config.moe_latent_size or config.hidden_size


def _refuse(config: PretrainedConfig) -> str | None:
    if list(config.time_step_limit) != [0.0, float("inf")]:
        return f"time_step_limit is {config.time_step_limit}; vLLM's Nemotron-H has no limits"
    return built_into_vllm(
        config, "Nemotron-H", mlp_bias=False, n_shared_experts=1, tie_word_embeddings=False
    ) or ignored_by_transformers(config, "Nemotron-H", attention_bias=False)


NEMOTRON_H = ModelFamily(
    num_experts="n_routed_experts",
    intermediate_size="moe_intermediate_size",
    expert_hidden=_expert_hidden,
    function=_function,
    is_moe_layer=_is_moe_layer,
    text_prefix="backbone.",
    embedding="embeddings",
    final_norm="norm_f",
    rotary=None,
    layer_kinds=("linear_attention", "full_attention", "moe", "mlp"),
    experts="mixer.experts",
    moe_module="mixer",
    router_scores="sigmoid",
    linears=(
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        ("mixer.o_proj",),
        ("mixer.up_proj",),
        ("mixer.down_proj",),
        ("mixer.shared_experts.up_proj",),
        ("mixer.shared_experts.down_proj",),
    ),
    linear_ignore=("lm_head", r"re:.*\.mixer\.(gate|in_proj|out_proj|conv1d|fc1_latent_proj|fc2_latent_proj)$"),
    refuse=_refuse,
    notes=(
        "Mamba layers and projections to and from latent experts stay in 16 bits.",
        "vLLM 0.32 and 0.33 have no experts without a gate on CPUs, in 16 bits, too; it is served on GPUs.",
    ),
)
