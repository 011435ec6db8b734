"""Quantising under the Hessians of outputs: tr(H_out E H_in E^T), and where H_out comes from."""

import dataclasses
import math

import pytest
import torch
from numba import njit

from tests.calibration.conftest import QUICK, layerwise
from tests.calibration.test_gptq import REFINED, correlated_hessian
from tests.calibration.test_quantizers import gaussian
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions, HessianFactor, quantize_gptq
from vllm_mcmoe.calibration.matrix.grids import search_grid
from vllm_mcmoe.calibration.matrix.refinement import Iterate, refine
from vllm_mcmoe.calibration.matrix.row_loops import _to_fp16
from vllm_mcmoe.calibration.matrix.two_sided import OUTPUT_DAMPING, OutputHessian
from vllm_mcmoe.calibration.measure.expert_tokens import MoeInputs
from vllm_mcmoe.calibration.measure.output_gradients import OutputGradients, output_hessians
from vllm_mcmoe.calibration.measure.statistics import measure
from vllm_mcmoe.calibration.model.description import MoeModel, describe_model
from vllm_mcmoe.calibration.model.experts import Expert
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.calibration.pipeline import quantize, quantize_model
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.expert_function import GPT_OSS, SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import WIDTHS, middle_zero, scales_to_bytes

ROWS = 96


def with_output_sweeps(sweeps: int):
    return dataclasses.replace(REFINED, output_sweeps=sweeps)


def coupled_outputs(blocks: int = 1, seed: int = 3) -> OutputHessian:
    """Rows of a block alternate with those of the others."""
    rows = [torch.arange(first, ROWS, blocks) for first in range(blocks)]
    return OutputHessian.build(rows, [correlated_hessian(len(r), tokens=256, seed=seed + len(r)) for r in rows], 10**6)


def two_bits(model: MoeModel) -> Plan:
    return Plan(layers={name: {"gate_up": [2] * 8, "down": [2] * 8} for name in model.moe_layers.values()})


def losses(weight, outputs, factor, bits, sweeps) -> list[float]:
    """Of each block of rows."""
    quantized = quantize_gptq(weight, factor, bits, with_output_sweeps(sweeps), outputs=outputs)
    return losses_of(quantized, weight, outputs, factor)


def losses_of(quantized, weight, outputs, factor) -> list[float]:
    error = (quantized.dequantize() - weight).double()
    return [
        float((block.double() @ error[rows] @ factor.hessian.double() * error[rows]).sum())
        for rows, block in zip(outputs.rows, outputs.blocks, strict=True)
    ]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("columns", "blocks"), [(256, 1), (256, 3), (192, 1), (100, 2)])
def test_every_sweep_lowers_the_loss_of_every_block_of_rows(bits, columns, blocks):
    weight, outputs = gaussian(ROWS, columns), coupled_outputs(blocks)
    factor = HessianFactor.build(correlated_hessian(columns), REFINED)
    before, once, often = (losses(weight, outputs, factor, bits, sweeps) for sweeps in (0, 1, 8))
    assert all(x < y for x, y in zip(once, before, strict=True))
    assert all(x <= y * (1 + 1e-5) for x, y in zip(often, once, strict=True))
    assert sum(often) < (0.97 if bits == 8 else 0.8) * sum(before)  # the fp16 of zeros and scales is felt at 8


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_outputs_that_all_matter_alike_change_next_to_nothing(bits):
    """Uncoupled rows are the problem that refinement has solved already."""
    weight, factor = gaussian(ROWS, 256), HessianFactor.build(correlated_hessian(), REFINED)
    outputs = OutputHessian.build([torch.arange(ROWS)], [torch.eye(ROWS)], 1000)
    before, after = (losses(weight, outputs, factor, bits, sweeps)[0] for sweeps in (0, 8))
    assert 0.98 * before < after <= before


def test_rows_do_not_hear_of_those_in_other_blocks():
    weight, outputs = gaussian(ROWS, 256), coupled_outputs(blocks=2)
    factor = HessianFactor.build(correlated_hessian(), REFINED)
    together = quantize_gptq(weight, factor, 2, with_output_sweeps(1), outputs=outputs)
    for rows, block in zip(outputs.rows, outputs.blocks, strict=True):
        alone = OutputHessian([torch.arange(len(rows))], [block])
        part = quantize_gptq(weight[rows], factor, 2, with_output_sweeps(1), outputs=alone)
        # products of other sizes round differently, which moves a code now and then
        assert (part.codes == together.codes[rows]).float().mean() > 0.99


