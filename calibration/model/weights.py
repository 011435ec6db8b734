"""Where a model's weights come from, by on-disk name: here of the files it was released as."""

import math
from collections.abc import Mapping
from typing import Protocol

import torch

from vllm_mcmoe.calibration.model.description import MoeModel, check_tensors, has_fused_experts
from vllm_mcmoe.calibration.model.weight_files import TensorFiles, TensorInfo
from vllm_mcmoe.checkpoint import BIAS, is_mcmoe_checkpoint
from vllm_mcmoe.errors import UnsupportedModelError

# Tables of rotary embeddings that older versions of transformers stored; all that read the files today compute them.
LEFTOVERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class WeightSource(Protocol):
    """Weights of a model by the names they have in the 16-bit model's files, wherever they come from.

    model   what they belong to
    files   the files they are read from
    """

    model: MoeModel
    files: TensorFiles

    def names(self) -> list[str]:
        """Names of all tensors."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises FormatError if there is none of that name."""

    def numel(self, name: str) -> int:
        """Weights in it."""


class WeightFiles:
    """The WeightSource of a model directory as it was released, in 16 bits or another of source_formats.

    weights   name -> where each weight is, with the shape and dtype it is read in; stacked experts as they are stored

    Experts have a name each, also those of families that keep them in one tensor per layer. Decoder layers beyond the
    model's own (multi-token prediction) are left out: transformers does not run them, and a draft model could not be
    served from experts of 16 bits beside quantised ones. So are LEFTOVERS.
    """

    def __init__(self, model: MoeModel):
        """Raises FormatError or UnsupportedModelError for tensors that are missing, misshapen or in no known form,
        HubError for files that cannot be had."""
        self.model = model
        if is_mcmoe_checkpoint(model.path):
            raise UnsupportedModelError(
                f"{model.path}: this is a checkpoint of `mcmoe quantize` already; start from the 16-bit model that it "
                "was made from. For another pruning rule, without quantising again, there is `mcmoe prune`."
            )
        self.files = TensorFiles(model.folder)
        self.files.info = {name: info for name, info in self.files.info.items() if self._belongs(name)}
        self.weights = model.source_format.weights(self.files.info)
        check_tensors(model, self.weights)
        self._slices = _expert_slices(model, self.weights) if has_fused_experts(model, self.weights) else {}
        fused = {name for name, *_ in self._slices.values()}
        self._names = [name for name in self.weights if name not in fused] + list(self._slices)

    def _belongs(self, name: str) -> bool:
        split = self.model.split_layer_name(name)
        return not name.endswith(LEFTOVERS) and (split is None or split[0] < self.model.num_layers)

    def names(self) -> list[str]:
        return self._names

    def read(self, name: str) -> torch.Tensor:
        source = self.model.source_format
        if name not in self._slices:
            return source.read(self.files, name)
        stacked, expert, rows, transposed = self._slices[name]
        if transposed or rows.step is not None:
            part = source.read(self.files, stacked, (expert,))
            return (part.t() if transposed else part)[rows].contiguous()
        return source.read(self.files, stacked, (expert,), rows)

    def numel(self, name: str) -> int:
        if name not in self._slices:
            return self.weights[name].numel
        return math.prod(self.model.tensor_shape(name))


def _expert_slices(model: MoeModel, weights: Mapping[str, TensorInfo]) -> dict[str, tuple[str, int, slice, bool]]:
    """Of stacked experts: name of one matrix or bias -> the tensor it is in, its expert, its rows, and whether that
    tensor is transposed. One that may be, and whose sizes do not tell, is not: transformers takes it so."""
    slices = {}
    for part in model.family.fused_experts:
        for layer, layer_name in model.moe_layers.items():
            stacked = model.fused_tensor(layer, part)
            always = model.family.fused_transposed == "always"
            transposed = always or weights[stacked].shape != model.fused_shapes(part)[0]
            for expert in range(model.num_experts):
                for projection, rows in zip(model.projections(part), model.projection_rows(part), strict=True):
                    base = model.expert_tensor(layer_name, expert, projection)
                    slices[f"{base}.weight"] = (stacked, expert, rows, transposed)
                    if model.has_biases:
                        slices[f"{base}.{BIAS}"] = (model.fused_bias(layer, part), expert, rows, False)
    return slices
