"""The checkpoint tensors of one MoE layer while vLLM loads them: parameters, slicing for this rank, completeness.

Kernels compute whole groups of 128. Parameters are therefore as large as whole groups are, and rows that the model does
not have get scale 0, so that their output is exactly 0. Tensor parallelism shares out whole groups of the intermediate
size, unevenly where they do not divide: 1408 = 11 groups over 2 ranks are 5 and 6.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vllm_mcmoe.checkpoint import (
    BIAS,
    EXPONENTS,
    FORMAT_VERSION,
    QWEIGHT,
    SCALES,
    ZEROS,
    matrix_of,
    tensor_dtypes,
    tensor_shape,
)
from vllm_mcmoe.errors import FormatError, UnsupportedModelError
from vllm_mcmoe.kernels.expert_function import SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import (
    GROUP_SIZE,
    Code,
    StoredMatrix,
    group_count,
    packed_bytes_per_group,
    padded,
)


# Parameters that hold nothing and take one tensor of the checkpoint each, for vLLM's models that load experts by a
# table of names in which ours are not: exact_name says what such a tensor has to be called.
def exact_name(expert: int | str, projection: str, suffix: str) -> str:
    """Of the parameter that takes the tensor `experts.{expert}.{projection}.{suffix}`."""
    return f"mcmoe_{expert}_{projection}_{suffix}"


# Every tensor that a matrix may have, whatever the version.
PARAMETERS = (QWEIGHT, SCALES, ZEROS, EXPONENTS)
TORCH_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16}

# vLLM's names: w1 is gate, w3 is up, both stacked in the parameters called w13; w2 is down. Where experts have no gate,
# up is w1.
GATE, UP, DOWN = "w1", "w3", "w2"
PROJECTIONS = {"gate_proj": GATE, "up_proj": UP, "down_proj": DOWN}
WITHOUT_GATE = {"up_proj": GATE, "down_proj": DOWN}


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

    def groups(self, intermediate_size: int) -> range:
        """This rank's groups of the whole layer's intermediate size; ranks differ by one at most."""
        count = group_count(intermediate_size)
        first, end = (count * rank // self.tp_size for rank in (self.tp_rank, self.tp_rank + 1))
        return range(first, end)


class ProjectionWeights(nn.Module):
    """One projection of every local expert in checkpoint layout; experts differ in their codes.

    codes      per local expert
    version    of the format
    qweight    uint8 flat, experts one after the other, each [rows, groups, 16*bits]
    scales     float16, from version 2 on uint8 [experts, rows, groups]
    zeros      float16 [experts, rows, groups] in version 1, unused at 1 bit; empty in later ones
    exponents  int8 [experts, rows] from version 2 on; empty in version 1

    All are empty before `allocate` and after `release`. Rows are whole groups; those the model lacks get scale 0, which
    matrices() sees to.
    """

    def __init__(self, codes: Sequence[Code], version: int, rows: int, groups: int, padding: Sequence[slice]):
        """padding: the rows that no tensor of the checkpoint fills."""
        super().__init__()
        self.codes, self.version = tuple(codes), version
        self.rows, self.groups, self.padding = rows, groups, padding
        self.sizes = [rows * groups * packed_bytes_per_group(code.bits) for code in codes]
        self.allocated = False
        self.qweight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        scales = torch.float16 if version == 1 else torch.uint8
        self.scales = nn.Parameter(torch.empty(0, dtype=scales), requires_grad=False)
        self.zeros = nn.Parameter(torch.empty(0, dtype=torch.float16), requires_grad=False)
        self.exponents = nn.Parameter(torch.empty(0, dtype=torch.int8), requires_grad=False)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Suffix -> parameter."""
        return {suffix: getattr(self, suffix) for suffix in PARAMETERS}

    def allocate(self) -> None:
        """Memory for the tensors that the format's version has."""
        experts, groups = len(self.codes), (self.rows, self.groups)
        shapes = {QWEIGHT: (sum(self.sizes),), SCALES: (experts, *groups)}
        shapes |= {ZEROS: (experts, *groups)} if self.version == 1 else {EXPONENTS: (experts, self.rows)}
        for suffix, shape in shapes.items():
            parameter = getattr(self, suffix)
            parameter.data = parameter.data.new_empty(shape)
        self.exponents.data.zero_()  # vLLM's dummy weights leave integers as they are
        self.allocated = True

    def release(self) -> None:
        """Give the memory back at once."""
        for parameter in self.tensors().values():
            parameter.data = parameter.data.new_empty(0)
        self.allocated = False

    def view(self, expert: int, suffix: str) -> torch.Tensor:
        """The destination of one checkpoint tensor: [rows, groups, 16*bits], [rows, groups] or [rows]."""
        if suffix != QWEIGHT:
            return getattr(self, suffix).data[expert]
        flat = self.qweight.data.narrow(0, sum(self.sizes[:expert]), self.sizes[expert])
        return flat.view(self.rows, self.groups, -1)

    def matrices(self) -> Iterator[StoredMatrix]:
        for expert, code in enumerate(self.codes):
            tensors = {suffix: self.view(expert, suffix) for suffix in tensor_dtypes(code, self.version)}
            for rows in self.padding:
                for tensor in tensors.values():
                    tensor[rows] = 0
            matrix = matrix_of(code, self.version, tensors.__getitem__)
            for rows in self.padding:
                matrix.scales[rows] = 0
            yield matrix


