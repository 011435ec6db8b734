"""The module that holds one layer's experts in the CPU's layout."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from vllm_mcmoe.kernels.cpu import op as _op  # noqa: F401 -- registers the custom op
from vllm_mcmoe.kernels.cpu.compiled import compile_layer
from vllm_mcmoe.kernels.cpu.isa import has_vbmi, select_isa
from vllm_mcmoe.kernels.cpu.layout import ROWS, expert_record, family_of, gate_up_row_blocks, matrix_bytes, repack
from vllm_mcmoe.kernels.cpu.records_file import PrivateRecords, RecordsWriter, map_records
from vllm_mcmoe.kernels.cpu.threads import thread_pool
from vllm_mcmoe.kernels.cpu.vectors import function_code
from vllm_mcmoe.kernels.expert_function import SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import CODES, GROUP_SIZE, Code, StoredMatrix
from vllm_mcmoe.kernels.reference import check_matrix, local_ids


def record_sizes(
    hidden_size: int,
    intermediate_size: int,
    gate_up_codes: Sequence[Code],
    down_codes: Sequence[Code],
    factor: int,
    stored_zeros: bool = True,
) -> dict[str, list[int]]:
    """Bytes of every expert's records, by buffer. factor: of the experts' function."""
    shapes = {
        "gate_up": (gate_up_codes, factor * intermediate_size, hidden_size),
        "down": (down_codes, hidden_size, intermediate_size),
    }
    return {
        name: [matrix_bytes(expert_record(code, stored_zeros), rows, columns) for code in codes]
        for name, (codes, rows, columns) in shapes.items()
    }


class CpuExperts(torch.nn.Module):
    """Experts of mixed bit-widths, repacked for the CPU kernels.

    gate_up, down              uint8 [bytes]       every expert's records, see layout.py
    gate_up_table, down_table  int64 [experts, 3]  number of its code, offset of its first byte, bytes of a record
    gate_up_bias, down_bias    float32 [experts, rows], gate_up's in the order of its row blocks; None without biases
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        function: ExpertFunction,
        codes: Collection[Code],
        stored_zeros: bool,
    ):
        """codes: of all matrices."""
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if size <= 0 or size % GROUP_SIZE:
                raise ValueError(f"{name} {size} is not a positive multiple of the group size {GROUP_SIZE}")
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.function, self.function_code = function, function_code(function)
        limit = float("inf") if function.limit is None else function.limit
        parameters = torch.tensor([limit, function.alpha, function.beta], dtype=torch.float32)
        self.register_buffer("function_parameters", parameters, persistent=False)
        self.register_buffer("gate_up_bias", None, persistent=False)
        self.register_buffer("down_bias", None, persistent=False)
        self.isa, self.stored_zeros = select_isa(), stored_zeros
        vbmi = has_vbmi(self.isa)
        self.families = sorted({family_of(code, stored_zeros, vbmi) for code in codes})
        compile_layer(self.isa, tuple(self.families))

    @classmethod
    def prepare(
        cls,
        gate_up: Iterable[StoredMatrix],
        down: Iterable[StoredMatrix],
        *,
        hidden_size: int,
        intermediate_size: int,
        gate_up_codes: Sequence[Code],
        down_codes: Sequence[Code],
        function: ExpertFunction = SILU,
        stored_zeros: bool = True,
        device: torch.device | str = "cpu",
        file: Path | None = None,
        key: Mapping[str, Any] | None = None,
    ) -> Self:
        """Repack, experts side by side on torch's number of threads, and compile.

        gate_up yields [2I, H] matrices, gate rows first, or [I, H] for a function without a gate; down yields [H, I].
        stored_zeros: whether those of more than 1 bit have zeros. Raises ValueError for a code, size or device the
        kernels lack, and for a matrix other than announced.

        With `file` the records are written there and mapped from there, for `from_file` to find under the same key (see
        records_file.py). Raises OSError where that fails; nothing is left of the file then.
        """
        if torch.device(device).type != "cpu":
            raise ValueError(f"the cpu kernels run on CPUs, not on {device}")
        for name, codes in (("gate_up", gate_up_codes), ("down", down_codes)):
            unknown = sorted(set(codes) - set(CODES))
            if unknown:
                supported = ", ".join(map(str, CODES))
                raise ValueError(f"{name}: the cpu kernels have no matrices of {unknown[0]}; supported: {supported}")
        experts = cls(hidden_size, intermediate_size, function, {*gate_up_codes, *down_codes}, stored_zeros)
        sizes = record_sizes(hidden_size, intermediate_size, gate_up_codes, down_codes, function.factor, stored_zeros)
        gate_up_shape, down_shape = (function.factor * intermediate_size, hidden_size), (hidden_size, intermediate_size)
        gate_up_blocks = gate_up_row_blocks(intermediate_size, function.factor)
        down_blocks = torch.arange(hidden_size // ROWS).numpy()
        with PrivateRecords(sizes) if file is None else RecordsWriter(file, key or {}, sizes) as records:
            _fill(records, "gate_up", gate_up, gate_up_codes, stored_zeros, gate_up_shape, gate_up_blocks)
            _fill(records, "down", down, down_codes, stored_zeros, down_shape, down_blocks)
            experts._hold(records.publish(), {"gate_up": gate_up_codes, "down": down_codes}, sizes)
        return experts

    @classmethod
    def from_file(
        cls,
        file: Path,
        key: Mapping[str, Any],
        *,
        hidden_size: int,
        intermediate_size: int,
        gate_up_codes: Sequence[Code],
        down_codes: Sequence[Code],
        function: ExpertFunction = SILU,
        stored_zeros: bool = True,
    ) -> Self:
        """What `prepare` with this file and key gave, mapped read-only, its checksums compared; and compile.

        Raises OSError where the file cannot be read, RecordsError where it is damaged or of another key.
        """
        experts = cls(hidden_size, intermediate_size, function, {*gate_up_codes, *down_codes}, stored_zeros)
        sizes = record_sizes(hidden_size, intermediate_size, gate_up_codes, down_codes, function.factor, stored_zeros)
        experts._hold(map_records(file, key, sizes), {"gate_up": gate_up_codes, "down": down_codes}, sizes)
        return experts

    def _hold(
        self, buffers: Mapping[str, torch.Tensor], codes: Mapping[str, Sequence[Code]], sizes: Mapping[str, list[int]]
    ) -> None:
        for name, records in buffers.items():
            offsets = [0, *itertools.accumulate(sizes[name])][:-1]
            numbers = [code.number for code in codes[name]]
            record_bytes = [expert_record(code, self.stored_zeros).nbytes for code in codes[name]]
            table = torch.tensor(list(zip(numbers, offsets, record_bytes, strict=True)), dtype=torch.int64)
            self.register_buffer(name, records, persistent=False)
            self.register_buffer(f"{name}_table", table, persistent=False)

    def set_biases(self, gate_up: torch.Tensor, down: torch.Tensor | None) -> None:
        """gate_up: float32 [E, 2I or I], gate first; down: float32 [E, H], None where another rank adds it."""
        blocks = torch.from_numpy(gate_up_row_blocks(self.intermediate_size, self.function.factor))
        self.gate_up_bias = gate_up.unflatten(1, (-1, ROWS))[:, blocks].flatten(1).contiguous()
        self.down_bias = None if down is None else down.contiguous()

    def forward(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: float32, bfloat16 or float16 [T, H]; topk_weights: float [T, J]; topk_ids: int [T, J], of experts here or,
        with a map, of all of them -> [T, H] like x."""
        topk_ids = local_ids(topk_ids, expert_map)
        return torch.ops.vllm_mcmoe.cpu_fused_experts(*self.arguments(x, topk_weights, topk_ids))

    def arguments(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> tuple:
        """What the custom op takes for these tokens; the ids are of experts here."""
        return (
            x,
            topk_weights,
            topk_ids,
            self.gate_up,
            self.gate_up_table,
            self.down,
            self.down_table,
            self.gate_up_bias,
            self.down_bias,
            self.intermediate_size,
            self.function_code,
            self.function_parameters,
            self.isa,
            self.families,
        )


def _fill(
    records: PrivateRecords | RecordsWriter,
    name: str,
    matrices: Iterable[StoredMatrix],
    codes: Sequence[Code],
    stored_zeros: bool,
    shape: tuple[int, int],
    row_blocks: np.ndarray,
) -> None:
    """Repack the matrices of one buffer."""

    def repack_one(index: int, matrix: StoredMatrix) -> None:
        repack(matrix, row_blocks, records.matrix(name, index))
        records.filled(name, index)

    iterator, repacked = iter(matrices), []
    with thread_pool() as pool:
        for index, code in enumerate(codes):
            matrix = next(iterator, None)
            if matrix is None:
                raise ValueError(f"{name}: {len(codes)} codes were given, but only {index} matrices")
            check_matrix(f"{name} of expert {index}", matrix, code, shape, stored_zeros)
            repacked.append(pool.submit(repack_one, index, matrix))
    for future in repacked:
        future.result()
