"""What a checkpoint weighs: the linears whose widths are to be decided, and the bytes that nothing decides.

    weights = weights_of(model)                       # or, from config.json alone, evaluate/resources.py's
    budget = DecidedBytes.of(description, weights)
    budget.other + experts + sum(group.nbytes(bits, budget.group_size) ...)      # is at least what will be written

Counted are the safetensors files whole: tensors, and headers by an upper bound that is some bytes per tensor too high.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from vllm_mcmoe.calibration.matrix.linears import (
    PACKED_BITS,
    SUFFIXES,
    LinearShape,
    choose_group_size,
    linear_bytes,
    tensor_parallel_sizes,
)
from vllm_mcmoe.calibration.model.description import HEAD_MODULE, MoeModel
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.weight_files import ELEMENT_BYTES
from vllm_mcmoe.checkpoint import BIAS, FORMAT_VERSION, tensor_dtypes
from vllm_mcmoe.kernels.packing import Code

FILE_BYTES = 8 + 8 + len('{"__metadata__":{"format":"pt"}}')  # header's length, its padding, its one fixed entry
EXPERT_SUFFIXES = tuple(tensor_dtypes(Code(2), FORMAT_VERSION))  # those of version 1 are no longer, and no more


@dataclass(frozen=True)
class Weight:
    """shape, and bytes of one element as it is read: two, or four of a model that is stored so."""

    shape: tuple[int, ...]
    element_bytes: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes


Weights = Mapping[str, Weight]  # by on-disk name, experts one by one left out


@dataclass(frozen=True)
class LinearGroup:
    """Linears that share their input. vLLM makes one of them, or of some of them, so that they get one width.

    layer   the decoder layer they are in; None of the output head
    names   on disk, without ".weight"
    shapes  [out, in] of each
    """

    layer: int | None
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    element_bytes: int

    def nbytes(self, bits: int, group_size: int) -> int:
        """In the checkpoint."""
        return sum(linear_bytes(*shape, bits, group_size, self.element_bytes) for shape in self.shapes)


def linear_shapes(description: MoeModel, weights: Weights) -> list[LinearShape]:
    """Of all linears in decoder layers that compressed-tensors may pack."""
    return [shape for group in _layer_groups(description, weights) for shape in _shapes(description, group)]


def can_be_packed(description: MoeModel, group: LinearGroup, group_size: int) -> bool:
    """Those of a group share their inputs, so that all of them can be packed, or none."""
    return _shapes(description, group)[0].can_be_packed(group_size)


def linear_groups(description: MoeModel, weights: Weights) -> list[LinearGroup]:
    """In decoder layers first, in the order of the forward pass; then the output head, where it may be packed."""
    groups = list(_layer_groups(description, weights))
    head = description.family.head
    if description.packs_head and f"{head}.weight" in weights:
        weight = weights[f"{head}.weight"]
        groups.append(LinearGroup(None, (head,), (weight.shape,), weight.element_bytes))
    return groups


def _layer_groups(description: MoeModel, weights: Weights) -> Iterator[LinearGroup]:
    for layer in range(description.num_layers):
        for stage in description.family.linears:
            names = [f"{description.layer_prefix}{layer}.{name}" for name in stage]
            found = [name for name in names if len(_shape(weights, name)) == 2]
            if found:
                element_bytes = weights[f"{found[0]}.weight"].element_bytes
                yield LinearGroup(layer, tuple(found), tuple(_shape(weights, name) for name in found), element_bytes)


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    weight = weights.get(f"{name}.weight")
    return () if weight is None else tuple(weight.shape)


def _shapes(description: MoeModel, group: LinearGroup) -> list[LinearShape]:
    if group.layer is None:
        return [LinearShape(HEAD_MODULE, *group.shapes[0])]  # ranks share its outputs
    ranks = tensor_parallel_sizes(description.config.num_attention_heads)
    relative = [description.split_layer_name(name)[1] for name in group.names]
    return [LinearShape(name, *shape, ranks) for name, shape in zip(relative, group.shapes, strict=True)]


@dataclass(frozen=True)
class DecidedBytes:
    """Of one model's checkpoints.

    groups      linears whose widths are to be decided: those that can be packed
    group_size  of their packed forms
    other       bytes of all that is not decided: embeddings, norms, routers, linears that stay in 16 bits, biases, and
                the headers of the files
    original    bytes of all weights in 16 bits, which percentages are of
    """

    groups: list[LinearGroup]
    group_size: int
    other: int
    original: int

    @classmethod
    def of(cls, description: MoeModel, weights: Weights) -> Self:
        # One group size for all widths: that which makes 4 bits smallest. What a scale adds to 8 is half of that.
        group_size = choose_group_size(linear_shapes(description, weights), min(PACKED_BITS))
        groups = [g for g in linear_groups(description, weights) if can_be_packed(description, g, group_size)]
        decided = sum(group.nbytes(16, group_size) for group in groups)
        layers = len(description.moe_layers)
        biases = layers * description.num_experts * _bias_bytes(description, weights)
        experts = layers * description.num_experts * sum(map(math.prod, description.part_shapes().values()))
        original = 2 * (experts + sum(math.prod(weight.shape) for weight in weights.values())) + biases
        headers = _header_bytes(description, weights, digits=len(str(original)))
        kept = sum(weight.nbytes for weight in weights.values())
        return cls(groups, group_size, kept - decided + biases + headers, original)

    @property
    def head(self) -> str | None:
        """On-disk name of the output head, where its width is to be decided."""
        return next((group.names[0] for group in self.groups if group.layer is None), None)


def decided_bytes(model: LayerwiseModel) -> DecidedBytes:
    return DecidedBytes.of(model.description, weights_of(model))


def weights_of(model: LayerwiseModel) -> dict[str, Weight]:
    """Of all tensors that a checkpoint has, but the routed experts'."""
    in_layers = (name for index in range(model.num_layers) for name in model.layer_tensors(index))
    infos = {
        name: model.source.weights[name]
        for name in (*in_layers, *model.outer_tensors())
        if not model.description.is_expert_tensor(name)
    }
    return {name: Weight(tuple(info.shape), ELEMENT_BYTES[info.dtype]) for name, info in infos.items()}


