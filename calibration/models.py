"""What calibration must know of an architecture: one small `ModelFamily` per entry of FAMILIES.

A model directory is described from its config.json alone (`describe_model`), then its safetensors headers are checked
against that description (`check_tensors`), both before any long work. To add an architecture, add an entry and a tiny
random model of it to tests/calibration.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

from vllm_mcmoe.calibration.tensors import TensorInfo
from vllm_mcmoe.checkpoint import QUANT_METHOD
from vllm_mcmoe.errors import UnsupportedModelError
from vllm_mcmoe.support import check_model

LAYER_PREFIX = "model.layers."


Stages = tuple[tuple[str, ...], ...]


def _every_layer(config: PretrainedConfig, layer: int) -> bool:
    return True


def _nothing_to_refuse(config: PretrainedConfig) -> None:
    return None


@dataclass(frozen=True)
class ModelFamily:
    """What is particular to one architecture. Names are relative to a decoder layer `model.layers.N.`.

    num_experts, intermediate_size   keys of config.json
    linears             linear layers that compressed-tensors quantises, where a layer has them, in the order of the
                        forward pass; those of one stage share their input
    linear_ignore       compressed-tensors patterns of linear layers that stay in 16 bits
    experts             on-disk prefix of the experts
    gate, up, down      on-disk names of an expert's projections
    fused_experts       part -> on-disk tensor with that part of all experts, [experts, out, in], for architectures
                        whose 16-bit files keep experts so; a checkpoint names its experts one by one all the same
    is_moe_layer        whether decoder layer N of this config has experts
    module_names        on-disk prefix -> prefix in transformers' module tree, where the two differ; the first that
                        fits counts
    moe_module, router  transformers' module with router and `experts`, and the name of the router in it
    router_logits       position of the logits in what the router returns
    router_scores       what the router makes of its logits before it selects: "softmax" or "sigmoid"
    embedding_multiplier, logits_divisor   keys of config.json, for architectures that scale the two
    refuse              why a config of this architecture cannot be served as transformers computes it, or None
    notes               what a user should know before quantising such a model
    """

    num_experts: str
    intermediate_size: str
    linears: Stages
    linear_ignore: tuple[str, ...]
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_experts: Mapping[str, str] = field(default_factory=dict)
    is_moe_layer: Callable[[PretrainedConfig, int], bool] = _every_layer
    module_names: Mapping[str, str] = field(default_factory=dict)
    moe_module: str = "mlp"
    router: str = "gate"
    router_logits: int = 0
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    embedding_multiplier: str | None = None
    logits_divisor: str | None = None
    refuse: Callable[[PretrainedConfig], str | None] = _nothing_to_refuse
    notes: tuple[str, ...] = ()


ATTENTION: Stages = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
# Multi-head latent attention. kv_b_proj stays in 16 bits: vLLM multiplies it into the queries and outputs, for which it
# must have the matrix itself, and where it is dequantised depends on the attention backend.
MLA: Stages = (
    ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.o_proj",),
)

MLA_NOTES = (
    "vLLM on CPUs with AMX serves it in float32 with --attention-backend CPU_MLA only.",
    "vLLM 0.32 on CPUs computes a rotation without rope scaling wrongly, in 16 bits, too; the yarn of the released "
    "models is right.",
)
PREDICTION_NOTE = "Layers for multi-token prediction are left out of the checkpoint: no speculative decoding with them."


def _mlp(prefix: str) -> Stages:
    return (f"{prefix}.gate_proj", f"{prefix}.up_proj"), (f"{prefix}.down_proj",)


def _qwen_is_moe_layer(config: PretrainedConfig, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def _after_dense_layers(config: PretrainedConfig, layer: int) -> bool:
    return layer >= config.first_k_dense_replace


def _refuse_olmoe(config: PretrainedConfig) -> str | None:
    if config.norm_topk_prob:
        return "norm_topk_prob is true, which vLLM's OLMoE ignores"
    if config.clip_qkv is not None:
        return f"clip_qkv is {config.clip_qkv}, which vLLM's OLMoE ignores"
    return None


def _refuse_sparse_step(config: PretrainedConfig) -> str | None:
    step = getattr(config, "moe_layer_freq", 1)
    return None if step == 1 else f"moe_layer_freq is {step}, which transformers ignores and vLLM does not"


def _refuse_deepseek_v2(config: PretrainedConfig) -> str | None:
    if config.norm_topk_prob:
        return "norm_topk_prob is true, which transformers' DeepSeek-V2 ignores and vLLM does not"
    if config.topk_method == "greedy" and (config.n_group or 1) != 1:
        return f"topk_method is greedy with n_group {config.n_group}, which vLLM selects in groups all the same"
    return _refuse_sparse_step(config)


def _refuse_deepseek_v3(config: PretrainedConfig) -> str | None:
    for key, expected in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        found = getattr(config, key, None)
        if found != expected:
            return f"{key} is {found!r}; transformers' DeepSeek-V3 is {expected!r}, and vLLM does as config.json says"
    return _refuse_sparse_step(config)


def _refuse_phi(config: PretrainedConfig) -> str | None:
    # What vLLM's model has built in.
    for key, expected in (
        ("router_jitter_noise", 0.01),
        ("num_experts_per_tok", 2),
        ("attention_bias", True),
        ("lm_head_bias", True),
    ):
        found = getattr(config, key)
        if found != expected:
            return f"{key} is {found!r}; vLLM's Phi-3.5-MoE has {expected!r}, whatever config.json says"
    return None


MIXTRAL = ModelFamily(
    num_experts="num_local_experts",
    intermediate_size="intermediate_size",
    experts="block_sparse_moe.experts",
    gate="w1",
    up="w3",
    down="w2",
    linears=ATTENTION,
    linear_ignore=("lm_head", r"re:.*\.block_sparse_moe\.gate$"),
    module_names={"block_sparse_moe.": "mlp."},
)

DEEPSEEK = ModelFamily(
    num_experts="n_routed_experts",
    intermediate_size="moe_intermediate_size",
    is_moe_layer=_after_dense_layers,
    linears=MLA + _mlp("mlp") + _mlp("mlp.shared_experts"),
    linear_ignore=("lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.self_attn\.kv_b_proj$"),
)

FAMILIES: dict[str, ModelFamily] = {
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2MoeForCausalLM": ModelFamily(
        num_experts="num_experts",
        intermediate_size="moe_intermediate_size",
        is_moe_layer=_qwen_is_moe_layer,
        linears=ATTENTION + _mlp("mlp") + _mlp("mlp.shared_expert"),
        linear_ignore=("lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.mlp\.shared_expert_gate$"),
    ),
    "Qwen3MoeForCausalLM": ModelFamily(
        num_experts="num_experts",
        intermediate_size="moe_intermediate_size",
        is_moe_layer=_qwen_is_moe_layer,
        linears=ATTENTION + _mlp("mlp"),
        linear_ignore=("lm_head", r"re:.*\.mlp\.gate$"),
    ),
    "OlmoeForCausalLM": ModelFamily(
        num_experts="num_experts",
        intermediate_size="intermediate_size",
        linears=ATTENTION,
        linear_ignore=("lm_head", r"re:.*\.mlp\.gate$"),
        refuse=_refuse_olmoe,
    ),
    "Glm4MoeForCausalLM": ModelFamily(
        num_experts="n_routed_experts",
        intermediate_size="moe_intermediate_size",
        is_moe_layer=_after_dense_layers,
        linears=ATTENTION + _mlp("mlp") + _mlp("mlp.shared_experts"),
        linear_ignore=("lm_head", r"re:.*\.mlp\.gate$"),
        router_scores="sigmoid",
        notes=(PREDICTION_NOTE,),
    ),
    "DeepseekV2ForCausalLM": replace(DEEPSEEK, refuse=_refuse_deepseek_v2, notes=MLA_NOTES),
    "DeepseekV3ForCausalLM": replace(
        DEEPSEEK, router_scores="sigmoid", refuse=_refuse_deepseek_v3, notes=(*MLA_NOTES, PREDICTION_NOTE)
    ),
    "PhiMoEForCausalLM": replace(
        MIXTRAL,
        module_names={"block_sparse_moe.gate.": "mlp.router.", "block_sparse_moe.": "mlp."},
        router="router",
        refuse=_refuse_phi,
        notes=(
            "vLLM 0.32 and 0.33 leave lm_head.bias out of the logits, in 16 bits, too; evaluation does not.",
            "With longrope, vLLM chooses its factors by --max-model-len, transformers by the length of the text.",
        ),
    ),
    "GraniteMoeForCausalLM": ModelFamily(
        num_experts="num_local_experts",
        intermediate_size="intermediate_size",
        experts="block_sparse_moe.experts",
        fused_experts={
            "gate_up": "block_sparse_moe.input_linear.weight",
            "down": "block_sparse_moe.output_linear.weight",
        },
        linears=ATTENTION,
        linear_ignore=("lm_head", r"re:.*\.block_sparse_moe\.router.*"),
        module_names={"block_sparse_moe.router.layer.": "block_sparse_moe.router."},
        moe_module="block_sparse_moe",
        router="router",
        router_logits=2,
        embedding_multiplier="embedding_multiplier",
        logits_divisor="logits_scaling",
    ),
}

# Architectures that were looked at and cannot be done from outside vLLM, and why.
REFUSED: dict[str, str] = {
    "GptOssForCausalLM": (
        "its experts have biases and a clamped activation, (up + 1) * gate * sigmoid(1.702 * gate) with gate and up in "
        "alternating rows, which the kernels do not compute; vLLM's loader takes its experts under a fixed table of "
        "names, without room for codes, scales and zeros; and its released weights have 4 bits already"
    ),
}

# What the kernels implement (the kernel contract: silu(gate) * up).
SUPPORTED_ACTIVATIONS = ("silu",)


@dataclass(frozen=True)
class MoeModel:
    """One model directory, described from its config.json.

    moe_layers   decoder layer index -> layer name, the on-disk prefix of its experts
    hidden, intermediate, num_experts, top_k   sizes of every MoE layer
    """

    path: Path
    config: PretrainedConfig
    architecture: str
    family: ModelFamily
    num_layers: int
    moe_layers: dict[int, str]
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    activation: str

    def expert_tensor(self, layer_name: str, expert: int, projection: str) -> str:
        """On-disk name, without suffix, of a matrix: projection is one of the family's gate, up and down."""
        return f"{layer_name}.{expert}.{projection}"

    def projections(self, part: str) -> tuple[str, ...]:
        """On-disk projections of a part: "gate_up" is two matrices stacked by rows, "down" is one."""
        return (self.family.gate, self.family.up) if part == "gate_up" else (self.family.down,)

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """[out, in] of one on-disk matrix of an expert."""
        if projection == self.family.down:
            return self.hidden, self.intermediate
        return self.intermediate, self.hidden

    def part_shapes(self) -> dict[str, list[int]]:
        """[out, in] of the parts as allocation counts them: gate and up stacked by rows."""
        return {
            "gate_up": [2 * self.intermediate, self.hidden],
            "down": [self.hidden, self.intermediate],
        }

    def read_config(self) -> dict[str, Any]:
        """config.json as it is written, without transformers' defaults."""
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    def experts_per_layer(self) -> dict[str, int]:
        return dict.fromkeys(self.moe_layers.values(), self.num_experts)

    def module_name(self, tensor_name: str) -> str:
        """Name inside a decoder layer of transformers' module tree, from a name relative to the layer on disk."""
        for on_disk, module in self.family.module_names.items():
            if tensor_name.startswith(on_disk):
                return module + tensor_name.removeprefix(on_disk)
        return tensor_name

    def fused_tensor(self, layer: int, part: str) -> str:
        """On-disk name of the tensor with that part of all experts of decoder layer N, in a fused_experts family."""
        return f"{LAYER_PREFIX}{layer}.{self.family.fused_experts[part]}"

    def is_expert_tensor(self, name: str) -> bool:
        """Whether an on-disk tensor, of the 16-bit model or of a checkpoint, holds weights of the routed experts."""
        split = split_layer_name(name)
        if split is None or split[0] not in self.moe_layers:
            return False
        return split[1].startswith(f"{self.family.experts}.") or split[1] in self.family.fused_experts.values()


