"""The CPU's layout of weights: one stream of records per expert, read front to back exactly once.

A record is one group of 128 inputs of 16 output rows ("a row block"):

    256 * bits bytes   codes, plane by plane; a plane of b bits is 4*b vectors of 64 bytes. A vector has one 32-bit lane
                       per row; the lane's byte j holds, at bit b*s, the code of input 4*q + j of the group, where
                       q = vector * (8/b) + s numbers the quads (4 consecutive inputs)
    32 bytes           scales, float16, one per row
    32 bytes           zeros, float16, one per row; absent at 1 bit, where the zero is 0.5

Shifting a vector by b*s and masking gives one quad of 16 rows: the operand of VNNI's dot product, and one row of an AMX
tile. Inside a row block records follow in the order of groups. Row blocks follow in output order; gate_up alternates
8 blocks (128 rows) of gate with the 8 of up that they multiply.

Every instruction set shares this layout. Records are kept on disk under LAYOUT_VERSION: whoever changes them raises it.
"""

from functools import cache

import numba
import numpy as np
import torch

from vllm_mcmoe.kernels.packing import GROUP_SIZE, PackedMatrix, planes

LAYOUT_VERSION = 1
ROWS = 16  # 32-bit lanes of an AVX-512 vector, columns of an AMX tile
ALIGNMENT = 64  # one cache line, one vector


def code_bytes(bits: int) -> int:
    """Bytes of the codes of one group of 16 rows."""
    return GROUP_SIZE * ROWS // 8 * bits


def record_bytes(bits: int) -> int:
    """Bytes of one group of 16 rows. Also called by compiled code, as `record_bytes_compiled`."""
    return GROUP_SIZE * ROWS // 8 * bits + 2 * ROWS * (1 if bits == 1 else 2)


record_bytes_compiled = numba.njit(record_bytes)


def matrix_bytes(bits: int, out_features: int, in_features: int) -> int:
    """Bytes of one matrix, rounded up to whole cache lines."""
    exact = out_features // ROWS * (in_features // GROUP_SIZE) * record_bytes(bits)
    return -(-exact // ALIGNMENT) * ALIGNMENT


def gate_up_row_blocks(intermediate_size: int) -> np.ndarray:
    """Order in which the row blocks of a [2I, H] gate_up matrix are stored: int64 [2I/16]."""
    blocks = np.arange(2 * intermediate_size // ROWS).reshape(2, -1, GROUP_SIZE // ROWS)
    return np.ascontiguousarray(blocks.transpose(1, 0, 2)).reshape(-1)


@cache
def _plane_mover(bits: int):
    """A compiled function that moves a plane of so many bits: constants, so that LLVM unrolls the loops over fields.

    words: [rows, groups, bytes/4] of the checkpoint, whose word `start` is the plane's first; out: [row blocks, groups,
    vectors, 16], likewise. Code 4*s + j of a word, at bit bits*(4*s + j), goes to bit 8*j + bits*s.
    """
    vectors, fields, mask = 4 * bits, 8 // bits, np.uint32((1 << bits) - 1)

    @numba.njit("void(uint32[:,:,::1], int64[::1], int64, uint32[:,:,:,::1])", nogil=True, cache=True)
    def move(words, row_blocks, start, out):
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


def repack(matrix: PackedMatrix, row_blocks: np.ndarray, out: torch.Tensor) -> None:
    """Write a matrix into `out`, uint8 [matrix_bytes], its row blocks in the given order."""
    rows, groups = matrix.scales.shape
    size = record_bytes(matrix.bits)
    records = out.numpy()[: rows // ROWS * groups * size].reshape(rows // ROWS, groups, size)
    words = matrix.qweight.contiguous().numpy().view(np.uint32)
    codes = np.empty((rows // ROWS, groups, 4 * matrix.bits, ROWS), np.uint32)
    start = 0
    for bits in planes(matrix.bits):
        _plane_mover(bits)(words, row_blocks, start, codes)
        start += 4 * bits
    scales_start = code_bytes(matrix.bits)
    records[:, :, :scales_start] = codes.reshape(*codes.shape[:2], -1).view(np.uint8)
    for position, values in enumerate((matrix.scales, matrix.zeros)):
        if values is not None:
            per_block = values.contiguous().numpy().reshape(-1, ROWS, groups)[row_blocks].transpose(0, 2, 1)
            offset = scales_start + 2 * ROWS * position
            records[:, :, offset : offset + 2 * ROWS] = np.ascontiguousarray(per_block).view(np.uint8)


def unpack(records: torch.Tensor, bits: int, out_features: int, in_features: int) -> tuple[torch.Tensor, ...]:
    """Inverse of repack for row blocks in natural order, written from the definition above; for tests.

    records: uint8 [matrix_bytes] -> (codes uint8 [out, in], scales float16 [out, in/128], zeros likewise or None).
    """
    blocks, groups, size = out_features // ROWS, in_features // GROUP_SIZE, record_bytes(bits)
    data = records[: blocks * groups * size].reshape(blocks, groups, size)
    codes = torch.zeros(blocks, groups, GROUP_SIZE // 4, ROWS, 4, dtype=torch.uint8)  # [..., quad, row, j]
    start = shift = 0
    for width in planes(bits):
        plane = data[:, :, start : start + 256 * width].reshape(blocks, groups, 4 * width, ROWS, 4)
        for s in range(8 // width):
            codes[:, :, s :: 8 // width] |= ((plane >> (width * s)) & ((1 << width) - 1)) << shift
        start, shift = start + 256 * width, shift + width

    def per_row(values: torch.Tensor) -> torch.Tensor:
        halves = values.contiguous().view(torch.float16)  # [blocks, groups, 16]
        return halves.transpose(1, 2).reshape(out_features, groups)

    scales = per_row(data[:, :, start : start + 32])
    zeros = None if bits == 1 else per_row(data[:, :, start + 32 : start + 64])
    return codes.permute(0, 3, 1, 2, 4).reshape(out_features, in_features), scales, zeros
