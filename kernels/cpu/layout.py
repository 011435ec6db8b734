"""The CPU's layout of weights: one stream of records per matrix, read front to back exactly once.

A record is one group of G inputs of 16 output rows ("a row block"); G is 128 in experts, 128, 64 or 32 in linears:

    2 * G * bits bytes  codes, plane by plane; a plane of b bits is G*b/32 vectors of 64 bytes. A vector has one 32-bit
                        lane per row; the lane's byte j holds, at bit b*s, the code of input 4*q + j of the group, where
                        q = vector * (8/b) + s numbers the quads (4 consecutive inputs)
    32 bytes            scales, float16, one per row
    32 bytes            zeros, float16, one per row; absent where all zeros are the same: the middle of the codes in
                        experts of 1 bit and of checkpoints that store no zeros, that of the levels where codes are
                        trellis codes, 2^(bits-1) in linears

Shifting a vector by b*s and masking gives one quad of 16 rows: the operand of VNNI's dot product, and one row of an AMX
tile. Of a trellis code a lane of the coded plane is a ring, and rotated by s has the windows of quad s in its bytes.

Inside a row block records follow in the order of groups. Row blocks follow in output order; gate_up alternates 8 blocks
(128 rows) of gate with the 8 of up that they multiply, where experts have a gate.

Every instruction set shares this layout. Records are kept on disk under LAYOUT_VERSION: whoever changes them raises it.
"""

from dataclasses import dataclass
from functools import cache

import numba
import numpy as np
import torch

from vllm_mcmoe.kernels.packing import GROUP_SIZE, TRELLIS_WIDTHS, WIDTHS, Code, StoredMatrix, middle_zero, planes
from vllm_mcmoe.kernels.trellis import middle_level, trellis_planes

LAYOUT_VERSION = 2
ROWS = 16  # 32-bit lanes of an AVX-512 vector, columns of an AMX tile
ALIGNMENT = 64  # one cache line, one vector


def code_bytes(bits: int, group_size: int = GROUP_SIZE) -> int:
    """Bytes of the codes of one group of 16 rows. Also called by compiled code, as `code_bytes_compiled`."""
    return group_size * ROWS // 8 * bits


code_bytes_compiled = numba.njit(code_bytes)


@dataclass(frozen=True)
class Record:
    """What compiled code knows of a matrix beforehand.

    code, group_size  of its weights
    zero              the zero of every group, in units of codes or levels; None where records store zeros
    """

    code: Code
    group_size: int = GROUP_SIZE
    zero: float | None = None

    @property
    def bits(self) -> int:
        return self.code.bits

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane, in their order."""
        return planes(self.bits) if self.code.kind == "scalar" else trellis_planes(self.bits)

    @property
    def code_bytes(self) -> int:
        return code_bytes(self.bits, self.group_size)

    @property
    def nbytes(self) -> int:
        return self.code_bytes + 2 * ROWS * (2 if self.zero is None else 1)


def expert_record(code: Code, stored_zeros: bool) -> Record:
    """stored_zeros: whether the checkpoint has zeros of scalar codes of more than 1 bit."""
    if code.has_zeros(stored_zeros):
        return Record(code)
    return Record(code, zero=middle_zero(code.bits) if code.kind == "scalar" else middle_level(code.bits))


def linear_record(bits: int, group_size: int) -> Record:
    return Record(Code(bits), group_size, zero=float(1 << (bits - 1)))


# Records of experts that one compiled function multiplies, which learns an expert's code at run time: a constant of it.
# Trellis codes are looked up in 64 entries at once where the CPU has VBMI, in 16 elsewhere.
SCALAR, SCALAR_WITH_ZEROS, TRELLIS, TRELLIS_VBMI = range(4)


def family_of(code: Code, stored_zeros: bool, vbmi: bool) -> int:
    """Of a matrix of this code. stored_zeros: as of expert_record; vbmi: whether compiled code may have its
    instructions."""
    if code.kind == "trellis":
        return TRELLIS_VBMI if vbmi else TRELLIS
    return SCALAR_WITH_ZEROS if stored_zeros else SCALAR


def family_records(family: int) -> tuple[Record, ...]:
    if family in (TRELLIS, TRELLIS_VBMI):
        return tuple(expert_record(Code(bits, "trellis"), stored_zeros=False) for bits in TRELLIS_WIDTHS)
    return tuple(expert_record(Code(bits), stored_zeros=family == SCALAR_WITH_ZEROS) for bits in WIDTHS)


@numba.njit
def record_bytes_compiled(family, bits):
    """nbytes of a family's record in compiled code, which learns an expert's width at run time."""
    return code_bytes_compiled(bits) + 2 * ROWS * (2 if family == SCALAR_WITH_ZEROS and bits > 1 else 1)


middle_zero_compiled = numba.njit(middle_zero)
_MIDDLE_LEVELS = (0.0, *map(middle_level, TRELLIS_WIDTHS))


@numba.njit
def constant_zero_compiled(family, bits):
    """zero of a family's record that stores none, in compiled code."""
    if family >= TRELLIS:
        return _MIDDLE_LEVELS[bits]
    return middle_zero_compiled(bits)


@numba.njit
def linear_record_bytes_compiled(bits, group_size):
    """linear_record(bits, group_size).nbytes in compiled code."""
    return code_bytes_compiled(bits, group_size) + 2 * ROWS


