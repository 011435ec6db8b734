"""Round-to-nearest, and the form all quantisers return."""

import pytest
import torch

from vllm_mcmoe.calibration.matrix.grids import SMALLEST_FP16, QuantizedMatrix, quantize_rtn
from vllm_mcmoe.kernels.packing import GROUP_SIZE, WIDTHS, group_count, scales_from_bytes, scales_to_bytes


def gaussian(rows: int = 16, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def representable(bits: int, rows: int = 8, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """A matrix some grid of that width holds exactly; every group uses its first and its last code."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[:, 0::GROUP_SIZE], codes[:, 1::GROUP_SIZE] = 0, (1 << bits) - 1
    shape = (rows, group_count(columns))
    scales = (torch.rand(shape, generator=generator) + 0.5).half()
    zeros = None if bits == 1 else (torch.rand(shape, generator=generator) * (1 << bits)).half()
    return QuantizedMatrix(bits, codes, scales, zeros).dequantize()


def squared_error(weight: torch.Tensor, quantized: QuantizedMatrix) -> float:
    return float((quantized.dequantize() - weight).double().square().sum())


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_representable_weights_come_back(bits, search):
    weight = representable(bits)
    restored = quantize_rtn(weight, bits, search=search).dequantize()
    # Scales and zeros are rounded to fp16 again: half a unit in the last of 11 bits of each, on values up to 2**bits.
    tolerance = float(weight.abs().max()) * 2 * 2**-11
    torch.testing.assert_close(restored, weight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("columns", [256, 192, 100])
@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_keeps_every_weight(bits, columns):
    matrix = quantize_rtn(gaussian(columns=columns), bits)
    packed = matrix.pack()
    assert torch.equal(packed.dequantize(in_features=columns), matrix.dequantize())
    assert (packed.zeros is None) == (bits == 1)
    assert (matrix.codes.dtype, matrix.scales.dtype) == (torch.uint8, torch.float16)


def test_one_bit_is_the_sign_times_the_mean_magnitude_of_the_group():
    weight = gaussian()
    matrix = quantize_rtn(weight, 1)
    magnitude = (
        weight.unflatten(-1, (-1, GROUP_SIZE)).abs().mean(-1, keepdim=True).expand(-1, -1, GROUP_SIZE).flatten(-2)
    )
    torch.testing.assert_close(matrix.dequantize(), weight.sign() * magnitude, rtol=2**-11, atol=0)  # fp16 scales


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_grids_beat_grids_over_the_range(bits):
    weight = gaussian()
    searched, spanning = (quantize_rtn(weight, bits, search=s) for s in ("mse", "minmax"))
    # 2 to 4 bits lose least with a range clipped to about 1.5, 2 and 2.6 of a Gaussian's standard deviations.
    assert squared_error(weight, searched) < 0.9 * squared_error(weight, spanning)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_search_finds_the_best_of_a_dense_scan(bits):
    weight = gaussian(rows=4, columns=GROUP_SIZE)
    largest = (1 << bits) - 1
    least = torch.full((4,), float("inf"))
    for low_share in torch.linspace(0.3, 1, 36):
        for high_share in torch.linspace(0.3, 1, 36):
            low, high = weight.amin(1, True) * low_share, weight.amax(1, True) * high_share
            scale = (high - low) / largest
            restored = scale * ((weight - low) / scale).round().clamp(0, largest) + low
            least = torch.minimum(least, (restored - weight).square().sum(1))
    found = (quantize_rtn(weight, bits).dequantize() - weight).square().sum(1)
    assert (found <= 1.03 * least).all()  # the scan has 1296 starts per row, the search six


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_importance_moves_error_away_from_important_columns(bits):
    weight = gaussian()
    importance = torch.ones(256)
    importance[::4] = 100.0
    plain, weighted = quantize_rtn(weight, bits), quantize_rtn(weight, bits, importance=importance)

    def weighted_error(matrix: QuantizedMatrix) -> float:
        return float(((matrix.dequantize() - weight).square() * importance).sum())

    assert weighted_error(weighted) < weighted_error(plain)


def test_a_group_no_token_uses_is_quantised_as_if_all_columns_counted():
    weight = gaussian()
    importance = torch.ones(256)
    importance[:GROUP_SIZE] = 0
    restored = quantize_rtn(weight, 2, importance=importance).dequantize()
    expected = quantize_rtn(weight, 2).dequantize()
    assert torch.equal(restored, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("value", [0.0, 0.75, -0.001])
def test_constant_groups_are_exact(bits, value):
    weight = torch.full((2, 256), value)
    restored = quantize_rtn(weight, bits).dequantize()
    torch.testing.assert_close(restored, weight, rtol=2**-11, atol=0)  # the value becomes an fp16 scale


def test_zero_weights_at_one_bit_become_as_small_as_fp16_normals_allow():
    matrix = quantize_rtn(torch.zeros(2, 128), 1)
    assert (matrix.scales > 0).all()
    assert matrix.dequantize().abs().max() <= SMALLEST_FP16 / 2


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_negligible_tiny_group_keeps_a_normal_scale(bits):
    weight = gaussian()
    weight[3, :GROUP_SIZE] *= 1e-6
    matrix = quantize_rtn(weight, bits)
    assert float(matrix.scales.min()) >= SMALLEST_FP16
    off = (matrix.dequantize() - weight)[3, :GROUP_SIZE].abs().max()
    assert off <= SMALLEST_FP16  # at most one step of the smallest grid


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_matrix_too_small_for_fp16_scales_is_refused_by_name(bits):
    with pytest.raises(ValueError, match=r"layer\.3\.down: 32 of 32 groups, 100\.0% of the squared norm"):
        quantize_rtn(gaussian() * 1e-5, bits, name="layer.3.down")


def test_a_matrix_too_large_for_fp16_scales_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layer\.3\.down: scale .* exceeds fp16's largest value 65504"):
        quantize_rtn(gaussian() * 1e8, 2, name="layer.3.down")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    weight = gaussian()
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"layer\.3\.down: 1 of 4096 weights are NaN or infinite"):
        quantize_rtn(weight, 2, name="layer.3.down")


@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_smaller_last_group_is_quantised_as_a_matrix_of_its_own(bits, search):
    weight = gaussian(columns=320)
    weight += 0.05  # a group away from zero, which filling it up with zeros would widen
    importance = torch.rand(320, generator=torch.Generator().manual_seed(1))
    matrix = quantize_rtn(weight, bits, search=search, importance=importance)
    parts = [
        quantize_rtn(weight[:, columns], bits, search=search, importance=importance[columns])
        for columns in (slice(256), slice(256, 320))
    ]
    assert torch.equal(matrix.codes, torch.cat([part.codes for part in parts], dim=1))
    assert torch.equal(matrix.scales, torch.cat([part.scales for part in parts], dim=1))
    assert torch.equal(matrix.dequantize(), torch.cat([part.dequantize() for part in parts], dim=1))


def test_a_negligible_smaller_last_group_keeps_a_normal_scale():
    weight = gaussian(columns=192)
    weight[:, GROUP_SIZE:] *= 1e-6
    assert float(quantize_rtn(weight, 2).scales.min()) >= SMALLEST_FP16


@pytest.mark.parametrize("columns", [256, 192])
@pytest.mark.parametrize("search", ["mse", "minmax"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_of_a_byte_are_found_without_zeros(bits, search, columns):
    weight = gaussian(columns=columns)
    matrix = quantize_rtn(weight, bits, search=search, metadata="float8")
    assert matrix.zeros is None
    assert torch.equal(scales_from_bytes(*scales_to_bytes(matrix.scales)), matrix.scales)
    assert torch.equal(matrix.pack().dequantize(in_features=columns), matrix.dequantize())
    with_zeros = quantize_rtn(weight, bits, search=search)
    # A range around 0 is wider than the group's own, which matters the more, the less of it is clipped.
    most = 1.7 if search == "minmax" and bits > 1 else {1: 1.01, 2: 1.1, 3: 1.25, 4: 1.4, 8: 1.6}[bits]
    assert squared_error(weight, matrix) < most * squared_error(weight, with_zeros)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_rows_scales_of_a_byte_reach_far_enough(bits):
    """Rows have ranges of their own; in a row, a group 30 times smaller than the largest is about as precise."""
    weight = gaussian()
    weight[3] *= 1e-3
    weight[5, :GROUP_SIZE] *= 30
    matrix, alone = (quantize_rtn(w, bits, metadata="float8") for w in (weight, gaussian()))
    error, usual = ((m.dequantize() - w).square().sum(1) for m, w in ((matrix, weight), (alone, gaussian())))
    torch.testing.assert_close(error[3] * 1e6, usual[3], rtol=0.2, atol=0)
    small = (matrix.dequantize() - weight)[5, GROUP_SIZE:].square().sum()
    expected = (alone.dequantize() - gaussian())[5, GROUP_SIZE:].square().sum()
    torch.testing.assert_close(small, expected, rtol=1.0, atol=0)


def test_a_group_too_small_beside_the_largest_of_its_row_is_off_by_half_the_smallest_scale_at_most():
    weight = gaussian()
    weight[5, :GROUP_SIZE] *= 1e5
    matrix = quantize_rtn(weight, 2, metadata="float8")
    largest = float(matrix.scales[5].max())
    assert float((matrix.dequantize() - weight)[5, GROUP_SIZE:].abs().max()) < largest / 60
    scales_to_bytes(matrix.scales)


@pytest.mark.parametrize(
    ("shape", "bits", "message"),
    [((2, 128), 5, "bit-width 5 is not one of"), ((2, 2, 128), 2, r"expected \[out, in\]")],
)
def test_shapes_and_widths_outside_the_format_are_refused(shape, bits, message):
    with pytest.raises(ValueError, match=message):
        quantize_rtn(torch.ones(shape), bits)
