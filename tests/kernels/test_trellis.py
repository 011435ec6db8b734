"""The trellis code's definition, against the words of its module: rings, windows, tables, bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mcmoe.kernels.cpu.layout import ROWS, _plane_mover
from vllm_mcmoe.kernels.packing import GROUP_SIZE, packed_bytes_per_group
from vllm_mcmoe.kernels.trellis import (
    LARGEST_LEVEL,
    RING,
    TRELLIS_WIDTHS,
    TrellisMatrix,
    codes_of_entries,
    decode,
    level_table,
    middle_level,
    pack_trellis,
    table_entries,
    trellis_planes,
    unpack_trellis,
)

matrix_sizes = {"bits": st.sampled_from(TRELLIS_WIDTHS), "seed": st.integers(0, 2**31)}


def random_codes(bits: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def entry_by_hand(codes: list[int], column: int) -> int:
    """As the module's text has it."""
    order = [4 * step + residue for residue in range(4) for step in range(8)]
    first, place = column - column % 32, order.index(column % 32)
    window = sum((codes[first + order[(place + ahead) % 32]] & 1) << ahead for ahead in range(4))
    return window + 16 * (codes[column] >> 1)


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_every_weight_is_decoded_from_its_window_and_its_uncoded_bits(bits):
    codes = random_codes(bits, 20, 2 * GROUP_SIZE)
    expected = [[entry_by_hand(row, column) for column in range(len(row))] for row in codes.tolist()]
    assert table_entries(codes).tolist() == expected
    assert {entry for row in expected for entry in row} == set(range(8 << bits))  # every window with all uncoded bits
    assert torch.equal(decode(codes, bits), level_table(bits)[torch.tensor(expected)])


@given(rows=st.integers(1, 9), rings=st.integers(1, 9), **matrix_sizes)
@settings(max_examples=60, deadline=None)
def test_unpacking_gives_back_the_packed_codes(bits, rows, rings, seed):
    codes = random_codes(bits, rows, RING * rings, seed)
    packed = pack_trellis(codes, bits)
    assert packed.shape == (rows, -(-rings // 4), packed_bytes_per_group(bits))
    assert torch.equal(unpack_trellis(packed, bits)[:, : RING * rings], codes)
    assert torch.equal(codes_of_entries(table_entries(codes)), codes)


@pytest.mark.parametrize(("bits", "planes"), [(1, (1,)), (2, (1, 1)), (3, (1, 2)), (4, (1, 2, 1))])
def test_coded_bits_are_the_first_plane(bits, planes):
    assert trellis_planes(bits) == planes
    codes = random_codes(bits, 1, GROUP_SIZE)
    coded = pack_trellis(codes, bits)[0, 0, :16].tolist()
    assert [coded[k // 8] >> k % 8 & 1 for k in range(GROUP_SIZE)] == (codes[0] & 1).tolist()


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_slices_of_rows_and_of_whole_groups_decode_to_slices(bits):
    """What tensor parallel ranks cut out of the file."""
    codes = random_codes(bits, 12, 5 * GROUP_SIZE)
    levels, packed = decode(codes, bits), pack_trellis(codes, bits)
    part = unpack_trellis(packed[3:9, 1:3], bits)
    assert torch.equal(decode(part, bits), levels[3:9, GROUP_SIZE : 3 * GROUP_SIZE])


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_flipping_every_bit_negates_every_weight(bits):
    codes = random_codes(bits, 4, GROUP_SIZE)
    flipped = codes ^ ((1 << bits) - 1)
    assert torch.equal(decode(flipped, bits), LARGEST_LEVEL[bits] - decode(codes, bits))
    assert middle_level(bits) == LARGEST_LEVEL[bits] / 2


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_levels_fit_what_kernels_add_up(bits):
    """int8 operands; and AVX2's sums of two products in 16 bits: of 4, 2 and 1 quads."""
    table = level_table(bits)
    assert len(table) == 8 << bits
    assert int(table.max()) <= LARGEST_LEVEL[bits] <= 127
    quads = {1: 4, 2: 2, 3: 1, 4: 1}[bits]
    assert quads * 2 * 127 * LARGEST_LEVEL[bits] < 2**15


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_cpu_kernels_find_the_windows_of_a_quad_by_one_rotation(bits):
    """In the 32-bit lane of a row, as layout.py moves a plane of 1 bit; the lane's bytes are the inputs of a quad."""
    codes = random_codes(bits, ROWS, GROUP_SIZE)
    words = pack_trellis(codes, bits).numpy().view(np.uint32)
    lanes = np.empty((1, 1, words.shape[2], ROWS), np.uint32)
    _plane_mover(1)(words, np.zeros(1, np.int64), 0, 4, lanes)
    windows = (table_entries(codes) & 15).numpy()
    for vector in range(4):
        lane = lanes[0, 0, vector]
        for quad in range(8):
            rotated = (lane >> np.uint32(quad) | (lane << np.uint32((32 - quad) % 32))) & np.uint32(0x0F0F0F0F)
            first = RING * vector + 4 * quad
            assert rotated.view(np.uint8).reshape(ROWS, 4).tolist() == windows[:, first : first + 4].tolist()


def test_a_weight_is_its_scale_times_its_level_around_the_middle():
    """The example of docs/trellis.md."""
    codes = torch.zeros(1, RING, dtype=torch.uint8)
    for column, code in {0: 3, 4: 1, 8: 0, 12: 1, 16: 2}.items():
        codes[0, column] = code
    matrix = TrellisMatrix(2, pack_trellis(codes, 2), torch.tensor([[0.5]]).half())
    assert matrix.qweight[0, 0, :3].tolist() == [0b0001_0001, 0b0001_0000, 0]
    assert matrix.qweight[0, 0, 16:19].tolist() == [1, 0, 1]
    columns = [0, 4, 8, 12, 16, 31]
    assert table_entries(codes)[0, columns].tolist() == [16 + 0b1011, 0b0101, 0b0010, 0b0001, 16, 0b0110]
    assert matrix.levels()[0, columns].tolist() == [45, 28, 26, 23, 33, 29]
    assert matrix.dequantize(in_features=32)[0, columns].tolist() == [6.75, -1.75, -2.75, -4.25, 0.75, -1.25]
    assert matrix.dequantize().shape == (1, GROUP_SIZE)
    assert matrix.nbytes == 32 + 2 and (matrix.out_features, matrix.in_features) == (1, GROUP_SIZE)


def test_what_the_code_has_no_place_for_is_refused():
    codes = random_codes(2, 1, GROUP_SIZE)
    with pytest.raises(ValueError, match="bit-width 8 has no trellis code"):
        pack_trellis(codes, 8)
    with pytest.raises(ValueError, match="code 3 does not fit in 1 bits"):
        pack_trellis(torch.full_like(codes, 3), 1)
    with pytest.raises(ValueError, match="100 columns are not whole rings of 32"):
        pack_trellis(codes[:, :100], 2)
    with pytest.raises(ValueError, match="a 3-bit group has 48 bytes, this tensor has 32"):
        unpack_trellis(pack_trellis(codes, 2), 3)
