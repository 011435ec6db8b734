"""What calibration must know of an architecture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import PretrainedConfig, PreTrainedModel

from vllm_mcmoe.kernels.expert_function import SILU, ExpertFunction

Stages = tuple[tuple[str, ...], ...]


def every_layer(config: PretrainedConfig, layer: int) -> bool:
    return True


def _itself(config: PretrainedConfig) -> PretrainedConfig:
    return config


def _hidden_act(config: PretrainedConfig) -> ExpertFunction:
    """For vLLM's models that compute silu, whatever config.json says."""
    if config.hidden_act != SILU.activation:
        raise ValueError(f"hidden_act is {config.hidden_act!r}; supported: {SILU.activation}")
    return SILU


def always_silu(config: PretrainedConfig) -> ExpertFunction:
    """For architectures whose config.json has no hidden_act."""
    return SILU


def _hidden_size(config: PretrainedConfig) -> int:
    return config.hidden_size


def _nothing_to_fill(model: PreTrainedModel) -> None:
    return None


def _nothing_to_refuse(config: PretrainedConfig) -> None:
    return None


@dataclass(frozen=True)
class ModelFamily:
    """What is particular to one architecture. Names are relative to a decoder layer, `{text_prefix}layers.N.`.

    num_experts, intermediate_size, top_k   keys of config.json
    expert_hidden       hidden size of the experts, which latent ones have of their own
    linears             linear layers that compressed-tensors quantises, where a layer has them, in the order of the
                        forward pass; those of one stage share their input
    linear_ignore       compressed-tensors patterns of linear layers that stay in 16 bits
    text_config         the config of the class that calibration runs, from that of the text model, where transformers
                        has no class for a wrapper's text model alone
    text_prefix         on-disk prefix of what transformers' text model calls "model."; of a wrapper another one
    head                on-disk name of the output head
    head_packed         whether vLLM's model asks the quantization config how its output head is served
    passed_through      on-disk prefixes of what a wrapper has beside its text model, towers for images and sound; they
                        are copied as they are
    embedding, final_norm, rotary   what transformers' text model calls its embedding, its last norm and its rotary
                        embedding; None for a model without positions
    function            what experts compute between their projections. Raises ValueError for a config that says what
                        the kernels do not compute
    layer_outputs       values that transformers' decoder layer returns, of which hidden states are the first
    layer_kinds         values of config.json's layer_types that vLLM's model tells apart; others may not be mixed
    experts             on-disk prefix of the experts
    gate, up, down      on-disk names of an expert's projections; gate is not there where experts have none
    fused_experts       part -> on-disk tensor with that part of all experts, for architectures some of whose files keep
                        experts so; a checkpoint names its experts one by one all the same
    fused_transposed    whether these are [experts, in, out] instead of [experts, out, in]: "maybe" where the files'
                        headers tell
    fused_biases        part -> on-disk tensor with the biases of that part of all experts, of architectures that have
                        them
    experts_transposed  whether transformers' module keeps experts' matrices [in, out]
    experts_interleaved whether gate and up alternate, row by row, in that module and in fused tensors on disk
    is_moe_layer        whether decoder layer N of this config has experts
    module_names        on-disk prefix -> prefix in transformers' module tree, where the two differ; the first that
                        fits counts
    moe_module, router  transformers' module with router and `experts`, "" for the decoder layer itself, and the name of
                        the router in it
    router_logits       position of the logits in what the router returns
    router_scores       what the router makes of its logits before it selects: "softmax" or "sigmoid"; "given" where it
                        returns that
    embedding_multiplier, logits_divisor   keys of config.json, for architectures that scale the two
    logits_softcap      key of config.json with the limit c of c tanh(logits / c)
    fill_buffers        gives a model's modules outside the decoder layers the values that no file holds
    filled_arguments    what transformers hands from layer to layer for each to fill; here it is empty for each
    refuse              why a config of this architecture cannot be served as transformers computes it, or None
    notes               what a user should know before quantising such a model
    """

    num_experts: str
    intermediate_size: str
    linears: Stages
    linear_ignore: tuple[str, ...]
    text_config: Callable[[PretrainedConfig], PretrainedConfig] = _itself
    top_k: str = "num_experts_per_tok"
    expert_hidden: Callable[[PretrainedConfig], int] = _hidden_size
    text_prefix: str = "model."
    head: str = "lm_head"
    head_packed: bool = True
    passed_through: tuple[str, ...] = ()
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    rotary: str | None = "rotary_emb"
    function: Callable[[PretrainedConfig], ExpertFunction] = _hidden_act
    layer_outputs: int = 1
    layer_kinds: tuple[str, ...] = ()
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_experts: Mapping[str, str] = field(default_factory=dict)
    fused_transposed: Literal["never", "maybe", "always"] = "never"
    fused_biases: Mapping[str, str] = field(default_factory=dict)
    experts_transposed: bool = False
    experts_interleaved: bool = False
    is_moe_layer: Callable[[PretrainedConfig, int], bool] = every_layer
    module_names: Mapping[str, str] = field(default_factory=dict)
    moe_module: str = "mlp"
    router: str = "gate"
    router_logits: int = 0
    router_scores: Literal["softmax", "sigmoid", "given"] = "softmax"
    embedding_multiplier: str | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    fill_buffers: Callable[[PreTrainedModel], None] = _nothing_to_fill
    filled_arguments: tuple[str, ...] = ()
    refuse: Callable[[PretrainedConfig], str | None] = _nothing_to_refuse
    notes: tuple[str, ...] = ()