def describe_model(path: str | Path) -> MoeModel:
    """Describe a model directory from its config.json.

    Raises UnsupportedModelError: no directory, no readable config, an architecture, setting or shape that this
    version cannot quantise, or a model that another tool has quantised; the message says why or lists what it can.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UnsupportedModelError(
            f"{path}: no config.json there; expected a Hugging Face model directory (download one with `hf download`)."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(f"{path / 'config.json'}: transformers cannot read it: {error}") from error
    architecture = (config.architectures or ["none"])[0]
    family = _find_family(path / "config.json", config, architecture)
    model = MoeModel(
        path=path,
        config=config,
        architecture=architecture,
        family=family,
        num_layers=config.num_hidden_layers,
        moe_layers={
            layer: f"{LAYER_PREFIX}{layer}.{family.experts}"
            for layer in range(config.num_hidden_layers)
            if family.is_moe_layer(config, layer)
        },
        hidden=config.hidden_size,
        intermediate=getattr(config, family.intermediate_size),
        num_experts=getattr(config, family.num_experts),
        top_k=config.num_experts_per_tok,
        activation=config.hidden_act,
    )
    _check_shapes(model)
    return model


def _find_family(where: Path, config: PretrainedConfig, architecture: str) -> ModelFamily:
    """Raises UnsupportedModelError for what no adapter handles."""
    family = FAMILIES.get(architecture)
    if family is None:
        reason = REFUSED.get(architecture, f"supported: {', '.join(FAMILIES)}")
        raise UnsupportedModelError(f"{where}: architecture {architecture} is not supported; {reason}.")
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method", "unnamed")
    if quantization and method != QUANT_METHOD:
        raise UnsupportedModelError(
            f"{where}: the model is quantised already ({method}); start from its 16-bit weights, and a config.json "
            "without quantization_config."
        )
    check_model(str(where), config)
    reason = family.refuse(config)
    if reason is not None:
        raise UnsupportedModelError(f"{where}: {reason}; served, the model would not compute what was calibrated.")
    return family


def _check_shapes(model: MoeModel) -> None:
    where = model.path / "config.json"
    if not model.moe_layers:
        raise UnsupportedModelError(f"{where}: no layer has experts; there is nothing to quantise.")
    if model.activation not in SUPPORTED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"{where}: hidden_act is {model.activation!r}; supported: {', '.join(SUPPORTED_ACTIVATIONS)}."
        )


FLOAT_DTYPES = ("BF16", "F16", "F32")


def check_tensors(model: MoeModel, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that every expert tensor is there with the shape and dtype config.json implies.

    Raises UnsupportedModelError naming file, tensor, what was found and what was expected.
    """
    for name, expected in _expert_tensors(model):
        info = tensors.get(name)
        if info is None:
            raise UnsupportedModelError(
                f"{model.path}: tensor {name} is missing; config.json promises {model.num_experts} experts in each of "
                f"{len(model.moe_layers)} layers. Is the download complete?"
            )
        if info.shape != expected:
            raise UnsupportedModelError(
                f"{info.file}: {name} has shape {list(info.shape)}, config.json implies {list(expected)}."
            )
        if info.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"{info.file}: {name} has dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}; "
                "start from the 16-bit model."
            )


def _expert_tensors(model: MoeModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the experts' tensors in the 16-bit model's files."""
    for layer, layer_name in model.moe_layers.items():
        if model.family.fused_experts:
            for part, shape in model.part_shapes().items():
                yield model.fused_tensor(layer, part), (model.num_experts, *shape)
            continue
        for expert in range(model.num_experts):
            for projection in (model.family.gate, model.family.up, model.family.down):
                yield (
                    f"{model.expert_tensor(layer_name, expert, projection)}.weight",
                    model.projection_shape(projection),
                )


def activation_function(model: MoeModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation between gate and up, element by element."""
    return ACT2FN[model.activation]


_LAYER_INDEX = re.compile(re.escape(LAYER_PREFIX) + r"(\d+)\.(.+)")


def split_layer_name(name: str) -> tuple[int, str] | None:
    """ "model.layers.3.self_attn.q_proj.weight" -> (3, "self_attn.q_proj.weight"); None outside decoder layers."""
    match = _LAYER_INDEX.fullmatch(name)
    return (int(match[1]), match[2]) if match else None
