"""The quantization config vLLM asks which method each layer gets.

Every vLLM process imports this module, whatever model it serves: layer classes are imported where they are used.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from vllm_mcmoe.checkpoint import BIAS, QUANT_METHOD, CheckpointConfig
from vllm_mcmoe.errors import FormatError, PruningError, UnsupportedModelError
from vllm_mcmoe.expert_weights import PARAMETERS, PROJECTIONS, exact_name
from vllm_mcmoe.graph_cache import add_to_cache_key
from vllm_mcmoe.linear_choice import LINEARS_VARIABLE, MCMOE, linears_request
from vllm_mcmoe.pruning import PRUNING_OVERRIDE, PRUNING_VARIABLE, LayerPruning, PruningRules, resolve_target
from vllm_mcmoe.support import check_model

# Every variable of the plugin. The modules that read them name them; a test holds this list against the sources.
VARIABLES = (
    "VLLM_MCMOE_ACTIVATIONS",
    "VLLM_MCMOE_BACKEND",
    "VLLM_MCMOE_CACHE",
    "VLLM_MCMOE_CPU_ISA",
    "VLLM_MCMOE_LINEARS",
    "VLLM_MCMOE_PRUNING",
    "VLLM_MCMOE_TILES",
)

# Of the operators that experts are computed by: raised when their arguments change.
CONTRACT_VERSION = "2"

# vLLM's models that load experts by a table of names of their own, which ours are not in. They hand what they do not
# know to the parameter of that very name.
BY_EXACT_NAMES = ("GraniteMoeHybridForCausalLM", "GptOssForCausalLM")

# What vLLM makes of linears that share their input, in all models; not every model's own mapping names all of its own.
FUSED_LINEARS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
}

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.models.utils import WeightsMapper


class McmoeConfig(QuantizationConfig):
    """Experts go to McmoeMoEMethod; every other linear layer to vLLM's compressed-tensors method, which on CPUs gets
    our scheme (linear_scheme.py)."""

    def __init__(self, checkpoint: CheckpointConfig | None = None):
        super().__init__()
        if checkpoint is None:  # vLLM's way of saying that config.json has no quantization_config
            raise FormatError(
                f"--quantization {QUANT_METHOD} was given, but this model's config.json has no quantization_config: "
                "it is not quantised. Run `mcmoe quantize MODEL OUT` and serve OUT, or drop --quantization."
            )
        self.checkpoint = checkpoint
        self.experts = checkpoint.experts
        self.on_disk_names = {name: name for name in checkpoint.experts}
        self.exact_names = False
        self._pruning_rules: PruningRules | None = None
        self.linear = None
        if checkpoint.linear is not None:
            from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
                CompressedTensorsConfig,
            )

            try:
                self.linear = CompressedTensorsConfig.from_config(checkpoint.linear)
            except (
                Exception
            ) as error:  # compressed-tensors' classes check values in many ways, with errors of their own
                reason = " ".join(str(error).split())
                raise FormatError(
                    f"config.json: quantization_config: linear is not a compressed-tensors config: {reason}"
                ) from error

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "McmoeConfig":
        return cls(CheckpointConfig.from_dict(config, source="config.json: quantization_config"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        # Custom methods are asked first about every checkpoint: claim only our own, and leave it to vLLM to refuse
        # a user who names another method for it.
        ours = hf_quant_cfg.get("quant_method") == QUANT_METHOD
        return QUANT_METHOD if ours and user_quant in (None, QUANT_METHOD) else None

    def maybe_update_config(
        self, model_name: str, hf_config: "PretrainedConfig | None" = None, revision: str | None = None
    ) -> None:
        """Where vLLM shows the model's config, before anything is built."""
        if hf_config is not None:
            check_model(f"{model_name}: config.json", hf_config)
            self.exact_names = any(name in BY_EXACT_NAMES for name in hf_config.architectures or ())

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        """What vLLM renames tensors by before its models see them."""
        from vllm.model_executor.models.utils import WeightsMapper

        mapper = super().get_checkpoint_weight_mapper()
        if not self.exact_names:
            return mapper
        suffixes = "|".join((*PARAMETERS, BIAS))
        ours = re.compile(rf"\.experts\.(\d+)\.({'|'.join(PROJECTIONS)})\.({suffixes})$")
        exact = r".experts.routed_experts." + exact_name(r"\1", r"\2", r"\3")
        return mapper | WeightsMapper(orig_to_new_regex={ours: exact})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename the layers of the config as vLLM renames the checkpoint's tensors."""
        self.experts = hf_to_vllm_mapper.apply_dict(self.experts)
        self.on_disk_names = hf_to_vllm_mapper.apply_dict(self.on_disk_names)
        if self.linear is not None:
            self.linear.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from vllm_mcmoe.moe_method import McmoeMoEMethod, select_backend
        from vllm_mcmoe.start_report import StartReport

        if isinstance(layer, RoutedExperts):
            name = self._find_layer(prefix)
            bits = self.experts[name]
            self._refuse_requantisation(prefix, layer)
            _note_kernels(select_backend())
            codes = frozenset().union(*(layer_bits.used_codes for layer_bits in self.experts.values()))
            version, pruning = self.checkpoint.format_version, self._layer_pruning(name, layer)
            report = StartReport(self.checkpoint, self._pruning_target()[0])
            return McmoeMoEMethod(layer.moe_config, bits, version, pruning, codes, self.exact_names, report)
        if self.linear is not None:
            self.linear.packed_modules_mapping = self._fused_linears(prefix)
            method = self.linear.get_quant_method(layer, prefix)
            if isinstance(layer, LinearBase):
                self._check_named(layer, prefix)
            _choose_cpu_scheme(layer)
            return method
        # LinearBase insists on a method; embeddings, lm_head and attention take None as "unquantised".
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _fused_linears(self, prefix: str) -> dict[str, list[str]]:
        """Name of a fused linear -> those that it is made of; at prefix without those that the config, which names
        others beside them, does not: Gemma 4 has layers whose values are their keys."""
        mapping, (parent, _, fused) = FUSED_LINEARS | self.packed_modules_mapping, prefix.rpartition(".")
        known = {*self.linear.target_scheme_map, *self.linear.ignore}
        named = [name for name in mapping.get(fused, ()) if f"{parent}.{name}" in known]
        return {**mapping, fused: named} if named else mapping

    def _check_named(self, layer: "LinearBase", prefix: str) -> None:
        """vLLM leaves linears that no group of the config matches in 16 bits, whatever the checkpoint has."""
        from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

        ignored = should_ignore_layer(
            prefix, ignore=self.linear.ignore, fused_mapping=self.linear.packed_modules_mapping
        )
        if getattr(layer, "scheme", None) is None and not ignored:
            raise FormatError(
                f"config.json: quantization_config.linear says neither how many bits {prefix} has nor that it stays in "
                "16. The checkpoint and the model do not match."
            )

    def _find_layer(self, prefix: str) -> str:
        """The name in `experts` of the MoE layer that vLLM calls `prefix`.

        Some of its models build the layer under another name than they load it by; then the decoder layer's number
        tells, if it is that of one entry only.
        """
        if prefix in self.experts:
            return prefix
        number = _layer_number(prefix)
        same = [name for name in self.experts if number is not None and _layer_number(name) == number]
        if len(same) == 1:
            return same[0]
        raise FormatError(
            f"config.json: quantization_config.experts has no entry for the MoE layer {prefix}; it names "
            f"{', '.join(list(self.experts)[:3])}, ... The checkpoint and the model do not match."
        )

    def _refuse_requantisation(self, prefix: str, layer: "RoutedExperts") -> None:
        """vLLM would replace the MoE method by one of its own, which needs the weights in 16 bits."""
        online = self.online_quantization_config
        if online is not None and online.resolve_quant_method_cls(type(layer), prefix) is not None:
            raise UnsupportedModelError(
                f"{prefix}: --quantization-config asks vLLM to quantise these experts, which are quantised already. "
                "Take `moe` and targets that match experts out of it, or give it with the 16-bit model."
            )

    def _pruning_target(self) -> tuple[float | None, str]:
        """The fraction of expert activations to drop, None where the checkpoint has no rule, and who asked for it.

        Raises PruningError for a target that the checkpoint cannot have.
        """
        config, (source, request) = self.checkpoint.pruning, _pruning_request()
        if config is not None:
            return resolve_target(config, request, source), source
        if request not in ("on", "off"):
            raise PruningError(f"{source} is {request!r}, but this checkpoint has no rule; run `mcmoe prune` first.")
        return None, source

    def _layer_pruning(self, name: str, layer: "RoutedExperts") -> LayerPruning | None:
        """The rule of a MoE layer at the target asked for, or None where the checkpoint has none or it is switched off.

        Switched off by an environment variable, the rule stays in the model and keeps everything: vLLM's compiled
        graphs, which it caches by the model's config, must not depend on the environment.
        """
        config, (target, source) = self.checkpoint.pruning, self._pruning_target()
        if target is None or (target == 0 and source != PRUNING_VARIABLE):
            return None
        if self._pruning_rules is None:
            self._pruning_rules = PruningRules.load(_model_directory(config.file_name), config)
        return self._pruning_rules.layer(
            self.on_disk_names[name],
            target,
            top_k=layer.moe_config.experts_per_token,
            num_experts=layer.global_num_experts,
            hidden_size=layer.hidden_size,
        )