# vLLM's router for CPUs: vllm_mcmoe/support.py, check_cpu_routing
NOT_ROUTED_ON_CPUS = "vLLM 0.32 and 0.33 cannot route it on CPUs, in 16 bits, too; it is served on GPUs."


VISION_NOTE = "Pictures go through the vision tower as it is, in 16 bits; calibration sees text only."


ATTENTION: Stages = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))


def built_into_vllm(config: PretrainedConfig, model: str, **values: object) -> str | None:
    """Why this config is not served as it says: the first key with a value that vLLM's model has not built in."""
    for key, expected in values.items():
        found = getattr(config, key, expected)
        if found is not None and found != expected:  # null leaves it to the model
            return f"{key} is {found!r}; vLLM's {model} has {expected!r}, whatever config.json says"
    return None


def ignored_by_transformers(config: PretrainedConfig, model: str, **values: object) -> str | None:
    """Why this config is not calibrated as vLLM serves it: the first key with a value that transformers' model has not
    built in, and vLLM's follows."""
    for key, expected in values.items():
        found = getattr(config, key, expected)
        if found is not None and found != expected:
            return (
                f"{key} is {found!r}; transformers' {model} has {expected!r}, whatever config.json says, vLLM's has not"
            )
    return None


def differing_dense_layers(config: PretrainedConfig) -> str | None:
    """For models of which transformers reads mlp_layer_types and vLLM first_k_dense_replace."""
    dense = getattr(config, "first_k_dense_replace", None)
    if dense is None:
        return "first_k_dense_replace is missing, by which vLLM knows the layers without experts"
    kinds = ["dense" if layer < dense else "sparse" for layer in range(config.num_hidden_layers)]
    if list(config.mlp_layer_types) != kinds:
        return f"first_k_dense_replace is {dense}, which vLLM goes by, and mlp_layer_types has other dense layers"
    return None


def is_sparse_layer(config: PretrainedConfig, layer: int) -> bool:
    return config.mlp_layer_types[layer] == "sparse"


def common_head_size(config: PretrainedConfig) -> int:
    """What vLLM's models without a head_dim of their own take."""
    return config.hidden_size // config.num_attention_heads


def dense_mlp(prefix: str) -> Stages:
    return (f"{prefix}.gate_proj", f"{prefix}.up_proj"), (f"{prefix}.down_proj",)


def after_dense_layers(config: PretrainedConfig, layer: int) -> bool:
    return layer >= config.first_k_dense_replace
