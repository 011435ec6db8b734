"""The GPU layout: every bit of it can be found again."""

import weakref

import pytest
import torch

from tests.kernels.matrices import random_matrix
from tests.kernels.triton_interpreter import import_interpreted
from vllm_mcmoe.kernels.packing import WIDTHS, Code, PackedMatrix

fields = import_interpreted("vllm_mcmoe.kernels.triton.fields")
layout = import_interpreted("vllm_mcmoe.kernels.triton.layout")

CPU = torch.device("cpu")


def assert_same(found: PackedMatrix, expected: PackedMatrix) -> None:
    assert found.bits == expected.bits
    assert torch.equal(found.qweight, expected.qweight)
    assert torch.equal(found.scales, expected.scales)
    assert (found.zeros is None) == (expected.zeros is None)
    assert found.zeros is None or torch.equal(found.zeros, expected.zeros)


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no zeros"])
@pytest.mark.parametrize("gated", [False, True], ids=["down", "gate_up"])
def test_unpacking_a_layer_of_all_widths_gives_the_checkpoints_bytes_back(gated, zeros):
    generator = torch.Generator().manual_seed(0)
    bits = [3, 1, 8, 2, 4, 1, 3]
    matrices = [random_matrix(b, 512, 384, generator, zeros) for b in bits]
    stack = layout.pack_experts(
        matrices,
        codes=list(map(Code, bits)),
        out_features=512,
        in_features=384,
        gated=gated,
        stored_zeros=zeros,
        device=CPU,
    )
    for expert, matrix in enumerate(matrices):
        assert_same(stack.matrix(expert), matrix)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("features", [16, 272])
def test_features_that_fill_no_whole_tile_survive(bits, features):
    matrix = random_matrix(bits, features, 128, torch.Generator().manual_seed(bits))
    stack = layout.pack_experts(
        [matrix], codes=[Code(bits)], out_features=features, in_features=128, gated=False, stored_zeros=True, device=CPU
    )
    assert_same(stack.matrix(0), matrix)


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no zeros"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_whole_tiles_take_exactly_bits_over_8_bytes_per_weight_plus_scales(bits, zeros):
    matrix = random_matrix(bits, 512, 256, torch.Generator().manual_seed(0), zeros)
    stack = layout.pack_experts(
        [matrix], codes=[Code(bits)], out_features=512, in_features=256, gated=False, stored_zeros=zeros, device=CPU
    )
    assert stack.codes.nbytes == 512 * 256 * bits // 8
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
