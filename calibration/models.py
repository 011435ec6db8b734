"""What calibration must know of an architecture: one small `ModelFamily` per entry of FAMILIES.

A model directory is described from its config.json alone (`describe_model`), then its safetensors headers are checked
against that description (`check_tensors`), both before any long work. To add an architecture, add an entry and a tiny
random model of it to tests/calibration.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

from vllm_mcmoe.calibration.tensors import TensorInfo
from vllm_mcmoe.errors import UnsupportedModelError
from vllm_mcmoe.kernels.packing import GROUP_SIZE

LAYER_PREFIX = "model.layers."


@dataclass(frozen=True)
class ModelFamily:
    """Names of one architecture, relative to a decoder layer `model.layers.N.`.

    experts             on-disk prefix of the experts
    gate, up, down      on-disk names of an expert's projections
    num_experts, intermediate_size   keys of config.json
    is_moe_layer        whether decoder layer N of this config has experts
    linears             linear layers that compressed-tensors quantises, where a layer has them, in the order of the
                        forward pass; those of one stage share their input
    linear_ignore       compressed-tensors patterns of linear layers that stay in 16 bits
    module_names        on-disk prefix -> prefix in transformers' module tree, where the two differ
    """

    experts: str
    gate: str
    up: str
    down: str
    num_experts: str
    intermediate_size: str
    is_moe_layer: Callable[[PretrainedConfig, int], bool]
    linears: tuple[tuple[str, ...], ...]
    linear_ignore: tuple[str, ...]
    module_names: Mapping[str, str]


def _qwen3_is_moe_layer(config: PretrainedConfig, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
DENSE_MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))

FAMILIES: dict[str, ModelFamily] = {
    "MixtralForCausalLM": ModelFamily(
        experts="block_sparse_moe.experts",
        gate="w1",
        up="w3",
        down="w2",
        num_experts="num_local_experts",
        intermediate_size="intermediate_size",
        is_moe_layer=lambda config, layer: True,
        linears=ATTENTION,
        linear_ignore=("lm_head", r"re:.*\.block_sparse_moe\.gate$"),
        module_names={"block_sparse_moe.": "mlp."},
    ),
    "Qwen3MoeForCausalLM": ModelFamily(
        experts="mlp.experts",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        num_experts="num_experts",
        intermediate_size="moe_intermediate_size",
        is_moe_layer=_qwen3_is_moe_layer,
        linears=ATTENTION + DENSE_MLP,
        linear_ignore=("lm_head", r"re:.*\.mlp\.gate$"),
        module_names={},
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

    def is_expert_tensor(self, name: str) -> bool:
        return any(name.startswith(f"{layer}.") for layer in self.moe_layers.values())


def describe_model(path: str | Path) -> MoeModel:
    """Describe a model directory from its config.json.

    Raises UnsupportedModelError: no directory, no readable config, an architecture, activation or shape that this
    version cannot quantise; the message lists what it can.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UnsupportedModelError(
            f"{path}: no config.json there; expected a Hugging Face model directory (download one with `hf download`)."
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(f"{path / 'config.json'}: transformers cannot read it: {error}") from error
    architecture = (config.architectures or ["none"])[0]
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModelError(
            f"{path / 'config.json'}: architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}."
        )
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


def _check_shapes(model: MoeModel) -> None:
    where = model.path / "config.json"
    if not model.moe_layers:
        raise UnsupportedModelError(f"{where}: no layer has experts; there is nothing to quantise.")
    if model.activation not in SUPPORTED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"{where}: hidden_act is {model.activation!r}; supported: {', '.join(SUPPORTED_ACTIVATIONS)}."
        )
    sizes = {"hidden_size": model.hidden, model.family.intermediate_size: model.intermediate}
    for key, size in sizes.items():
        if size % GROUP_SIZE:
            raise UnsupportedModelError(
                f"{where}: {key} is {size}, which is not divisible by the group size {GROUP_SIZE}; "
                "the experts of this model cannot be quantised."
            )


FLOAT_DTYPES = ("BF16", "F16", "F32")


def check_tensors(model: MoeModel, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that every expert tensor is there with the shape and dtype config.json implies.

    Raises UnsupportedModelError naming file, tensor, what was found and what was expected.
    """
    for layer_name in model.moe_layers.values():
        for expert in range(model.num_experts):
            for projection in (model.family.gate, model.family.up, model.family.down):
                name = f"{model.expert_tensor(layer_name, expert, projection)}.weight"
                info = tensors.get(name)
                if info is None:
                    raise UnsupportedModelError(
                        f"{model.path}: tensor {name} is missing; config.json promises {model.num_experts} experts "
                        f"in layer {layer_name}. Is the download complete?"
                    )
                expected = model.projection_shape(projection)
                if info.shape != expected:
                    raise UnsupportedModelError(
                        f"{info.file}: {name} has shape {list(info.shape)}, config.json implies {list(expected)}."
                    )
                if info.dtype not in FLOAT_DTYPES:
                    raise UnsupportedModelError(
                        f"{info.file}: {name} has dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}; "
                        "start from the 16-bit model."
                    )


def activation_function(model: MoeModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation between gate and up, element by element."""
    return ACT2FN[model.activation]


_LAYER_INDEX = re.compile(re.escape(LAYER_PREFIX) + r"(\d+)\.(.+)")


def split_layer_name(name: str) -> tuple[int, str] | None:
    """ "model.layers.3.self_attn.q_proj.weight" -> (3, "self_attn.q_proj.weight"); None outside decoder layers."""
    match = _LAYER_INDEX.fullmatch(name)
    return (int(match[1]), match[2]) if match else None