class LayerWeights:
    """Both projections of a layer, what has been loaded of them, and the loaders vLLM calls.

    hidden_size, intermediate_size   of this rank's kernels: whole groups
    function                         what the experts compute between their projections
    gate_up                          [2*intermediate_size, hidden_size], gate rows first; without a gate, half of it
    down                             [hidden_size, intermediate_size]
    gate_up_bias, down_bias          float32 [experts, rows of the two], 0 in padding; None where experts have none. Of
                                     the ranks that share experts, the first one has down's
    intermediate_groups              this rank's groups of the whole layer's intermediate size
    loading_seconds                  spent on copying tensors so far
    finished                         the kernels have them: what comes now is a reload, which cannot reach them
    on_complete                      called once, when the last tensor has been loaded; set by whoever wants the tensors

    Where nobody wants them, tensors are checked and noted, but not read. Memory is there from the first that comes, or
    from `allocate`, until `release`: of the layers of a model, few are in it at a time.
    """

    def __init__(
        self,
        layer_name: str,
        shard: Shard,
        gate_up_codes: Sequence[Code],
        down_codes: Sequence[Code],
        model_hidden_size: int,
        model_intermediate_size: int,
        function: ExpertFunction = SILU,
        has_bias: bool = False,
        version: int = FORMAT_VERSION,
    ):
        """model_hidden_size, model_intermediate_size: of the whole layer, over all ranks, as config.json has them."""
        self.layer_name = layer_name
        self.shard = shard
        self.function = function
        self.version = version
        self._model_shape = {
            GATE: (model_intermediate_size, group_count(model_hidden_size)),
            DOWN: (model_hidden_size, group_count(model_intermediate_size)),
        }
        self.intermediate_groups = groups = shard.groups(model_intermediate_size)
        rows = range(groups.start * GROUP_SIZE, min(groups.stop * GROUP_SIZE, model_intermediate_size))
        self._part = {GATE: (rows, range(group_count(model_hidden_size))), DOWN: (range(model_hidden_size), groups)}
        self.hidden_size, self.intermediate_size = padded(model_hidden_size), len(groups) * GROUP_SIZE
        first_rows = [part * self.intermediate_size for part in range(function.factor)]  # of gate and up, or of up
        self.gate_up = ProjectionWeights(
            gate_up_codes,
            version,
            function.factor * self.intermediate_size,
            self.hidden_size // GROUP_SIZE,
            padding=[slice(first + len(rows), first + self.intermediate_size) for first in first_rows],
        )
        self.down = ProjectionWeights(
            down_codes, version, self.hidden_size, len(groups), padding=[slice(model_hidden_size, self.hidden_size)]
        )
        self.gate_up_bias = self.down_bias = None
        if has_bias:
            self.gate_up_bias = torch.zeros(len(shard.expert_ids), self.gate_up.rows, dtype=torch.float32)
            if shard.tp_rank == 0:
                self.down_bias = torch.zeros(len(shard.expert_ids), self.hidden_size, dtype=torch.float32)
        self._projections = PROJECTIONS if function.gated else WITHOUT_GATE
        self._biases = (BIAS,) if has_bias else ()
        self._tensors = [
            (expert, shard_id, suffix)
            for expert in range(len(shard.expert_ids))
            for shard_id in self._projections.values()
            for suffix in self._suffixes((self.down if shard_id == DOWN else self.gate_up).codes[expert])
        ]
        self._missing = set(self._tensors)
        self.loading_seconds = 0.0
        self.finished = False
        self.on_complete: Callable[[], None] | None = None

    def _suffixes(self, code: Code) -> tuple[str, ...]:
        return (*tensor_dtypes(code, self.version), *self._biases)

    @property
    def stored_zeros(self) -> bool:
        """Whether matrices of scalar codes of more than 1 bit have zeros."""
        return self.version == 1

    @property
    def device(self) -> torch.device:
        """Where vLLM wants the layer."""
        return self.gate_up.qweight.device

    def allocate(self) -> None:
        """Memory for every parameter."""
        self.gate_up.allocate()
        self.down.allocate()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters as vLLM's checkpoint mapping expects them: w13_qweight, ..., w2_zeros, w2_bias."""
        for prefix, projection in (("w13", self.gate_up), ("w2", self.down)):
            for suffix, parameter in projection.tensors().items():
                parameter.weight_loader = self._loader(suffix)
                yield f"{prefix}_{suffix}", parameter
            for suffix in self._biases:
                yield f"{prefix}_{suffix}", self._placeholder(suffix)

    def _placeholder(self, suffix: str) -> nn.Parameter:
        """Takes tensors of the checkpoint and holds nothing."""
        parameter = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        parameter.weight_loader = self._loader(suffix)
        return parameter

    def exact_parameters(self, num_experts: int) -> Iterator[tuple[str, nn.Parameter]]:
        """A parameter for every tensor of the layer's experts, under its exact_name; num_experts: of all ranks."""
        for expert in range(num_experts):
            for projection, shard_id in self._projections.items():
                for suffix in (*PARAMETERS, *self._biases):
                    parameter = self._placeholder(suffix)
                    parameter.weight_loader = partial(
                        parameter.weight_loader, weight_name="", shard_id=shard_id, expert_id=expert
                    )
                    yield exact_name(expert, projection, suffix), parameter

    def release(self) -> None:
        """Give back the parameters' memory at once.

        They refer to their loaders and those to this object: a cycle, which Python's collector may find late or, as
        vLLM freezes what is there when a model has been loaded, never.
        """
        self.gate_up.release()
        self.down.release()

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
        if self.finished:
            raise UnsupportedModelError(
                f"{where}: the experts of a running engine cannot be loaded again (reload_weights): the kernels have "
                "them in another layout. Quantise the new weights and start another engine."
            )
        projection = self.down if shard_id == DOWN else self.gate_up
        code = projection.codes[expert]
        if suffix not in self._suffixes(code) or shard_id not in self._projections.values():
            raise FormatError(f"{where}: present in the checkpoint, but a matrix of {code} has none.")
        which = DOWN if shard_id == DOWN else GATE
        (rows, groups), first = self._part[which], self.intermediate_size if shard_id == UP else 0
        if suffix == BIAS:
            dtype, expected = loaded.dtype, [self._model_shape[which][0]]
        else:
            dtype = TORCH_DTYPES[tensor_dtypes(code, self.version)[suffix]]
            expected = list(tensor_shape(suffix, code, *self._model_shape[which]))
        if list(loaded.shape) != expected or loaded.dtype != dtype:
            raise FormatError(
                f"{where}: found {loaded.dtype} {list(loaded.shape)}, expected {dtype} {expected} for "
                f"{code}. config.json and the safetensors files do not belong together, or a file is damaged."
            )
        if (expert, shard_id, suffix) not in self._missing:
            raise FormatError(
                f"{where}: comes twice. Two safetensors files of the checkpoint have it; one of them is left over from "
                "another download or quantisation."
            )
        if self.on_complete is not None and not projection.allocated:
            self.allocate()
        if suffix == BIAS:
            self._load_bias(where, loaded, shard_id, expert, rows, first)
        elif projection.allocated:
            start = time.perf_counter()
            target = projection.view(expert, suffix)[first : first + len(rows)]
            # Both slices are views, of a file mapped into memory: only what this rank keeps is read.
            part = loaded[rows.start : rows.stop]
            if suffix != EXPONENTS:
                part = part[:, groups.start : groups.stop]
            if part.is_floating_point() and not part.isfinite().all():
                raise FormatError(f"{where}: has NaN or infinite values; its file is damaged.")
            target.copy_(part)
            self.loading_seconds += time.perf_counter() - start
        self._missing.discard((expert, shard_id, suffix))
        if self.on_complete is not None and not self._missing:
            on_complete, self.on_complete = self.on_complete, None
            on_complete()

    def _load_bias(self, where: str, loaded: torch.Tensor, shard_id: str, expert: int, rows: range, first: int) -> None:
        """Read whether or not matrices are: nothing else keeps biases."""
        if not loaded.isfinite().all():
            raise FormatError(f"{where}: has NaN or infinite values; its file is damaged.")
        if shard_id != DOWN:
            self.gate_up_bias[expert, first : first + len(rows)] = loaded[rows.start : rows.stop]
        elif self.down_bias is not None:
            self.down_bias[expert, : len(rows)] = loaded

    def check_complete(self) -> None:
        """Raises FormatError naming the tensors the checkpoint lacked."""
        missing = [
            f"expert {self.shard.expert_ids[expert]} {shard_id} {suffix}"
            for expert, shard_id, suffix in self._tensors
            if (expert, shard_id, suffix) in self._missing
        ]
        if missing:
            raise FormatError(
                f"{self.layer_name}: {len(missing)} tensors are missing from the checkpoint: "
                f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''} "
                f"(w1 gate, w3 up, w2 down). The download or the quantisation is incomplete."
            )