def matrix_bytes(record: Record, out_features: int, in_features: int) -> int:
    """Bytes of one matrix of whole row blocks and groups, rounded up to whole cache lines."""
    exact = out_features // ROWS * (in_features // record.group_size) * record.nbytes
    return -(-exact // ALIGNMENT) * ALIGNMENT


def gate_up_row_blocks(intermediate_size: int, factor: int) -> np.ndarray:
    """Order in which the row blocks of a [factor * I, H] gate_up matrix are stored: int64 [factor * I/16]."""
    blocks = np.arange(factor * intermediate_size // ROWS).reshape(factor, -1, GROUP_SIZE // ROWS)
    return np.ascontiguousarray(blocks.transpose(1, 0, 2)).reshape(-1)


@cache
def _plane_mover(bits: int):
    """A compiled function that moves a plane of so many bits: constants, so that LLVM unrolls the loops over fields.

    words: [rows, groups, words of a group] of the checkpoint, whose word `start` is the plane's first of `vectors`;
    out: [row blocks, groups, vectors of a group, 16], likewise. Code 4*s + j of a word, at bit bits*(4*s + j), goes to
    bit 8*j + bits*s.
    """
    fields, mask = 8 // bits, np.uint32((1 << bits) - 1)

    @numba.njit("void(uint32[:,:,::1], int64[::1], int64, int64, uint32[:,:,:,::1])", nogil=True, cache=True)
    def move(words, row_blocks, start, vectors, out):
        for block in range(row_blocks.shape[0]):
            first_row = row_blocks[block] * ROWS
            for group in range(out.shape[1]):
                for vector in range(start, start + vectors):
                    for row in range(ROWS):
                        word = words[first_row + row, group, vector]
                        lane = np.uint32(0)
                        for s in range(fields):
                            for j in range(4):
                                lane |= ((word >> np.uint32(bits * (4 * s + j))) & mask) << np.uint32(8 * j + bits * s)
                        out[block, group, vector, row] = lane

    return move


def repack(matrix: StoredMatrix, row_blocks: np.ndarray, out: torch.Tensor) -> None:
    """Write an expert's matrix into `out`, uint8 [matrix_bytes], its row blocks in the given order."""
    words = matrix.qweight.contiguous().numpy().view(np.uint32)
    write_records(
        expert_record(matrix.code, matrix.zeros is not None), words, matrix.scales, matrix.zeros, row_blocks, out
    )


def write_records(
    record: Record,
    words: np.ndarray,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    row_blocks: np.ndarray,
    out: torch.Tensor,
) -> None:
    """The records of a matrix of whole row blocks.

    words          uint32 [rows, groups, words of a group], the planes of kernels/packing.py
    scales, zeros  float16 [rows, groups]; zeros None where the record has a constant one
    row_blocks     int64, in the order to be stored
    out            uint8 [matrix_bytes], written
    """
    rows, groups = scales.shape
    records = out.numpy()[: rows // ROWS * groups * record.nbytes].reshape(rows // ROWS, groups, record.nbytes)
    codes = np.empty((rows // ROWS, groups, words.shape[2], ROWS), np.uint32)
    start = 0
    for bits in record.planes:
        vectors = record.group_size * bits // 32
        _plane_mover(bits)(words, row_blocks, start, vectors, codes)
        start += vectors
    records[:, :, : record.code_bytes] = codes.reshape(*codes.shape[:2], -1).view(np.uint8)
    for position, values in enumerate((scales, zeros)):
        if values is not None:
            per_block = values.contiguous().numpy().reshape(-1, ROWS, groups)[row_blocks].transpose(0, 2, 1)
            offset = record.code_bytes + 2 * ROWS * position
            records[:, :, offset : offset + 2 * ROWS] = np.ascontiguousarray(per_block).view(np.uint8)


def unpack(records: torch.Tensor, record: Record, out_features: int, in_features: int) -> tuple[torch.Tensor, ...]:
    """Inverse of write_records for row blocks in natural order, written from the definition above; for tests.

    records: uint8 [matrix_bytes] -> (codes uint8 [out, in], scales float16 [out, groups], zeros likewise or None).
    """
    blocks, groups, size = out_features // ROWS, in_features // record.group_size, record.nbytes
    data = records[: blocks * groups * size].reshape(blocks, groups, size)
    codes = torch.zeros(blocks, groups, record.group_size // 4, ROWS, 4, dtype=torch.uint8)  # [..., quad, row, j]
    start = shift = 0
    for width in record.planes:
        plane_bytes = 2 * record.group_size * width
        plane = data[:, :, start : start + plane_bytes].reshape(blocks, groups, -1, ROWS, 4)
        for s in range(8 // width):
            codes[:, :, s :: 8 // width] |= ((plane >> (width * s)) & ((1 << width) - 1)) << shift
        start, shift = start + plane_bytes, shift + width

    def per_row(values: torch.Tensor) -> torch.Tensor:
        halves = values.contiguous().view(torch.float16)  # [blocks, groups, 16]
        return halves.transpose(1, 2).reshape(out_features, groups)

    scales = per_row(data[:, :, start : start + 32])
    zeros = per_row(data[:, :, start + 32 : start + 64]) if record.zero is None else None
    return codes.permute(0, 3, 1, 2, 4).reshape(out_features, in_features), scales, zeros
