"""Checkpoints in transformers: importing this module lets `from_pretrained` load them, dequantised.

    import vllm_mcmoe.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="bfloat16")

The model is then an ordinary one in 16 or 32 bits, and takes the memory of one: for tools that know transformers only,
such as lm-eval's `hf` backend. Without the import transformers logs that it does not know the method, and returns
random weights. One layer at a time is dequantised, into the memory that the model has already.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_mcmoe.calibration.evaluate.checkpoint_weights import open_weights
from vllm_mcmoe.calibration.model.description import LAYERS, TEXT_MODULE
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.checkpoint import QUANT_METHOD
from vllm_mcmoe.errors import FormatError


@register_quantization_config(QUANT_METHOD)
class McmoeHfConfig(QuantizationConfigMixin):
    """config.json's quantization_config, which is checked where the weights are opened."""

    def __init__(self, **values: Any):
        self.values = values
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


@register_quantizer(QUANT_METHOD)
class McmoeHfQuantizer(HfQuantizer):
    """Leaves loading to nobody, and fills the model afterwards."""

    requires_calibration = True
    dtype: torch.dtype | None = None  # that was asked for

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        # transformers finds tensors under names that it does not know, and misses those it does
        for names in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
            setattr(model, names, {*(getattr(model, names) or ()), r".*"})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        path = _directory(model.name_or_path)
        parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        for name, weight in _weights(path):
            if name not in parameters:
                kind = type(model).__name__
                raise FormatError(
                    f"{path}: {kind} has no parameter {name}. Checkpoints are loaded as models of text, by "
                    "AutoModelForCausalLM; where that takes the class with pictures, by "
                    "vllm_mcmoe.calibration.evaluate.checkpoint_weights.load_dequantized."
                )
            # transformers keeps the stored dtype of what it takes for quantised
            dtype = self.dtype if weight.is_floating_point() else weight.dtype
            parameters[name].data = weight.to(parameters[name].device, dtype)
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        """As the 16-bit model that it has become."""
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _directory(name_or_path: str) -> Path:
    """Where transformers has read the config from."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return Path(snapshot_download(name_or_path, local_files_only=True))
    except (OSError, ValueError) as error:
        raise FormatError(f"{name_or_path}: neither a directory nor a model that was downloaded: {error}") from error


def _weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, float32 weight) of every parameter and stored buffer, a layer at a time."""
    source = LayerwiseModel(open_weights(path))
    for index in range(source.num_layers):
        for name, weight in source.layer_state(index).items():
            yield f"{TEXT_MODULE}{LAYERS}.{index}.{name}", weight
    yield from source.outer_state()
