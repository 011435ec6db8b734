"""The module that holds one layer's experts in the CPU's layout."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

from vllm_mcmoe.kernels.cpu import op as _op  # noqa: F401 -- registers the custom op
from vllm_mcmoe.kernels.cpu.compiled import compile_layer
from vllm_mcmoe.kernels.cpu.isa import select_isa
from vllm_mcmoe.kernels.cpu.layout import ROWS, expert_record, gate_up_row_blocks, matrix_bytes, repack
from vllm_mcmoe.kernels.cpu.vectors import GATES
from vllm_mcmoe.kernels.packing import GROUP_SIZE, WIDTHS, PackedMatrix
from vllm_mcmoe.kernels.reference import check_matrix


class CpuExperts(torch.nn.Module):
    """Experts of mixed bit-widths, repacked for the CPU kernels.

    gate_up, down              uint8 [bytes]       every expert's records, see layout.py
    gate_up_table, down_table  int64 [experts, 2]  bit-width, offset of the expert's first byte
    """

    activations = GATES

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str):
        super().__init__()
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation = activation
        self.activation_index = GATES.index(activation)
        self.isa = select_isa()
        compile_layer(self.isa)

    @classmethod
    def prepare(
        cls,
        gate_up: Iterable[PackedMatrix],
        down: Iterable[PackedMatrix],
        *,
        hidden_size: int,
        intermediate_size: int,
        gate_up_bits: Sequence[int],
        down_bits: Sequence[int],
        activation: str = "silu",
    ) -> Self:
        """Repack, experts side by side on torch's number of threads, and compile.

        gate_up yields [2I, H] matrices, gate rows first, down yields [H, I]. Raises ValueError for an activation, width
        or size the kernels lack, and for a matrix other than announced.
        """
        if activation not in GATES:
            raise ValueError(f"the cpu kernels have no activation {activation!r}; supported: {', '.join(GATES)}")
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if size <= 0 or size % GROUP_SIZE:
                raise ValueError(f"{name} {size} is not a positive multiple of the group size {GROUP_SIZE}")
        experts = cls(hidden_size, intermediate_size, activation)
        experts._fill(
            "gate_up",
            gate_up,
            gate_up_bits,
            (2 * intermediate_size, hidden_size),
            gate_up_row_blocks(intermediate_size),
        )
        down_blocks = torch.arange(hidden_size // ROWS).numpy()
        experts._fill("down", down, down_bits, (hidden_size, intermediate_size), down_blocks)
        return experts

    def _fill(self, name: str, matrices: Iterable[PackedMatrix], bits: Sequence[int], shape, row_blocks) -> None:
        unknown = sorted(set(bits) - set(WIDTHS))
        if unknown:
            raise ValueError(f"{name}: the cpu kernels have no {unknown[0]}-bit matrices; supported: {WIDTHS}")
        sizes = [matrix_bytes(expert_record(width), *shape) for width in bits]
        records = torch.empty(sum(sizes), dtype=torch.uint8)
        offset, iterator = 0, iter(matrices)
        table, repacked = [], []
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for expert, (width, size) in enumerate(zip(bits, sizes, strict=True)):
                matrix = next(iterator, None)
                if matrix is None:
                    raise ValueError(f"{name}: {len(bits)} widths were given, but only {expert} matrices")
                check_matrix(f"{name} of expert {expert}", matrix, width, shape)
                repacked.append(pool.submit(repack, matrix, row_blocks, records[offset : offset + size]))
                table.append((width, offset))
                offset += size
        for future in repacked:
            future.result()
        self.register_buffer(name, records, persistent=False)
        self.register_buffer(f"{name}_table", torch.tensor(table, dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """x: float32, bfloat16 or float16 [T, H]; topk_weights: float [T, J]; topk_ids: int [T, J] -> [T, H] like x."""
        return torch.ops.vllm_mcmoe.cpu_fused_experts(
            x,
            topk_weights,
            topk_ids,
            self.gate_up,
            self.gate_up_table,
            self.down,
            self.down_table,
            self.intermediate_size,
            self.activation_index,
            self.isa,
        )
