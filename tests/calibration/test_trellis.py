"""Quantising to trellis codes: the search for codes, and what they lose."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.calibration import child_process
from tests.calibration.test_gptq import REFINED, correlated_hessian
from tests.calibration.test_output_hessian import ROWS, coupled_outputs, losses_of
from vllm_mcmoe.calibration.checkpoint.writer import Shard
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions, HessianFactor, proxy_loss, quantize_gptq
from vllm_mcmoe.calibration.matrix.refinement import SeparateRows, refine
from vllm_mcmoe.calibration.matrix.trellis import (
    Iterate,
    QuantizedTrellis,
    centred_table,
    ring_order,
)
from vllm_mcmoe.calibration.matrix.trellis_loops import first_pass
from vllm_mcmoe.calibration.matrix.two_sided import OutputHessian
from vllm_mcmoe.kernels.packing import scales_to_bytes
from vllm_mcmoe.kernels.trellis import (
    RING,
    TRELLIS_WIDTHS,
    codes_of_entries,
    decode,
    middle_level,
    ring_columns,
    table_entries,
)

TRELLIS = dataclasses.replace(REFINED, metadata="float8", codes="trellis")


def gaussian(rows: int = 16, columns: int = 256) -> torch.Tensor:
    """Of variance 1."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def with_sweeps(refinement: int, output: int = 0) -> GPTQOptions:
    return dataclasses.replace(TRELLIS, refinement_sweeps=refinement, output_sweeps=output)


def least_cost(targets: np.ndarray, scale: float, table: np.ndarray, start: int) -> float:
    """Of one ring of separate weights that begins and ends with these three bits, by dynamic programming."""
    costs = np.full(8, np.inf)
    costs[start] = 0.0
    for target in targets:
        errors = np.square(scale * table - target).min(0)  # by window
        costs = np.array([min(costs[window & 7] + errors[window] for window in (2 * s, 2 * s + 1)) for s in range(8)])
    return float(costs[start])


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_rings_of_separate_weights_get_the_codes_of_least_cost(bits):
    targets = 12.3 * gaussian(40, RING)
    factor, table = torch.eye(RING), centred_table(bits)
    entries, errors = torch.zeros(40, RING, dtype=torch.uint8), torch.zeros(40, RING)
    scales = torch.linspace(0.9, 1.1, 40)
    arrays = (tensor.numpy() for tensor in (targets, entries, errors, scales, factor, factor, table))
    first_pass(*arrays)
    levels = table.flatten()[entries.long()]
    torch.testing.assert_close(scales[:, None] * levels - targets, errors, rtol=0, atol=1e-4)
    for row in range(40):
        half = RING // 2  # where the search cuts the ring
        turned, start = np.roll(targets[row].numpy(), -half), int(entries[row, half]) & 7
        least = least_cost(turned, float(scales[row]), table.numpy(), start)
        assert float(errors[row].square().sum()) == pytest.approx(least, rel=1e-4)


def test_the_search_weighs_what_an_error_means_for_the_weights_after():
    """Under a Hessian, against codes chosen as if the weights were separate and against GPTQ's one survivor."""
    hessian = correlated_hessian(RING)
    hessian = hessian[ring_columns()][:, ring_columns()] / hessian.diagonal().mean() + 0.01 * torch.eye(RING)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).contiguous()
    turned = torch.linalg.cholesky(hessian.roll((16, 16), (0, 1)).flip(0, 1)).flip(0, 1).contiguous()
    targets, table = 12.3 * gaussian(64, RING), centred_table(2)
    found = []
    for factors in ((factor, turned), (torch.eye(RING), torch.eye(RING))):
        entries, errors = torch.zeros(64, RING, dtype=torch.uint8), torch.zeros(64, RING)
        first_pass(*(t.numpy() for t in (targets, entries, errors, torch.ones(64), *factors, table)))
        found.append(float(((errors @ hessian) * errors).sum()))
        if factors[0] is factor:
            assert found[0] == pytest.approx(float((errors @ factor).square().sum()), rel=1e-4)
    assert found[0] < 0.6 * found[1]


# What docs/trellis.md has for unit Gaussians, and what scalar codes have.
SQUARED_ERRORS = {1: (0.307, 0.363), 2: (0.083, 0.119), 3: (0.0216, 0.037), 4: (0.0058, 0.0115)}


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_the_squared_error_of_gaussians(bits):
    weight = gaussian(256, 256)
    factor = HessianFactor.build(torch.eye(256), TRELLIS)
    found = quantize_gptq(weight, factor, bits, with_sweeps(2)).dequantize()
    error, scalar = SQUARED_ERRORS[bits]
    assert float((found - weight).square().mean()) < 1.01 * error < 0.9 * scalar


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_trellis_codes_lose_less_than_scalar_ones_of_the_same_bytes(bits):
    weight, hessian, found = gaussian(ROWS, 256), correlated_hessian(), []
    for options in (TRELLIS, dataclasses.replace(TRELLIS, codes="scalar")):
        factor = HessianFactor.build(hessian, options)
        quantized = quantize_gptq(weight, factor, bits, options)
        found.append((quantized.pack().nbytes, float(proxy_loss(weight, quantized, factor).sum())))
    (size, trellis), (scalar_size, scalar) = found
    assert size == scalar_size
    assert trellis < {1: 0.92, 2: 0.75, 3: 0.65, 4: 0.6}[bits] * scalar


