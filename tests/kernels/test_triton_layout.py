"""The GPU layout: every bit of it can be found again."""

import weakref

import pytest
import torch

from tests.kernels.matrices import random_matrix
from tests.kernels.triton_interpreter import import_interpreted
from vllm_mcmoe.kernels.packing import CODES, TRELLIS_WIDTHS, WIDTHS, Code, StoredMatrix
from vllm_mcmoe.kernels.trellis import level_table, pack_trellis, ring_columns, table_entries

fields = import_interpreted("vllm_mcmoe.kernels.triton.fields")
layout = import_interpreted("vllm_mcmoe.kernels.triton.layout")
rings = import_interpreted("vllm_mcmoe.kernels.triton.rings")
ring_decoder = import_interpreted("vllm_mcmoe.kernels.triton.ring_decoder")

CPU = torch.device("cpu")


def assert_same(found: StoredMatrix, expected: StoredMatrix) -> None:
    assert found.code == expected.code
    assert torch.equal(found.qweight, expected.qweight)
    assert torch.equal(found.scales, expected.scales)
    assert (found.zeros is None) == (expected.zeros is None)
    assert found.zeros is None or torch.equal(found.zeros, expected.zeros)


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no zeros"])
@pytest.mark.parametrize("gated", [False, True], ids=["down", "gate_up"])
@pytest.mark.parametrize(
    "codes",
    [list(map(Code, [3, 1, 8, 2, 4, 1, 3])), [*reversed(CODES), Code(3, "trellis")]],
    ids=["scalar", "with trellis"],
)
def test_unpacking_a_layer_of_all_codes_gives_the_checkpoints_bytes_back(codes, gated, zeros):
    generator = torch.Generator().manual_seed(0)
    matrices = [random_matrix(code, 512, 384, generator, zeros) for code in codes]
    stack = layout.pack_experts(
        matrices,
        codes=codes,
        out_features=512,
        in_features=384,
        gated=gated,
        stored_zeros=zeros,
        device=CPU,
    )
    for expert, matrix in enumerate(matrices):
        assert_same(stack.matrix(expert), matrix)


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("features", [16, 272])
def test_features_that_fill_no_whole_tile_survive(code, features):
    matrix = random_matrix(code, features, 128, torch.Generator().manual_seed(code.bits))
    stack = layout.pack_experts(
        [matrix], codes=[code], out_features=features, in_features=128, gated=False, stored_zeros=True, device=CPU
    )
    assert_same(stack.matrix(0), matrix)


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no zeros"])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_whole_tiles_take_exactly_bits_over_8_bytes_per_weight_plus_scales(code, zeros):
    matrix = random_matrix(code, 512, 256, torch.Generator().manual_seed(0), zeros)
    stack = layout.pack_experts(
        [matrix], codes=[code], out_features=512, in_features=256, gated=False, stored_zeros=zeros, device=CPU
    )
    assert stack.codes.nbytes == 512 * 256 * code.bits // 8
    assert stack.scales.nbytes == matrix.nbytes - matrix.qweight.nbytes


