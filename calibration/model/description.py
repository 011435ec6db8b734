"""One model, described from its config.json alone (`describe_model`).

The headers of its safetensors files are checked against that description (`check_tensors`), both before any long work.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from vllm_mcmoe.calibration.model.families import FAMILIES, REFUSED
from vllm_mcmoe.calibration.model.families.family import ModelFamily
from vllm_mcmoe.calibration.model.folder import CONFIG_FILE, ModelFolder, find_model
from vllm_mcmoe.calibration.model.source_formats import READ, SourceFormat, find_source_format
from vllm_mcmoe.calibration.model.weight_files import TensorInfo
from vllm_mcmoe.checkpoint import BIAS
from vllm_mcmoe.errors import UnsupportedModelError
from vllm_mcmoe.kernels.expert_function import ExpertFunction
from vllm_mcmoe.support import check_model

# transformers' module tree: the text model, its decoder layers, the output head
TEXT_MODULE, LAYERS, HEAD_MODULE = "model.", "layers", "lm_head"


@dataclass(frozen=True)
class MoeModel:
    """One model, described from its config.json.

    folder       where its files are
    config       of the text model, which in a wrapper is a part of config.json
    source_format  what the files' weights are in
    moe_layers   decoder layer index -> layer name, the on-disk prefix of its experts
    hidden       size of the hidden states
    expert_hidden, intermediate, num_experts, top_k   sizes of every MoE layer; latent experts have a hidden size of
                 their own
    function     what experts compute between their projections
    """

    folder: ModelFolder
    config: PretrainedConfig
    architecture: str
    family: ModelFamily
    source_format: SourceFormat
    num_layers: int
    moe_layers: dict[int, str]
    hidden: int
    expert_hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    function: ExpertFunction

    @property
    def path(self) -> Path:
        """Directory of its files; of a model on the hub not all of them are there yet."""
        return self.folder.path

    def expert_tensor(self, layer_name: str, expert: int, projection: str) -> str:
        """On-disk name, without suffix, of a matrix: projection is one of all_projections."""
        return f"{layer_name}.{expert}.{projection}"

    def projections(self, part: str) -> tuple[str, ...]:
        """On-disk projections of a part: "gate_up" is two matrices, one where experts have no gate; "down" is one."""
        if part == "down":
            return (self.family.down,)
        return (self.family.gate, self.family.up) if self.function.gated else (self.family.up,)

    @property
    def all_projections(self) -> tuple[str, ...]:
        """On-disk projections of an expert."""
        return (*self.projections("gate_up"), *self.projections("down"))

    def projection_rows(self, part: str) -> list[slice]:
        """Rows of each of a part's projections in the part as calibration has it."""
        count = len(self.projections(part))
        if self.family.experts_interleaved:
            return [slice(first, None, count) for first in range(count)]
        rows = self.part_shapes()[part][0] // count
        return [slice(first * rows, (first + 1) * rows) for first in range(count)]

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """[out, in] of one on-disk matrix of an expert."""
        if projection == self.family.down:
            return self.expert_hidden, self.intermediate
        return self.intermediate, self.expert_hidden

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of one expert's tensor, a weight or a bias, by its on-disk name in 16 bits."""
        projection, suffix = name.rsplit(".", 2)[1:]
        shape = self.projection_shape(projection)
        return shape[:1] if suffix == BIAS else shape

    def part_shapes(self) -> dict[str, list[int]]:
        """[out, in] of the parts as allocation counts them: gate and up stacked by rows."""
        return {
            "gate_up": [self.function.factor * self.intermediate, self.expert_hidden],
            "down": [self.expert_hidden, self.intermediate],
        }

    @property
    def has_biases(self) -> bool:
        """Whether its experts do."""
        return bool(self.family.fused_biases)

    def read_config(self) -> dict[str, Any]:
        """config.json as it is written, without transformers' defaults and without what its weights are in."""
        config = json.loads((self.path / CONFIG_FILE).read_text(encoding="utf-8"))
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            part.pop("quantization_config", None)
        return config

    def experts_per_layer(self) -> dict[str, int]:
        return dict.fromkeys(self.moe_layers.values(), self.num_experts)

    def module_name(self, tensor_name: str) -> str:
        """Name inside a decoder layer of transformers' module tree, from a name relative to the layer on disk."""
        for on_disk, module in self.family.module_names.items():
            if tensor_name.startswith(on_disk):
                return module + tensor_name.removeprefix(on_disk)
        return tensor_name

    def on_disk_name(self, module_name: str) -> str:
        """The other way round."""
        for on_disk, module in self.family.module_names.items():
            if module_name.startswith(module):
                return on_disk + module_name.removeprefix(module)
        return module_name

    @property
    def layer_prefix(self) -> str:
        """On disk; a decoder layer's number follows."""
        return f"{self.family.text_prefix}{LAYERS}."

    def split_layer_name(self, name: str) -> tuple[int, str] | None:
        """Of an on-disk name: "model.layers.3.self_attn.q_proj.weight" -> (3, "self_attn.q_proj.weight"); None outside
        decoder layers."""
        if not name.startswith(self.layer_prefix):
            return None
        number, _, rest = name.removeprefix(self.layer_prefix).partition(".")
        return (int(number), rest) if number.isdecimal() and rest else None

    def outer_name(self, module_name: str) -> str:
        """On-disk name of a tensor outside the decoder layers, from its name in transformers' module tree."""
        if module_name.startswith(f"{HEAD_MODULE}."):
            return self.family.head + module_name.removeprefix(HEAD_MODULE)
        return self.family.text_prefix + module_name.removeprefix(TEXT_MODULE)

    @property
    def packs_head(self) -> bool:
        """Whether the output head can be packed: one of its own, which vLLM's model serves quantised."""
        return self.family.head_packed and not self.config.tie_word_embeddings

    def passes_through(self, name: str) -> bool:
        """Whether an on-disk tensor belongs to a part of a wrapper that is copied as it is."""
        return name.startswith(self.family.passed_through)

    def fused_tensor(self, layer: int, part: str) -> str:
        """On-disk name of the tensor with that part of all experts of decoder layer N, in a fused_experts family."""
        return f"{self.layer_prefix}{layer}.{self.family.fused_experts[part]}"

    def fused_bias(self, layer: int, part: str) -> str:
        """On-disk name of the tensor with the biases of that part of all experts."""
        return f"{self.layer_prefix}{layer}.{self.family.fused_biases[part]}"

    def fused_shapes(self, part: str) -> list[tuple[int, int, int]]:
        """That a fused tensor of weights may have; the second one is transposed."""
        rows, columns = self.part_shapes()[part]
        plain, transposed = (self.num_experts, rows, columns), (self.num_experts, columns, rows)
        return {"never": [plain], "maybe": [plain, transposed], "always": [transposed]}[self.family.fused_transposed]

    def is_expert_tensor(self, name: str) -> bool:
        """Whether an on-disk tensor, of the 16-bit model or of a checkpoint, belongs to the routed experts."""
        split = self.split_layer_name(name)
        if split is None or split[0] not in self.moe_layers:
            return False
        fused = (*self.family.fused_experts.values(), *self.family.fused_biases.values())
        return split[1].startswith(f"{self.family.experts}.") or split[1] in fused

    def is_expert_weight(self, name: str) -> bool:
        """Whether it holds weights of theirs, in any form: what bits per weight are counted of."""
        return self.is_expert_tensor(name) and not name.endswith(BIAS)


