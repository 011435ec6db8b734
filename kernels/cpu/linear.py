"""The module that holds one linear's weights in the CPU's layout."""

import math
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F

from vllm_mcmoe.kernels.cpu import linear_op as _op  # noqa: F401 -- registers the custom op
from vllm_mcmoe.kernels.cpu.compiled_linear import compile_linear
from vllm_mcmoe.kernels.cpu.isa import select_isa
from vllm_mcmoe.kernels.cpu.layout import ROWS, linear_record, matrix_bytes, write_records

LINEAR_WIDTHS, LINEAR_GROUP_SIZES = (4, 8), (128, 64, 32)

# Scales are stored as float16 times a power of two of the whole matrix, which puts the largest just below this.
_LARGEST_EXPONENT = 15
# That power's inverse must be a normal float32.
_EXPONENTS = (-112, 126)


class CpuLinear(torch.nn.Module):
    """A linear of symmetric integers, repacked for the CPU kernels.

    records  uint8 [bytes], see layout.py
    factor   float32 [1], of the output: undoes the power of two that stored scales were multiplied by. A tensor, since
             a number would be compiled into graphs, which vLLM caches whatever the weights are
    """

    def __init__(self, records: torch.Tensor, factor: torch.Tensor, out_features: int, bits: int, group_size: int):
        super().__init__()
        self.out_features, self.bits, self.group_size = out_features, bits, group_size
        self.isa = select_isa()
        compile_linear(self.isa, bits, group_size)
        self.register_buffer("records", records, persistent=False)
        self.register_buffer("factor", factor, persistent=False)

    @classmethod
    def prepare(cls, packed: torch.Tensor, scales: torch.Tensor, *, bits: int) -> Self:
        """Repack a weight of compressed-tensors' pack-quantized form, and compile.

        packed  int32 [out, in * bits / 32]  code k of a row at bit bits*k of its bytes; code = value + 2^(bits-1)
        scales  float [out, in / group]      rounded to 11 bits of mantissa: exact in float16 and bfloat16, unless more
                                             than 29 binades below the matrix' largest

        Raises ValueError for a width, group size or shape the kernels lack, and for scales that are not finite.
        """
        rows, groups = scales.shape
        group_size = packed.shape[1] * 32 // bits // groups if groups else 0
        check_linear(bits, group_size)
        if packed.shape != (rows, groups * group_size * bits // 32):
            raise ValueError(
                f"packed is {list(packed.shape)} and scales are {[rows, groups]}: no {bits}-bit matrix of whole groups"
            )
        halves, factor = _to_float16(scales)
        missing = -rows % ROWS
        words = F.pad(packed, (0, 0, 0, missing)) if missing else packed.contiguous()
        words = words.numpy().view(np.uint32).reshape(rows + missing, groups, -1)
        record = linear_record(bits, group_size)
        records = torch.zeros(matrix_bytes(record, rows + missing, groups * group_size), dtype=torch.uint8)
        row_blocks = np.arange((rows + missing) // ROWS)
        write_records(record, words, F.pad(halves, (0, 0, 0, missing)), None, row_blocks, records)
        return cls(records, factor, rows, bits, group_size)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: float32, bfloat16 or float16 [..., in]; bias: float [out] -> [..., out] like x."""
        return torch.ops.vllm_mcmoe.cpu_linear(
            x, self.records, self.factor, bias, self.out_features, self.bits, self.group_size, self.isa
        )


def check_linear(bits: int, group_size: int) -> None:
    """Raises ValueError, naming the supported ones, for a width or group size the kernels lack."""
    if bits not in LINEAR_WIDTHS or group_size not in LINEAR_GROUP_SIZES:
        raise ValueError(
            f"the cpu kernels have no linears of {bits} bits in groups of {group_size}; supported: "
            f"{LINEAR_WIDTHS} bits in groups of {LINEAR_GROUP_SIZES}"
        )


def _to_float16(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [out, groups] -> (float16 scales times a power of two, float32 [1] its inverse)."""
    scales = scales.float()
    largest = float(scales.abs().amax()) if scales.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError("scales are not finite")
    if largest == 0.0:
        return scales.half(), torch.ones(1, dtype=torch.float32)
    exponent = min(max(_LARGEST_EXPONENT - math.frexp(largest)[1], _EXPONENTS[0]), _EXPONENTS[1])
    return torch.ldexp(scales, torch.tensor(exponent)).half(), torch.tensor([2.0**-exponent], dtype=torch.float32)