def _layer_number(name: str) -> str | None:
    """Of "model.layers.3.mlp.experts"."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return match and match[1]


def _note_kernels(backend: str) -> None:
    """Of the experts, in the key of compiled graphs, which name their operator, its arguments and instruction set."""
    add_to_cache_key("backend", backend)
    add_to_cache_key("contract", CONTRACT_VERSION)
    if backend == "cpu":
        from vllm_mcmoe.kernels.cpu import select_isa

        add_to_cache_key("cpu_isa", select_isa())


def _choose_cpu_scheme(layer: torch.nn.Module) -> None:
    """Let a CPU serve a 4- or 8-bit linear by our kernels where vLLM has none; GPUs have vLLM's.

    Raises UnsupportedModelError for a value of `VLLM_MCMOE_LINEARS` that is unknown or not for this platform.
    """
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16

    scheme, request = getattr(layer, "scheme", None), linears_request()
    if not isinstance(scheme, CompressedTensorsWNA16):
        return
    if current_platform.is_cpu():
        from vllm_mcmoe.linear_scheme import CpuWNA16

        layer.scheme = CpuWNA16(scheme, request)
    elif request == MCMOE:
        raise UnsupportedModelError(
            f"{LINEARS_VARIABLE}={MCMOE}: vllm-mcmoe has kernels of its own for linears on CPUs only. Unset it."
        )


def _pruning_request() -> tuple[str, str | float]:
    """What the operator asked for, and how: an override of the model's config, else the environment, else "on"."""
    hf_config = get_current_vllm_config().model_config.hf_config
    override = getattr(hf_config, PRUNING_OVERRIDE, None)
    if override is not None:
        return f"--hf-overrides {PRUNING_OVERRIDE}", override
    return PRUNING_VARIABLE, os.environ.get(PRUNING_VARIABLE, "on")


def _model_directory(file_name: str) -> Path:
    """Where the model vLLM is loading has this file; a model named by its hub id is looked up as vLLM's loader does."""
    model_config = get_current_vllm_config().model_config
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model_config.model, file_name, revision=model_config.revision)).parent


def register_with_vllm() -> None:
    """Make `mcmoe` a quantization method of this process, and our variables known to vLLM. Idempotent."""
    for name in VARIABLES:
        # vLLM warns of variables it does not know, and hands those it knows to Ray's workers. It also reads them into
        # the key of compiled graphs: as nothing, since graph_cache.py adds what matters there.
        envs.environment_variables.setdefault(name, lambda: None)
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(McmoeConfig)