def describe_model(model: str | Path | ModelFolder) -> MoeModel:
    """Describe a model, named as find_model takes it, from its config.json.

    Raises UnsupportedModelError: no directory, no readable config, an architecture, setting or shape that this
    version cannot quantise, or a model that another tool has quantised; the message says why or lists what it can.
    HubError as find_model does.
    """
    folder = find_model(model)
    path = folder.path
    config_path = path / CONFIG_FILE
    if not config_path.is_file():
        raise UnsupportedModelError(
            f"{path}: no {CONFIG_FILE} there; expected a Hugging Face model directory, or ORG/NAME of one on the hub."
        )
    whole = _read_config(config_path)
    architecture = (whole.architectures or ["none"])[0]
    family = _find_family(config_path, architecture)
    config = _asked(path, lambda: family.text_config(whole.get_text_config()))
    _check_family(config_path, whole, config, family)
    quantization = getattr(whole, "quantization_config", None) or getattr(config, "quantization_config", None)
    described = MoeModel(
        folder=folder,
        config=config,
        architecture=architecture,
        family=family,
        source_format=find_source_format(str(config_path), quantization),
        num_layers=config.num_hidden_layers,
        moe_layers={
            layer: f"{family.text_prefix}{LAYERS}.{layer}.{family.experts}"
            for layer in _asked(
                path, lambda: [n for n in range(config.num_hidden_layers) if family.is_moe_layer(config, n)]
            )
        },
        hidden=config.hidden_size,
        expert_hidden=_asked(path, lambda: family.expert_hidden(config)),
        intermediate=getattr(config, family.intermediate_size),
        num_experts=getattr(config, family.num_experts),
        top_k=getattr(config, family.top_k),
        function=_asked(path, lambda: _function(config_path, config, family)),
    )
    _check_shapes(described)
    return described