@pytest.mark.parametrize("columns", [256, 192, 100, 20])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_no_sweep_raises_the_loss_of_any_row(bits, columns):
    weight = gaussian(ROWS, columns)
    factor = HessianFactor.build(correlated_hessian(columns), TRELLIS)
    before, once, often = (
        proxy_loss(weight, quantize_gptq(weight, factor, bits, with_sweeps(sweeps)), factor) for sweeps in (0, 1, 6)
    )
    assert (once <= before * (1 + 1e-4)).all() and (often <= once * (1 + 1e-4)).all()
    assert float(often.sum()) < 0.97 * float(before.sum())


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_every_sweep_lowers_the_loss_of_every_block_of_coupled_rows(bits, blocks):
    weight, outputs = gaussian(ROWS, 256), coupled_outputs(blocks)
    factor = HessianFactor.build(correlated_hessian(), TRELLIS)
    before, once, often = (
        losses_of(quantize_gptq(weight, factor, bits, with_sweeps(2, s), outputs=outputs), weight, outputs, factor)
        for s in (0, 1, 6)
    )
    assert all(x < y for x, y in zip(once, before, strict=True))
    assert all(x <= y * (1 + 1e-5) for x, y in zip(often, once, strict=True))
    assert sum(often) < 0.8 * sum(before)


@pytest.mark.parametrize("outputs", [None, coupled_outputs(2)], ids=["separate", "coupled"])
@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
def test_what_sweeps_keep_up_to_date_is_what_the_codes_decode_to(bits, outputs):
    weight, hessian = gaussian(ROWS, 256), HessianFactor.build(correlated_hessian(), TRELLIS).hessian
    codes = torch.randint(0, 1 << bits, (ROWS, 256), dtype=torch.uint8)
    scales = torch.full((ROWS, 2), 0.0625)
    ranges = torch.tensor([[2.0**-8, 0.2]]).expand(ROWS, 2).contiguous()
    iterate = Iterate(weight, bits, hessian, table_entries(codes), scales, ranges)
    first = SeparateRows().losses(iterate.error, iterate.gradient)
    for _ in range(3):
        iterate.sweep(outputs or SeparateRows())
    codes = QuantizedTrellis(bits, codes_of_entries(iterate.entries), iterate.scales.half(), 256)
    assert torch.equal(table_entries(codes.codes), iterate.entries)  # the rings close
    assert torch.equal(decode(codes.codes, bits).float() - middle_level(bits), iterate.levels)
    torch.testing.assert_close(codes.dequantize() - weight, iterate.error, rtol=0, atol=1e-5)
    torch.testing.assert_close(iterate.gradient, iterate.error @ hessian, rtol=0, atol=1e-3)
    scales_to_bytes(iterate.scales.half())  # which refuses what it cannot hold
    assert SeparateRows().losses(iterate.error, iterate.gradient).sum() < 0.3 * first.sum()


def test_another_scale_would_cost_loss():
    weight, outputs = gaussian(ROWS, 256), coupled_outputs()
    factor = HessianFactor.build(correlated_hessian(), TRELLIS)
    quantized = quantize_gptq(weight, factor, 2, with_sweeps(4, 8), outputs=outputs)
    best = losses_of(quantized, weight, outputs, factor)[0]
    for change in (0.98, 1.02):
        other = dataclasses.replace(quantized, scales=(quantized.scales.float() * change).half())
        assert losses_of(other, weight, outputs, factor)[0] > best


def test_columns_are_quantised_ring_by_ring_the_most_important_first():
    importance = torch.ones(72)
    importance[40] = 5.0
    order = ring_order(importance)
    assert order[:8].tolist() == [32, 36, 40, 44, 48, 52, 56, 60]
    assert order[32:40].tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
    assert order[64:].tolist() == [64, 68, 65, 69, 66, 70, 67, 71]  # a ring of 8 columns


def test_inputs_that_are_always_zero_disturb_nothing():
    hessian = correlated_hessian()
    hessian[:40], hessian[:, :40] = 0, 0
    weight = gaussian(ROWS, 256)
    found = quantize_gptq(weight, HessianFactor.build(hessian, TRELLIS), 2, with_sweeps(2)).dequantize()
    assert float((found - weight)[:, :40].square().mean()) < 0.12


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_hessians_of_few_tokens_have_factors(damping):
    """Of rank 8, and as little damped as they can be."""
    options = dataclasses.replace(with_sweeps(2), damping=damping)
    weight, factor = gaussian(), HessianFactor.build(correlated_hessian(tokens=8), options)
    found = quantize_gptq(weight, factor, 2, options)
    first = quantize_gptq(weight, factor, 2, dataclasses.replace(options, refinement_sweeps=0))
    loss, first_loss = (float(proxy_loss(weight, matrix, factor).sum()) for matrix in (found, first))
    assert loss < 0.9 * first_loss