@pytest.mark.parametrize("metadata", ["float16", "float8"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_and_zeros_are_stored_as_the_sweeps_computed_with_them(bits, metadata):
    """Rounding them again would move them away from the codes that were chosen for them."""
    weight, factor = gaussian(ROWS, 256), HessianFactor.build(correlated_hessian(), REFINED)
    grid = search_grid(weight, bits, metadata)
    iterate = Iterate(weight, grid.encode(weight), grid, factor.hessian)
    for sweeps, outputs in ((2, None), (2, coupled_outputs())):
        refine(iterate, sweeps, outputs)
        for values in (grid.scales, grid.zeros):
            assert torch.equal(values, values.half().float())
        if metadata == "float8":
            scales_to_bytes(grid.scales.half())  # which refuses what it cannot hold
            assert (grid.zeros == middle_zero(bits)).all()
    torch.testing.assert_close(iterate.error, grid.decode(iterate.codes) - weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(iterate.gradient, iterate.error @ factor.hessian, rtol=0, atol=1e-3)


def test_another_scale_would_cost_loss():
    weight, outputs = gaussian(ROWS, 256), coupled_outputs()
    factor = HessianFactor.build(correlated_hessian(), REFINED)
    quantized = quantize_gptq(weight, factor, 2, with_output_sweeps(8), outputs=outputs)
    best = losses(weight, outputs, factor, 2, 8)[0]
    for change in (0.99, 1.01):
        other = dataclasses.replace(quantized, scales=(quantized.scales.float() * change).half())
        error = other.dequantize() - weight
        assert float((outputs.blocks[0] @ error @ factor.hessian * error).sum()) > best


@njit
def to_fp16(values):
    """As the kernels call it."""
    return [_to_fp16(value) for value in values]


def test_scales_and_zeros_are_rounded_as_fp16_rounds_them():
    torch.manual_seed(0)
    smallest, largest = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
    values = torch.exp(torch.empty(20000).uniform_(math.log(smallest), math.log(largest)))
    values = torch.cat([values, -values, torch.empty(1000).uniform_(-smallest, smallest)])
    values = torch.cat([values, torch.tensor([0.0, smallest, largest, 1 + 2**-11, 1 + 3 * 2**-11])])
    assert torch.equal(torch.tensor(to_fp16(values.numpy())), values.half().float())


def test_outputs_that_the_loss_never_feels_are_refined_as_if_all_alike():
    weight, factor = gaussian(ROWS, 256), HessianFactor.build(correlated_hessian(), REFINED)
    nothing = OutputHessian.build([torch.arange(ROWS)], [torch.zeros(ROWS, ROWS)], 10 * ROWS)
    assert torch.equal(nothing.blocks[0], (OUTPUT_DAMPING + 0.1) * torch.eye(ROWS))
    assert quantize_gptq(weight, factor, 2, with_output_sweeps(2), outputs=nothing).dequantize().isfinite().all()


def test_gradients_that_are_not_finite_are_refused_by_name():
    with pytest.raises(ValueError, match="layer 3 down: the loss gradients at its outputs"):
        OutputHessian.build([torch.arange(2)], [torch.full((2, 2), torch.nan)], 9, name="layer 3 down")


EXPERTS = {
    "silu": (SILU, False, False),
    "gpt-oss": (GPT_OSS, True, True),
    "without a gate": (ExpertFunction("relu2", gated=False), False, False),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_moments_are_those_of_the_losss_own_derivatives(kind):
    """By finite differences of what a change of gate_up's outputs changes of the loss, in float64."""
    function, interleaved, biased = EXPERTS[kind]
    torch.manual_seed(0)
    hidden, units, tokens = 6, 5, 400
    rows = function.factor * units
    expert = Expert(
        function, interleaved, torch.randn(rows, hidden), torch.randn(hidden, units),
        torch.randn(rows) if biased else None, torch.randn(hidden) if biased else None,
    )  # fmt: skip
    ids = torch.stack([torch.arange(tokens) % 2, 2 + torch.arange(tokens) % 2], dim=1)
    inputs = MoeInputs(torch.randn(tokens, hidden), ids, torch.rand(tokens, 2), torch.device("cpu"))
    gradients = OutputGradients(torch.arange(tokens), torch.randn(tokens, hidden).bfloat16())
    found = output_hessians(expert, 0, inputs, gradients, "expert")
    own = torch.arange(0, tokens, 2)  # those with expert 0 in their first slot
    felt = gradients.values[own].double() * inputs.topk_weights[own, :1]
    exact = dataclasses.replace(
        expert, **{k: getattr(expert, k).double() for k in ("gate_up", "down")},
        gate_up_bias=expert.gate_up_bias.double() if biased else None,
    )  # fmt: skip
    projected = exact.projected(inputs.x[own].double())
    derivatives = torch.empty(len(own), rows, dtype=torch.float64)
    for row in range(rows):
        step = torch.zeros(rows, dtype=torch.float64)
        step[row] = 1e-6
        change = exact.activated(projected + step) - exact.activated(projected - step)
        derivatives[:, row] = (felt * (change @ exact.down.t())).sum(1) / 2e-6
    for part, at_outputs in (("gate_up", derivatives), ("down", felt)):
        order = found[part].rows[0]
        damping = OUTPUT_DAMPING + at_outputs.shape[1] / len(own)
        moment = (at_outputs.t() @ at_outputs)[order][:, order]
        expected = moment / moment.diagonal().mean() + damping * torch.eye(len(moment))
        torch.testing.assert_close(found[part].blocks[0].double(), expected, rtol=1e-3, atol=1e-3)


def test_an_expert_of_few_kept_tokens_has_none():
    torch.manual_seed(0)
    expert = Expert(SILU, False, torch.randn(8, 4), torch.randn(4, 4), None, None)
    inputs = MoeInputs(torch.randn(300, 4), torch.arange(300)[:, None] % 2, torch.rand(300, 1), torch.device("cpu"))
    for every, found in ((1, True), (2, True), (3, False)):  # 150, 150 (the even ones are expert 0's), 50
        kept = torch.arange(0, 300, every)
        gradients = OutputGradients(kept, torch.randn(len(kept), 4).bfloat16())
        assert (output_hessians(expert, 0, inputs, gradients, "expert") is not None) == found


def test_loss_is_lower_on_text_that_was_not_calibrated_on(tmp_path, reference_model, calibration_files):
    """Uniform 2 bits; a quarter less with the whole calibration text, 16% with this quarter of it and eight sweeps."""
    model, sizes = describe_model(reference_model), {"sequences": 32, "length": 256}
    plan = two_bits(model)
    text = sorted(calibration_files[0].parent.glob("*.evaluation.txt"))
    kl = []
    for sweeps in (0, 4):
        gptq = GPTQOptions(act_order=True, refinement_sweeps=2, output_sweeps=sweeps)
        recipe = dataclasses.replace(QUICK, gptq=gptq)
        out = tmp_path / str(sweeps)
        quantize(reference_model, out, calibration_files, plan=plan, recipe=recipe, linear_bits=16, **sizes)
        kl.append(evaluate(out, text, against=reference_model, sequences=10, length=128).mean_kl)
    assert kl[1] < 0.92 * kl[0]


def test_gradients_are_wanted_by_name_where_they_are_not_measured_on_the_way(
    tmp_path, reference_model, calibration_files
):
    model = layerwise(reference_model)
    sequences = load_calibration_data(model.description, calibration_files, 2, 64, lambda message: None)
    recipe = dataclasses.replace(QUICK, gptq=with_output_sweeps(1))
    options = {"plan": two_bits(model.description), "sequences": sequences, "recipe": recipe, "linear_bits": 16}
    with pytest.raises(PlanError, match="pass measure's output_gradients"):
        quantize_model(model, tmp_path / "out", **options)
    assert measure(model, sequences, recipe=recipe, widths=(), for_quantizing=False).output_gradients == {}
    measured = measure(model, sequences, recipe=recipe, widths=())
    quantize_model(model, tmp_path / "out", output_gradients=measured.output_gradients, **options)
    assert (tmp_path / "out" / "config.json").exists()