# keys of config.json by which lists and tensors are made before anything could be compared with the files
LARGEST = dict.fromkeys(("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"), 10_000)
LARGEST |= dict.fromkeys(
    (
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    1_000_000,
)
LARGEST["vocab_size"] = 100_000_000


def _read_config(path: Path) -> PretrainedConfig:
    """Raises UnsupportedModelError for whatever transformers makes of a file that is no config of a language model."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path}: not a JSON file: {error}. Is the download complete?") from None
    if not isinstance(plain, dict):
        raise UnsupportedModelError(f"{path}: expected an object, found a {type(plain).__name__}.")
    architectures = plain.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise UnsupportedModelError(f"{path}: architectures is {architectures!r}, expected a list of names.")
    for part in (plain, *(value for value in plain.values() if isinstance(value, dict))):
        for key, value in part.items():
            if isinstance(value, int | float) and value > LARGEST.get(key, math.inf):
                raise UnsupportedModelError(f"{path}: {key} is {value}, more than any model has.")
    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:  # its classes check values in many ways, each with errors of its own
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"{path}: transformers cannot read it: {reason}") from error


def _find_family(where: Path, architecture: str) -> ModelFamily:
    """Raises UnsupportedModelError for what no adapter handles."""
    family = FAMILIES.get(architecture)
    if family is None:
        reason = REFUSED.get(architecture, f"supported: {', '.join(FAMILIES)}")
        raise UnsupportedModelError(f"{where}: architecture {architecture} is not supported; {reason}.")
    return family


def _check_family(where: Path, whole: PretrainedConfig, config: PretrainedConfig, family: ModelFamily) -> None:
    """whole: config.json; config: of its text model. Raises UnsupportedModelError for values that nobody handles."""
    check_model(str(where), whole)
    _check_values(where, config, family)
    reason = _asked(where.parent, lambda: family.refuse(config))
    if reason is not None:
        raise UnsupportedModelError(f"{where}: {reason}; served, the model would not compute what was calibrated.")


def _function(where: Path, config: PretrainedConfig, family: ModelFamily) -> ExpertFunction:
    try:
        return family.function(config)
    except ValueError as error:
        raise UnsupportedModelError(f"{where}: {error}.") from None


def _asked(path: Path, question: Callable[[], Any]) -> Any:
    """What a family makes of a config. Raises UnsupportedModelError where a value is of no type that it could have."""
    try:
        return question()
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UnsupportedModelError(
            f"{path / 'config.json'}: a value has another type than it should: {error}"
        ) from error


def _check_values(where: Path, config: PretrainedConfig, family: ModelFamily) -> None:
    """Raises UnsupportedModelError for sizes that are none, and for what vLLM's models of all families disregard."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    for key in (*keys, family.top_k, family.intermediate_size, family.num_experts):
        value = getattr(config, key, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedModelError(f"{where}: {key} is {value!r}, expected a positive number.")
    experts = getattr(config, family.num_experts)
    top_k = getattr(config, family.top_k)
    if top_k > experts:
        raise UnsupportedModelError(f"{where}: {family.top_k} is {top_k}, more than the {experts} experts of a layer.")
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1 and not kinds <= set(family.layer_kinds):
        raise UnsupportedModelError(
            f"{where}: layer_types mixes {', '.join(sorted(map(str, kinds)))}, where vLLM's model treats all layers "
            "alike; served, the model would not compute what was calibrated."
        )


def _check_shapes(model: MoeModel) -> None:
    where = model.path / CONFIG_FILE
    if not model.moe_layers:
        raise UnsupportedModelError(f"{where}: no layer has experts; there is nothing to quantise.")


FLOAT_DTYPES = ("BF16", "F16", "F32")


def has_fused_experts(model: MoeModel, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether these files keep all experts of a layer in one tensor; of some architectures there are both kinds."""
    first = next(iter(model.moe_layers))
    return any(model.fused_tensor(first, part) in tensors for part in model.family.fused_experts)


def check_tensors(model: MoeModel, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that every expert tensor is there with the shape and dtype config.json implies.

    Raises UnsupportedModelError naming file, tensor, what was found and what was expected.
    """
    fused = has_fused_experts(model, tensors)
    for name, expected in _expert_tensors(model, fused):
        info = tensors.get(name)
        if info is None:
            raise UnsupportedModelError(
                f"{model.path}: tensor {name} is missing; config.json promises {model.num_experts} experts in each of "
                f"{len(model.moe_layers)} layers. Is the download complete?"
            )
        if info.shape not in expected:
            raise UnsupportedModelError(
                f"{info.file}: {name} has shape {list(info.shape)}, config.json implies "
                f"{' or '.join(str(list(shape)) for shape in expected)}."
            )
        if info.dtype not in FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"{info.file}: {name} has dtype {info.dtype}, and no quantization_config in config.json says what that "
                f"stands for. Models are read in {READ}."
            )


def _expert_tensors(model: MoeModel, fused: bool) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Names of the experts' tensors in the 16-bit model's files, and the shapes that each may have."""
    for layer, layer_name in model.moe_layers.items():
        if fused:
            for part in model.family.fused_experts:
                yield model.fused_tensor(layer, part), model.fused_shapes(part)
            for part in model.family.fused_biases:
                yield model.fused_bias(layer, part), [(model.num_experts, model.part_shapes()[part][0])]
            continue
        for expert in range(model.num_experts):
            for projection in model.all_projections:
                base = model.expert_tensor(layer_name, expert, projection)
                for suffix in ("weight", BIAS) if model.has_biases else ("weight",):
                    name = f"{base}.{suffix}"
                    yield name, [model.tensor_shape(name)]