def test_rows_do_not_depend_on_how_they_are_shared_out():
    weight, factor = gaussian(300), HessianFactor.build(correlated_hessian(), TRELLIS)
    threads, codes = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            first = quantize_gptq(weight, factor, 2, with_sweeps(0))
            codes.append(first.codes)
    finally:
        torch.set_num_threads(threads)
    assert (codes[0] == codes[1]).float().mean() > 0.999  # products of other threads round differently


def test_on_a_device_come_the_codes_of_the_cpu():
    """Coupled rows, and a last group that is not whole."""
    of_cpu, of_device = child_process.result_of(_codes_of_both_devices)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(of_cpu, of_device, strict=True))


def _codes_of_both_devices() -> list[list[np.ndarray]]:
    from tests.calibration.pretend_device import PRETEND

    weight, hessian, found = gaussian(ROWS, 200), correlated_hessian(200), []
    for device in ("cpu", PRETEND):
        outputs = coupled_outputs(2)
        outputs = OutputHessian([r.to(device) for r in outputs.rows], [b.to(device) for b in outputs.blocks])
        factor = HessianFactor.build(hessian.to(device), TRELLIS)
        matrix = quantize_gptq(weight.to(device), factor, 2, with_sweeps(1, 1), outputs=outputs)
        assert matrix.codes.device == matrix.dequantize().device == torch.device(device)
        found.append([tensor.cpu().numpy() for tensor in (matrix.codes, matrix.scales, matrix.dequantize())])
    return found


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="trellis codes go with metadata 'float8'"):
        GPTQOptions(codes="trellis")
    factor = HessianFactor.build(correlated_hessian(), REFINED)
    with pytest.raises(ValueError, match=r"experts\.5\.down: its HessianFactor was not built for trellis codes"):
        quantize_gptq(gaussian(), factor, 2, TRELLIS, name="experts.5.down")
    factor = HessianFactor.build(correlated_hessian(), TRELLIS)
    with pytest.raises(ValueError, match=r"experts\.5\.down: .* need scales below float8's smallest"):
        quantize_gptq(1e-6 * gaussian(), factor, 2, TRELLIS, name="experts.5.down")


def test_a_format_without_trellis_codes_refuses_them():
    """Read as scalar codes they would be other weights."""
    factor = HessianFactor.build(correlated_hessian(), TRELLIS)
    matrix = quantize_gptq(gaussian(), factor, 2, with_sweeps(0)).pack()
    with pytest.raises(ValueError, match="format version 2 has no trellis codes"):
        Shard().add_matrix("experts.5.down", matrix, 2)


def test_eight_bits_stay_scalar():
    factor = HessianFactor.build(correlated_hessian(), TRELLIS)
    assert not isinstance(quantize_gptq(gaussian(), factor, 8, TRELLIS), QuantizedTrellis)


def test_parts_of_a_quantised_matrix_undo_stacking():
    weight, factor = gaussian(), HessianFactor.build(correlated_hessian(), TRELLIS)
    matrix = quantize_gptq(weight, factor, 3, with_sweeps(0))
    rows = (slice(0, 4), slice(4, len(weight)))
    assert torch.equal(torch.cat([matrix.part(part).dequantize() for part in rows]), matrix.dequantize())


def test_refinement_goes_back_where_a_row_got_worse():
    """refine keeps every row's best state, entries and scales."""
    weight, hessian = gaussian(ROWS, 128), HessianFactor.build(correlated_hessian(128), TRELLIS).hessian
    codes = torch.randint(0, 4, (ROWS, 128), dtype=torch.uint8)
    ranges = torch.tensor([[2.0**-8, 0.2]]).expand(ROWS, 2).contiguous()
    iterate = Iterate(weight, 2, hessian, table_entries(codes), torch.full((ROWS, 1), 0.0625), ranges)
    refine(iterate, 1)
    best, state = SeparateRows().losses(iterate.error, iterate.gradient), [t.clone() for t in iterate.state()]

    class Worse(SeparateRows):
        def descend(self, loops, by_row, *shared, written):
            super().descend(loops, by_row, *shared, written=written)
            by_row[4][:] += 0.5 * by_row[1]  # change: other weights than the entries', by half a level

    refine(iterate, 1, Worse())
    after = SeparateRows().losses(iterate.error, iterate.gradient)
    assert (after <= best * (1 + 1e-4)).all()
    assert all(torch.equal(found, kept) for found, kept in zip(iterate.state(), state, strict=True))
