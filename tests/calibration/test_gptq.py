"""GPTQ and its refinement, judged by the loss they minimise: tr((Q - W) H (Q - W)^T)."""

import itertools

import pytest
import torch

from tests.calibration.test_quantizers import gaussian, representable
from vllm_mcmoe.calibration.matrix import refinement
from vllm_mcmoe.calibration.matrix.gptq import (
    GPTQOptions,
    HessianFactor,
    _triangular_inverse,
    proxy_loss,
    quantize_gptq,
)
from vllm_mcmoe.calibration.matrix.grids import quantize_rtn
from vllm_mcmoe.kernels.packing import WIDTHS

PLAIN = GPTQOptions()
ACT_ORDER = GPTQOptions(act_order=True)
REFINED = GPTQOptions(act_order=True, refinement_sweeps=8)
AUTHORS = GPTQOptions(compensate_within_block=False)
ALL_OPTIONS = pytest.mark.parametrize(
    "options", [PLAIN, ACT_ORDER, REFINED, AUTHORS], ids=["plain", "act order", "refined", "authors"]
)


def correlated_hessian(columns: int = 256, tokens: int = 1024, seed: int = 0) -> torch.Tensor:
    """Second moment of inputs whose columns are correlated and differ in scale, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    inputs *= torch.rand(columns, generator=generator) * 2 + 0.05
    return inputs.t() @ inputs


def loss(weight: torch.Tensor, factor: HessianFactor, bits: int, options: GPTQOptions) -> float:
    return float(proxy_loss(weight, quantize_gptq(weight, factor, bits, options), factor).sum())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("seed", "columns"), [(0, 256), (1, 256), (0, 192), (0, 100)])
def test_every_step_from_rounding_to_refined_gptq_lowers_the_loss(bits, seed, columns):
    weight, hessian = gaussian(64, columns, seed=seed), correlated_hessian(columns, seed=seed)
    factor = HessianFactor.build(hessian, ACT_ORDER)
    rounded = float(proxy_loss(weight, quantize_rtn(weight, bits), factor).sum())
    plain = loss(weight, HessianFactor.build(hessian, PLAIN), bits, PLAIN)
    refined = loss(weight, factor, bits, REFINED)
    assert refined < plain < rounded


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_compensation_inside_blocks_lowers_the_loss(bits):
    weight, hessian = gaussian(64), correlated_hessian()
    factor = HessianFactor.build(hessian, PLAIN)
    assert loss(weight, factor, bits, PLAIN) < loss(weight, factor, bits, AUTHORS)


@pytest.mark.parametrize("bits", WIDTHS)
def test_refinement_never_raises_the_loss_of_any_row(bits):
    weight = gaussian(64)
    factor = HessianFactor.build(correlated_hessian(), ACT_ORDER)
    losses = [
        proxy_loss(
            weight,
            quantize_gptq(weight, factor, bits, GPTQOptions(act_order=True, refinement_sweeps=sweeps)),
            factor,
        )
        for sweeps in (0, 1, 2, 8)
    ]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()  # float32 sums over 256 columns


@ALL_OPTIONS
@pytest.mark.parametrize("columns", [256, 192])
@pytest.mark.parametrize("bits", WIDTHS)
def test_representable_weights_come_back(bits, columns, options):
    weight = representable(bits, columns=columns)
    factor = HessianFactor.build(correlated_hessian(columns), options)
    restored = quantize_gptq(weight, factor, bits, options).dequantize()
    # Only the fp16 rounding of scales and zeros remains; GPTQ spreads it over correlated columns, hence the norm.
    assert (restored - weight).norm() <= 2e-3 * weight.norm()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_with_uncorrelated_columns_of_one_scale_gptq_is_rounding_to_nearest(bits):
    weight = gaussian()
    factor = HessianFactor.identity(256)
    assert torch.equal(quantize_gptq(weight, factor, bits, PLAIN).dequantize(), quantize_rtn(weight, bits).dequantize())


@pytest.mark.parametrize("columns", [128, 72])
def test_gptq_is_the_sequential_least_squares_solution(columns):
    """After each column the not yet quantised ones take their conditional optimum: GPTQ's definition, done naively."""
    weight, bits = gaussian(4, columns), 2
    hessian = correlated_hessian(columns)
    factor = HessianFactor.build(hessian, PLAIN)
    reference = quantize_gptq(weight, factor, bits, PLAIN)
    scales, zeros = reference.scales.double(), reference.zeros.double()  # one group: its grid is that of the weights
    h, w = factor.hessian.double(), weight.double().clone()
    codes = torch.empty_like(w)
    for i in range(columns):
        codes[:, i] = (w[:, i] / scales[:, 0] + zeros[:, 0]).round().clamp(0, 3)
        error = scales[:, 0] * (codes[:, i] - zeros[:, 0]) - w[:, i]
        rest = slice(i + 1, None)
        # minimise over the rest: H_rr d_r = -H_ri error
        w[:, rest] -= torch.linalg.solve(h[rest, rest], h[rest, i : i + 1] * error).t()
    assert (codes.to(torch.uint8) == reference.codes).float().mean() > 0.99  # float32 moves weights near a midpoint