@pytest.mark.parametrize("bits", WIDTHS)
def test_masking_a_byte_gives_the_code_times_a_power_of_two(bits):
    """What the kernels rely on: no shift is needed, and a flipped top bit is the same as a smaller zero point."""
    codes = torch.randint(0, 1 << bits, (256, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes = layout.pack_tiles(codes, bits)[0, 0]
    rows = fields.tile_rows(bits)
    for field in range(fields.field_count(bits)):
        total = torch.zeros(rows, 128, dtype=torch.int32)
        for piece in range(fields.piece_count(bits, field)):
            byte = planes[fields.piece_plane(bits, field, piece)]
            operand = (byte & fields.piece_mask(bits, field, piece)).view(torch.int8)
            total += fields.piece_factor(bits, field, piece) * operand.int()
        expected = codes[field * rows : (field + 1) * rows].int() - int(fields.zero_offset(bits, field))
        assert torch.equal(total, expected << fields.field_shift(bits, field))


@pytest.mark.parametrize("bits", WIDTHS)
def test_fields_share_no_bit_and_leave_none_unused(bits):
    taken = [0] * fields.plane_count(bits)
    for field in range(fields.field_count(bits)):
        for piece in range(fields.piece_count(bits, field)):
            plane, mask = fields.piece_plane(bits, field, piece), fields.piece_mask(bits, field, piece)
            assert not taken[plane] & mask
            taken[plane] |= mask
    assert taken == [255] * fields.plane_count(bits)


def ring_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of one feature and group, uint8 [1, 128] -> the four rings' words by stream, int64 [bits, 4]."""
    stored = rings.ring_words(pack_trellis(codes, bits), bits)[0, 0].view(bits, 4, 4).long()
    return sum(stored[..., byte] << (8 * byte) for byte in range(4))


def rotated(words: torch.Tensor, by: int) -> torch.Tensor:
    return ((words >> by) | (words << (32 - by))) & 0xFFFFFFFF


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_a_rotated_words_nibbles_are_the_windows_of_the_inputs_beside_each_other(bits):
    """What the kernels rely on: an operand's four bytes are four nibbles, in the order in which activations are stored;
    where there are uncoded bits, one bit further on, and these are flipped by their weight's own coded bit."""
    codes = torch.randint(0, 1 << bits, (1, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words, entries = ring_words(codes, bits), rings.to_ring_order(table_entries(codes))[0].view(8, 4, 4)
    for quad in range(8):
        position = quad // 2 + 16 * (quad % 2)
        for byte in range(4):
            at = position + 4 * byte
            window = rotated(words[0], (at + (bits > 1)) % 32) & 15
            assert torch.equal(window, entries[quad, :, byte].long() & 15)
            for stream in range(1, bits):
                flipped = rotated(words[stream], (at + (0 if stream == 1 else 3)) % 32) & 1
                assert torch.equal(flipped ^ (window & 1), entries[quad, :, byte].long() >> (3 + bits - stream) & 1)


def test_the_order_of_inputs_is_that_of_rotations_halves_rings_and_steps():
    """By hand: rotation 1, second half, ring 2, byte 3 is position 1 + 12 + 16 = 29, which is column 23 of the ring."""
    assert rings.ring_order()[16 * (2 * 1 + 1) + 4 * 2 + 3] == 2 * 32 + 23
    assert ring_columns()[29] == 23
    assert rings.ring_order().sort().values.tolist() == list(range(128))
    columns = torch.arange(256).view(1, -1)
    assert torch.equal(rings.from_ring_order(rings.to_ring_order(columns)), columns)


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_operands_are_the_levels_up_to_a_factor_and_an_offset(bits):
    operands = torch.tensor(ring_decoder.operands(bits), dtype=torch.uint8).view(torch.int8).float()
    centred = level_table(bits).float() - (level_table(bits).max() + level_table(bits).min()) / 2
    assert torch.equal((operands - ring_decoder.operand_zero(bits)) / ring_decoder.factor(bits), centred)


def test_a_tile_of_gate_up_holds_the_up_rows_that_its_gate_rows_multiply():
    rows = torch.arange(512)  # 256 gate rows, then 256 up rows
    tile = layout.interleave_gate_up(rows)[:256]
    assert torch.equal(tile, torch.cat([torch.arange(128), 256 + torch.arange(128)]))
    assert torch.equal(layout.split_gate_up(layout.interleave_gate_up(rows)), rows)


def test_a_matrix_is_released_before_the_next_is_taken():
    """Or a layer's checkpoint tensors and their packed copy would fill the device together."""

    def matrices():
        for expert in range(3):
            matrix = random_matrix(2, 256, 128, torch.Generator().manual_seed(expert))
            taken = weakref.ref(matrix)
            yield matrix
            del matrix
            assert taken() is None

    layout.pack_experts(
        matrices(), codes=[Code(2)] * 3, out_features=256, in_features=128, gated=True, stored_zeros=True, device=CPU
    )


@pytest.mark.parametrize(
    ("announced", "message"),
    [
        ({"codes": [Code(3)]}, r"expert 0.*\('2 bits', 256, 128, True\).*expected \('3 bits', 256, 128, True\)"),
        ({"out_features": 512}, r"expert 0.*\('2 bits', 256, 128, True\).*expected \('2 bits', 512, 128, True\)"),
        ({"stored_zeros": False}, r"expert 0.*\('2 bits', 256, 128, True\).*expected \('2 bits', 256, 128, False\)"),
        ({"codes": [Code(5)]}, "no matrices of 5 bits"),
        ({"codes": [Code(2)] * 2}, "expert 1: no matrix"),
        ({"codes": []}, "more matrices than the 0 codes"),
    ],
    ids=["code", "shape", "zeros", "unknown code", "missing matrix", "surplus matrix"],
)
def test_a_matrix_that_is_not_what_was_announced_is_named(announced, message):
    matrix = random_matrix(2, 256, 128, torch.Generator().manual_seed(0))
    arguments = {"codes": [Code(2)], "out_features": 256, "in_features": 128, "stored_zeros": True} | announced
    with pytest.raises(ValueError, match=message):
        layout.pack_experts([matrix], gated=False, device=CPU, **arguments)
