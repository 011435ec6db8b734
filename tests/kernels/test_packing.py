"""The checkpoint's packed codes, and the CPU's records made from them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.matrices import random_matrix
from vllm_mcmoe.kernels.cpu import layout
from vllm_mcmoe.kernels.packing import (
    CODES,
    GROUP_SIZE,
    WIDTHS,
    PackedMatrix,
    StoredMatrix,
    pack_codes,
    scales_from_bytes,
    scales_to_bytes,
    unpack_codes,
)
from vllm_mcmoe.kernels.trellis import unpack_trellis

matrix_sizes = {"bits": st.sampled_from(WIDTHS), "seed": st.integers(0, 2**31)}


@given(rows=st.integers(1, 9), columns=st.integers(1, 4 * GROUP_SIZE), **matrix_sizes)
@settings(max_examples=100, deadline=None)
def test_unpacking_gives_back_the_packed_codes_and_zeros_in_the_padding(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-columns // GROUP_SIZE), 16 * bits)
    unpacked = unpack_codes(packed, bits)
    assert torch.equal(unpacked[:, :columns], codes)
    assert not unpacked[:, columns:].any()


@pytest.mark.parametrize(
    ("bits", "codes", "byte_index", "expected"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1], 0, 0b1000_1101),
        (2, [3, 0, 1, 2], 0, 0b10_01_00_11),
        (3, [7, 2, 5, 0], 0, 0b00_01_10_11),  # low two bits of each code
        (3, [7, 2, 5, 0, 4, 0, 0, 4], 32, 0b1001_0101),  # high bits, in the plane behind 32 bytes
        (4, [10, 3], 0, 0b0011_1010),
        (8, [200], 0, 200),
    ],
)
def test_bytes_of_a_group_are_as_the_format_says(bits, codes, byte_index, expected):
    row = torch.zeros(1, GROUP_SIZE, dtype=torch.uint8)
    row[0, : len(codes)] = torch.tensor(codes, dtype=torch.uint8)
    assert pack_codes(row, bits)[0, 0, byte_index] == expected


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="code 4 does not fit in 2 bits"):
        pack_codes(torch.full((1, GROUP_SIZE), 4, dtype=torch.uint8), 2)


def test_a_width_the_format_lacks_is_refused():
    with pytest.raises(ValueError, match="bit-width 5 is not one of"):
        pack_codes(torch.zeros(1, GROUP_SIZE, dtype=torch.uint8), 5)


def test_dequantizing_crops_the_padding_where_the_true_width_is_given():
    matrix = PackedMatrix(2, pack_codes(torch.ones(1, 100, dtype=torch.uint8), 2), *torch.ones(2, 1, 1).half())
    assert matrix.dequantize(in_features=100).tolist() == [[0.0] * 100]
    assert matrix.dequantize().tolist() == [[0.0] * 100 + [-1.0] * 28]


def test_dequantized_weight_is_scale_times_code_minus_zero():
    codes = torch.arange(GROUP_SIZE, dtype=torch.uint8).remainder(4).unsqueeze(0)
    matrix = PackedMatrix(2, pack_codes(codes, 2), torch.tensor([[0.5]]).half(), torch.tensor([[1.25]]).half())
    assert matrix.dequantize()[0, :4].tolist() == [-0.625, -0.125, 0.375, 0.875]


@pytest.mark.parametrize(
    ("bits", "expected"), [(1, [-0.25, 0.25]), (2, [-0.75, -0.25, 0.25, 0.75]), (3, [-1.75, -1.25, -0.75, -0.25, 0.25])]
)
def test_weights_without_zeros_lie_evenly_around_0(bits, expected):
    codes = torch.arange(GROUP_SIZE, dtype=torch.uint8).remainder(1 << bits).unsqueeze(0)
    matrix = PackedMatrix(bits, pack_codes(codes, bits), torch.tensor([[0.5]]).half(), None)
    assert matrix.dequantize()[0, : len(expected)].tolist() == expected


@given(rows=st.integers(1, 5), groups=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_scales_of_a_byte_come_back_exactly(rows, groups, seed):
    """Any byte under any exponent, as long as a row's largest is in the topmost octave that its exponent says."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, (rows, groups), generator=generator, dtype=torch.uint8)
    stored[:, 0] |= 7 << 5
    exponents = torch.randint(-19, 9, (rows,), generator=generator).to(torch.int8)
    scales = scales_from_bytes(stored, exponents)
    assert scales.dtype == torch.float16
    again = scales_to_bytes(scales)
    assert torch.equal(again[0], stored) and torch.equal(again[1], exponents)