def test_one_factor_serves_every_width_and_stays_as_it_is():
    factor = HessianFactor.build(correlated_hessian(), REFINED)
    before = [tensor.clone() for tensor in (factor.hessian, factor.inverse_factor)]
    weight = gaussian()
    original = weight.clone()
    for bits in WIDTHS:
        quantize_gptq(weight, factor, bits, REFINED)
    assert torch.equal(factor.hessian, before[0]) and torch.equal(factor.inverse_factor, before[1])
    assert torch.equal(weight, original)


@ALL_OPTIONS
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_smaller_last_group_that_others_do_not_correlate_with_is_quantised_by_itself(bits, options):
    """Nothing but its own columns decides its grid and codes, and nothing of it reaches the groups before."""
    weight, hessian = gaussian(32, 192), correlated_hessian(192)
    hessian[:128, 128:] = hessian[128:, :128] = 0
    scale = hessian.diagonal()[128:].mean()
    hessian[:128, :128] *= scale / hessian.diagonal()[:128].mean()  # damping, a share of the mean, is then the same
    matrix = quantize_gptq(weight, HessianFactor.build(hessian, options), bits, options)
    for columns in (slice(128), slice(128, 192)):
        factor = HessianFactor.build(hessian[columns, columns], options)
        part = quantize_gptq(weight[:, columns], factor, bits, options)
        # Rounding in another order moves few weights, and refinement keeps or drops a sweep for all of a row at once.
        assert (matrix.codes[:, columns] == part.codes).float().mean() > 0.98
        scales = matrix.scales[:, (columns.start or 0) // 128]
        assert torch.isclose(scales, part.scales[:, 0], rtol=2**-10).float().mean() > 0.9  # fp16


@ALL_OPTIONS
def test_dead_columns_are_rounded_and_disturb_nothing(options):
    hessian = correlated_hessian()
    dead = torch.zeros(256, dtype=torch.bool)
    dead[[3, 130, 131, 255]] = True
    hessian[dead, :], hessian[:, dead] = 0, 0
    factor = HessianFactor.build(hessian, options)
    assert torch.equal(factor.dead, dead)
    weight = gaussian(32)
    other = weight.clone()
    other[:, 3] += 0.001  # within the range: the grid stays
    first, second = (quantize_gptq(w, factor, 4, options) for w in (weight, other))
    off = (first.dequantize() - weight)[:, dead].abs()
    half_steps = first.scales.float()[:, [0, 1, 1, 1]] / 2
    clipped = (first.codes[:, dead] == 0) | (first.codes[:, dead] == 15)
    assert (clipped | (off <= half_steps * 1.01)).all()
    assert torch.isfinite(second.dequantize()).all()


@ALL_OPTIONS
@pytest.mark.parametrize(
    "hessian",
    [torch.zeros(256, 256), torch.ones(256, 256), torch.eye(256) * 1e-20, torch.full((256, 256), 1e20)],
    ids=["no token", "one repeated token", "tiny inputs", "huge inputs"],
)
def test_degenerate_hessians_give_finite_weights(hessian, options):
    factor = HessianFactor.build(hessian, options)
    restored = quantize_gptq(gaussian(), factor, 2, options).dequantize()
    assert torch.isfinite(restored).all()
    # No worse than twice rounding in plain squared error: the damping keeps compensation in bounds.
    rounded = quantize_rtn(gaussian(), 2).dequantize()
    if float(hessian.abs().sum()) == 0 or not hessian[0, 1]:
        assert (restored - gaussian()).norm() <= 2 * (rounded - gaussian()).norm()


def test_damping_grows_until_an_indefinite_hessian_factors():
    hessian = torch.eye(256)
    hessian[0, 1] = hessian[1, 0] = 1.5  # eigenvalue -0.5: rounding errors of a real moment, exaggerated
    factor = HessianFactor.build(hessian, PLAIN)
    assert factor.damping > 0.5
    assert torch.isfinite(factor.inverse_factor).all()


def test_the_inverse_factor_is_that_of_the_damped_ordered_hessian():
    factor = HessianFactor.build(correlated_hessian(), ACT_ORDER)
    product = factor.inverse_factor.double().t() @ factor.inverse_factor.double()
    ordered = factor.hessian[factor.order][:, factor.order].double()
    # U^T U H = I to float32 accuracy times the condition number, about 1e3 with damping 0.01.
    torch.testing.assert_close(product @ ordered, torch.eye(256, dtype=torch.float64), rtol=0, atol=1e-3)
    diagonal = factor.hessian.diagonal()[factor.order]
    assert (diagonal[:-1] >= diagonal[1:]).all()
    assert torch.equal(factor.inverse_factor, factor.inverse_factor.triu())


def test_the_scale_of_the_hessian_changes_nothing():
    weight, hessian = gaussian(), correlated_hessian()
    first, second = (
        quantize_gptq(weight, HessianFactor.build(hessian * s, REFINED), 2, REFINED) for s in (1.0, 2.0**20)
    )
    assert torch.equal(first.codes, second.codes)


def test_results_do_not_depend_on_the_number_of_threads():
    weight, factor = gaussian(300), HessianFactor.build(correlated_hessian(), ACT_ORDER)
    before, codes = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        codes.append(quantize_gptq(weight, factor, 2, ACT_ORDER).codes)
    torch.set_num_threads(before)
    assert (codes[0] == codes[1]).float().mean() > 0.999  # matrix products may sum in another order


def test_without_compensation_it_is_rounding_to_nearest():
    weight, factor = gaussian(), HessianFactor.build(correlated_hessian())
    matrix = quantize_gptq(weight, factor, 2, GPTQOptions(compensate=False))
    assert torch.equal(matrix.dequantize(), quantize_rtn(weight, 2).dequantize())


def test_bfloat16_weights_are_accepted():
    weight = gaussian().bfloat16()
    factor = HessianFactor.build(correlated_hessian(), PLAIN)
    assert torch.equal(
        quantize_gptq(weight, factor, 3, PLAIN).codes, quantize_gptq(weight.float(), factor, 3, PLAIN).codes
    )


def test_errors_name_what_is_wrong():
    factor = HessianFactor.build(correlated_hessian(), PLAIN)
    broken = gaussian()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"experts\.5\.down: 1 of 4096 weights are NaN"):
        quantize_gptq(broken, factor, 2, name="experts.5.down")
    with pytest.raises(ValueError, match=r"experts\.5\.down: 128 inputs, but its Hessian has 256"):
        quantize_gptq(gaussian(columns=128), factor, 2, name="experts.5.down")
    with pytest.raises(ValueError, match=r"experts\.5\.down: the Hessian has NaN or infinite entries"):
        HessianFactor.build(torch.full((128, 128), float("inf")), name="experts.5.down")
    with pytest.raises(ValueError, match=r"experts\.5\.down: shape \[4, 5\], expected \[in, in\]"):
        HessianFactor.build(torch.ones(4, 5), name="experts.5.down")


