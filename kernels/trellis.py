"""The trellis code: of each weight one bit takes part in the decoding of four, so that 2 bits choose among 32 levels.

    weight[n, k] = scale[n, g] * (level[n, k] - middle),     g = k // 128

Levels are small integers, which kernels multiply as they do scalar codes. docs/trellis.md explains the code with a
picture, works an example by hand and has what every choice was measured to be worth. This module is its definition.

**A ring** is a block of 32 consecutive columns of a row. Each weight has a code of b bits: one *coded* bit, the
lowest, and b - 1 *uncoded* bits. The coded bits of a ring stand in the order of columns 0, 4, 8, ..., 28, 1, 5, ...,
29, 2, ..., 31, and after the last comes the first again. A weight's *window* is its own coded bit and the next three in
that order, its own the lowest of four. Window + 16 * uncoded bits is the entry of the table at which its level stands.

**Bytes.** Codes of a group are packed in planes as packing.py describes: that of the coded bits first (16 bytes, 4 per
ring), then the uncoded bits as a scalar code of b - 1 bits has them. Slices of rows and of whole groups are slices of
bytes, as they are of scalar codes.
"""

from dataclasses import dataclass
from functools import cache

import torch

from vllm_mcmoe.kernels.packing import (
    TRELLIS_WIDTHS,
    Code,
    PackedMatrix,
    StoredMatrix,
    pack_planes,
    planes,
    unpack_planes,
)

RING = 32  # weights, and bits of the word that kernels rotate
STEP = 4  # columns from one weight of a ring to the next: a quad, which CPU kernels multiply at once
MEMORY = 3  # bits of a window that belong to the weights after

# Levels lie between 0 and this: sums of products fit in AVX2's 16 bits for 4, 2 and 1 quads.
LARGEST_LEVEL = {1: 31, 2: 63, 3: 127, 4: 127}

# The first half of each width's table. Of the others, entry -1 - i (all bits flipped) is the largest level minus that
# of entry i. Found by `python benchmarks/trellis_codes.py --tables`.
_HALF_TABLES: dict[int, tuple[int, ...]] = {
    1: (3, 20, 19, 1, 12, 31, 28, 11),
    2: (9, 23, 26, 11, 18, 28, 29, 19, 24, 1, 13, 25, 28, 17, 20, 30),
    3: (
        23, 39, 38, 19, 32, 44, 44, 31, 38, 2, 14, 38, 44, 29, 30, 43,
        49, 58, 58, 49, 53, 61, 61, 54, 58, 50, 49, 58, 61, 53, 53, 61,
    ),
    4: (
        16, 34, 31, 21, 26, 37, 38, 30, 33, 10, 0, 33, 37, 27, 23, 37,
        40, 46, 46, 40, 43, 48, 48, 43, 46, 41, 40, 45, 48, 43, 43, 48,
        50, 54, 54, 50, 52, 55, 56, 52, 54, 50, 50, 54, 55, 52, 52, 55,
        58, 61, 61, 58, 59, 62, 63, 59, 61, 58, 58, 61, 63, 59, 59, 63,
    ),
}  # fmt: skip


def trellis_planes(bits: int) -> tuple[int, ...]:
    """Bit planes of a width, in file order: that of the coded bits, then those of the uncoded ones. Raises ValueError
    for a width that has no trellis code."""
    if bits not in TRELLIS_WIDTHS:
        raise ValueError(f"bit-width {bits} has no trellis code; {TRELLIS_WIDTHS} have one")
    return (1, *(planes(bits - 1) if bits > 1 else ()))


@cache
def level_table(bits: int) -> torch.Tensor:
    """uint8 [8 * 2**bits], by window + 16 * uncoded bits."""
    half = torch.tensor(_HALF_TABLES[bits], dtype=torch.uint8)
    return torch.cat([half, (LARGEST_LEVEL[bits] - half).flip(0)])


def middle_level(bits: int) -> float:
    """What levels lie around, which kernels take for the zero: 15.5, 31.5, 63.5."""
    return LARGEST_LEVEL[bits] / 2


def ring_columns() -> torch.Tensor:
    """int64 [32]: the columns of a ring, from its first on, in the ring's order."""
    return torch.arange(RING).view(-1, STEP).t().flatten()


def table_entries(codes: torch.Tensor) -> torch.Tensor:
    """codes: uint8 [..., 32 * rings] -> uint8 of the same shape, where each weight's level stands in the table."""
    rings = codes.unflatten(-1, (-1, RING))
    order = ring_columns().to(codes.device)
    coded = (rings & 1)[..., order]
    window = torch.zeros_like(coded)
    for ahead in range(MEMORY + 1):
        window |= coded.roll(-ahead, dims=-1) << ahead
    entries = torch.empty_like(rings)
    entries[..., order] = window
    return (entries | (rings >> 1 << (MEMORY + 1))).flatten(-2)


def codes_of_entries(entries: torch.Tensor) -> torch.Tensor:
    """The inverse of table_entries, element by element: a weight's own code is all in its entry."""
    return (entries >> (MEMORY + 1) << 1) | (entries & 1)


def decode(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels of codes: uint8 [..., 32 * rings] each. The plain form that every kernel has to agree with."""
    return level_table(bits).to(codes.device)[table_entries(codes).long()]


def pack_trellis(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes: uint8 [out, in], each below 2**bits, of whole rings -> uint8 [out, ceil(in/128), 16*bits].

    Raises ValueError for a width that has no trellis code, a code out of range, or a ring that is not whole.
    """
    if codes.shape[-1] % RING:
        raise ValueError(f"{codes.shape[-1]} columns are not whole rings of {RING}")
    return pack_planes(codes, trellis_planes(bits))


def unpack_trellis(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of pack_trellis, except that padding stays: uint8 [out, groups, 16*bits] -> uint8 [out, 128*groups]."""
    return unpack_planes(qweight, trellis_planes(bits))


@dataclass(frozen=True)
class TrellisMatrix(StoredMatrix):
    """One linear map of one expert as a checkpoint stores it: packing.PackedMatrix with trellis codes.

    bits     1, 2, 3 or 4
    qweight  uint8   [out, groups, 16*bits]  see the module's text
    scales   float16 [out, groups]           of one level, > 0

    Where `in` is no multiple of 128, codes of the columns that are missing mean nothing.
    """

    zeros = None  # the middle of the levels, always

    @property
    def code(self) -> Code:
        return Code(self.bits, "trellis")

    def levels(self) -> torch.Tensor:
        return decode(unpack_trellis(self.qweight, self.bits), self.bits)

    def float_zeros(self) -> torch.Tensor:
        return torch.full_like(self.scales, middle_level(self.bits), dtype=torch.float32)


def stored_matrix(
    code: Code, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> StoredMatrix:
    """The matrix of this code. qweight: uint8 [out, groups, 16*bits]; scales and zeros: float16 [out, groups], as
    PackedMatrix and TrellisMatrix say; zeros of scalar codes alone."""
    if code.kind == "trellis":
        return TrellisMatrix(code.bits, qweight, scales)
    return PackedMatrix(code.bits, qweight, scales, zeros)