@pytest.mark.parametrize(
    ("byte", "exponent", "expected"),
    [(0, 0, 1.0), (1, 0, 1 + 1 / 32), (32, 0, 2.0), (255, 0, 252.0), (0, -19, 2.0**-19), (255, 8, 64512.0)],
)
def test_a_byte_is_read_as_the_format_says(byte, exponent, expected):
    stored, exponents = torch.tensor([[byte]], dtype=torch.uint8), torch.tensor([exponent], dtype=torch.int8)
    assert float(scales_from_bytes(stored, exponents)) == expected


@pytest.mark.parametrize("scales", [[1.0, 1 + 1 / 64], [1.0, 300.0], [0.0, 1.0]], ids=["mantissa", "range", "zero"])
def test_scales_that_a_byte_cannot_hold_are_refused(scales):
    with pytest.raises(ValueError, match="a byte cannot hold"):
        scales_to_bytes(torch.tensor([scales]).half())


def test_one_bit_weights_are_plus_and_minus_half_a_scale():
    codes = torch.arange(GROUP_SIZE, dtype=torch.uint8).remainder(2).unsqueeze(0)
    matrix = PackedMatrix(1, pack_codes(codes, 1), torch.tensor([[0.5]]).half(), None)
    assert matrix.dequantize()[0, :2].tolist() == [-0.25, 0.25]


def record_of(matrix: StoredMatrix) -> layout.Record:
    return layout.expert_record(matrix.code, matrix.zeros is not None)


def repacked(matrix: StoredMatrix, row_blocks: torch.Tensor) -> torch.Tensor:
    out = torch.empty(
        layout.matrix_bytes(record_of(matrix), matrix.out_features, matrix.in_features),
        dtype=torch.uint8,
    )
    layout.repack(matrix, row_blocks.numpy(), out)
    return out


@given(
    code=st.sampled_from(CODES),
    blocks=st.integers(1, 5),
    groups=st.integers(1, 4),
    stored_zeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_records_hold_the_matrix(code, blocks, groups, stored_zeros, seed):
    shape = (blocks * layout.ROWS, groups * GROUP_SIZE)
    matrix = random_matrix(code, *shape, torch.Generator().manual_seed(seed), stored_zeros)
    codes, scales, zeros = layout.unpack(repacked(matrix, torch.arange(blocks)), record_of(matrix), *shape)
    unpacked = unpack_codes if code.kind == "scalar" else unpack_trellis
    assert torch.equal(codes, unpacked(matrix.qweight, code.bits))
    assert torch.equal(scales, matrix.scales)
    assert zeros is None if matrix.zeros is None else torch.equal(zeros, matrix.zeros)
    per_weight = 8 * layout.matrix_bytes(record_of(matrix), *shape) / matrix.levels().numel()
    assert per_weight == pytest.approx(code.bits + (0.25 if code.has_zeros(stored_zeros) else 0.125), abs=0.16 / groups)


@pytest.mark.parametrize(
    ("bits", "quad", "byte_offset", "expected"),
    [
        # quad 5 = inputs 20-23 with codes 1, 0, 1, 1 of row 2; row 2's lane starts at byte 8 of a vector
        (1, 5, 8, [1 << 5, 0, 1 << 5, 1 << 5]),  # vector 0, field 5
        (2, 5, 64 + 8, [1 << 2, 0, 1 << 2, 1 << 2]),  # vector 1, field 1
        (4, 5, 2 * 64 + 8, [1 << 4, 0, 1 << 4, 1 << 4]),  # vector 2, field 1
        (8, 5, 5 * 64 + 8, [1, 0, 1, 1]),  # vector 5
    ],
)
def test_a_record_has_each_code_where_the_layout_says(bits, quad, byte_offset, expected):
    codes = torch.zeros(layout.ROWS, GROUP_SIZE, dtype=torch.uint8)
    codes[2, 4 * quad : 4 * quad + 4] = torch.tensor([1, 0, 1, 1], dtype=torch.uint8)
    ones = torch.ones(layout.ROWS, 1, dtype=torch.float16)
    records = repacked(PackedMatrix(bits, pack_codes(codes, bits), ones, None if bits == 1 else ones), torch.arange(1))
    assert records[byte_offset : byte_offset + 4].tolist() == expected
    assert records[: 256 * bits].count_nonzero() == 3


def test_gate_and_up_blocks_of_the_same_128_rows_lie_together():
    order = layout.gate_up_row_blocks(256, 2).tolist()
    assert order == [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