def test_a_triangular_matrix_is_inverted_in_halves_as_in_one_piece():
    """Of 1300 columns: halves of 650, themselves halved."""
    x = torch.randn(3000, 1300, generator=torch.Generator().manual_seed(0))
    lower = torch.linalg.cholesky(x.t() @ x / 3000)
    inverse = _triangular_inverse(lower)
    assert torch.equal(inverse, inverse.tril())
    assert torch.allclose(inverse.double() @ lower.double(), torch.eye(1300).double(), atol=1e-4)


@pytest.mark.parametrize("columns", [300, 2 * refinement.NEAR_COLUMNS + 300])
def test_a_gradient_hears_of_every_change_before_it_is_needed(columns):
    generator = torch.Generator().manual_seed(0)
    hessian = torch.randn(columns, columns, generator=generator)
    gradient, error = torch.randn(3, columns, generator=generator), torch.zeros(3, columns)
    before = gradient.clone()
    updates = refinement.GradientUpdates(gradient, hessian)
    for first in range(0, columns, 128):
        group = slice(first, first + 128)
        torch.testing.assert_close(gradient[:, group], (before + error @ hessian)[:, group], rtol=1e-4, atol=1e-3)
        change = torch.randn(3, min(128, columns - first), generator=generator)
        error[:, group] = change
        updates.add(group, change)
    torch.testing.assert_close(gradient, before + error @ hessian, rtol=1e-4, atol=1e-3)