def _bias_bytes(description: MoeModel, weights: Weights) -> int:
    """Of one expert; as wide as what else the model has."""
    if not description.has_biases:
        return 0
    width = max(weight.element_bytes for weight in weights.values())
    return width * sum(rows for rows, _ in description.part_shapes().values())


def _header_bytes(description: MoeModel, weights: Weights, digits: int) -> int:
    """Of all files, at most. digits: of the largest offset there may be."""
    total = FILE_BYTES * (description.num_layers + 1)
    packed = {f"{name}.weight" for group in linear_groups(description, weights) for name in group.names}
    for name, weight in weights.items():
        base = name.removesuffix("weight")
        names = [f"{base}{suffix}" for suffix in SUFFIXES] if name in packed else [name]
        total += sum(_entry_bytes(name, weight.shape, digits) for name in names)
    suffixes = [*EXPERT_SUFFIXES, *([BIAS] if description.has_biases else [])]
    for layer in description.moe_layers.values():
        for projection in description.all_projections:
            shape = description.projection_shape(projection)
            # ids have as many digits as the largest, at most
            name = description.expert_tensor(layer, description.num_experts - 1, projection)
            entry = sum(_entry_bytes(f"{name}.{suffix}", (*shape, 128), digits) for suffix in suffixes)
            total += entry * description.num_experts
    return total


def _entry_bytes(name: str, shape: tuple[int, ...], digits: int) -> int:
    """Of one tensor in a header."""
    dims = ",".join(map(str, shape))
    return len(f'"{name}":{{"dtype":"BF16","shape":[{dims}],"data_offsets":[,]}},') + 2 * digits
