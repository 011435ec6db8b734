"""The checkpoint tensors of one MoE layer while vLLM loads them: parameters, slicing for this rank, completeness."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm_mcmoe.checkpoint import QWEIGHT, SCALES, ZEROS, tensor_suffixes
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import GROUP_SIZE, PackedMatrix, packed_bytes_per_group

# vLLM's names: w1 is gate, w3 is up, both stacked in the parameters called w13; w2 is down.
GATE, UP, DOWN = "w1", "w3", "w2"


@dataclass(frozen=True)
class Shard:
    """The part of the layer this rank holds.

    expert_ids    global id of every local expert, in local order
    tp_rank       which slice of the intermediate size, tp_size how many there are
    """

    expert_ids: tuple[int, ...]
    tp_rank: int
    tp_size: int

    def local_expert(self, global_id: int) -> int | None:
        return self.expert_ids.index(global_id) if global_id in self.expert_ids else None


class ProjectionWeights(nn.Module):
    """One projection of every local expert in checkpoint layout; experts differ in width.

    bits     width per local expert
    qweight  uint8   flat, experts one after the other, each [rows, groups, 16*bits]
    scales   float16 [experts, rows, groups]
    zeros    float16 [experts, rows, groups], unused where bits is 1
    """

    def __init__(self, bits: Sequence[int], rows: int, groups: int):
        super().__init__()
        self.bits = tuple(bits)
        self.rows, self.groups = rows, groups
        self.sizes = [rows * groups * packed_bytes_per_group(width) for width in bits]
        self.qweight = _parameter((sum(self.sizes),), torch.uint8)
        self.scales = _parameter((len(bits), rows, groups), torch.float16)
        self.zeros = _parameter((len(bits), rows, groups), torch.float16)

    def view(self, expert: int, suffix: str) -> torch.Tensor:
        """The destination of one checkpoint tensor: [rows, groups, 16*bits] or [rows, groups]."""
        if suffix != QWEIGHT:
            return getattr(self, suffix).data[expert]
        flat = self.qweight.data.narrow(0, sum(self.sizes[:expert]), self.sizes[expert])
        return flat.view(self.rows, self.groups, -1)

    def matrices(self) -> Iterator[PackedMatrix]:
        for expert, bits in enumerate(self.bits):
            zeros = None if bits == 1 else self.view(expert, ZEROS)
            yield PackedMatrix(bits, self.view(expert, QWEIGHT), self.view(expert, SCALES), zeros)


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class LayerWeights:
    """Both projections of a layer, what has been loaded of them, and the loaders vLLM calls.

    gate_up [2*intermediate, hidden], gate rows first; down [hidden, intermediate]; intermediate is this rank's.
    """

    def __init__(
        self,
        layer_name: str,
        shard: Shard,
        gate_up_bits: Sequence[int],
        down_bits: Sequence[int],
        hidden_size: int,
        intermediate_size: int,
    ):
        self.layer_name = layer_name
        self.shard = shard
        self.gate_up = ProjectionWeights(gate_up_bits, 2 * intermediate_size, hidden_size // GROUP_SIZE)
        self.down = ProjectionWeights(down_bits, hidden_size, intermediate_size // GROUP_SIZE)
        self._loaded: set[tuple[int, str, str]] = set()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters as vLLM's checkpoint mapping expects them: w13_qweight, ..., w2_zeros."""
        for prefix, projection in (("w13", self.gate_up), ("w2", self.down)):
            for suffix in (QWEIGHT, SCALES, ZEROS):
                parameter = getattr(projection, suffix)
                parameter.weight_loader = self._loader(suffix)
                yield f"{prefix}_{suffix}", parameter

    def _loader(self, suffix: str) -> Callable:
        def load(
            param: nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            expert = self.shard.local_expert(expert_id)
            if expert is not None:
                self._load(loaded_weight, suffix, shard_id, expert, expert_id)
            return expert is not None if return_success else None

        return load

    def _load(self, loaded: torch.Tensor, suffix: str, shard_id: str, expert: int, global_id: int) -> None:
        where = f"{self.layer_name}, expert {global_id}, {shard_id} {suffix}"
        projection = self.down if shard_id == DOWN else self.gate_up
        bits = projection.bits[expert]
        if suffix not in tensor_suffixes(bits):
            raise FormatError(f"{where}: present in the checkpoint, but a {bits}-bit matrix has none.")
        target = projection.view(expert, suffix)
        axis = 1 if shard_id == DOWN else 0  # tensor parallelism slices whole groups of down, rows of gate and up
        if shard_id != DOWN:
            half = target.shape[0] // 2
            target = target.narrow(0, 0 if shard_id == GATE else half, half)
        size = target.shape[axis]
        expected = list(target.shape)
        expected[axis] = size * self.shard.tp_size
        if list(loaded.shape) != expected or loaded.dtype != target.dtype:
            raise FormatError(
                f"{where}: found {loaded.dtype} {list(loaded.shape)}, expected {target.dtype} {expected} for "
                f"{bits} bits. config.json and the safetensors files do not belong together, or a file is damaged."
            )
        target.copy_(loaded.narrow(axis, size * self.shard.tp_rank, size))
        self._loaded.add((expert, shard_id, suffix))

    def check_complete(self) -> None:
        """Raises FormatError naming the tensors the checkpoint lacked."""
        missing = [
            f"expert {self.shard.expert_ids[expert]} {shard_id} {suffix}"
            for expert in range(len(self.shard.expert_ids))
            for shard_id in (GATE, UP, DOWN)
            for suffix in tensor_suffixes((self.down if shard_id == DOWN else self.gate_up).bits[expert])
            if (expert, shard_id, suffix) not in self._loaded
        ]
        if missing:
            raise FormatError(
                f"{self.layer_name}: {len(missing)} tensors are missing from the checkpoint: "
                f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''} "
                f"(w1 gate, w3 up, w2 down). The download or the quantisation is incomplete."
            )
