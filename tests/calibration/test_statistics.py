import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.calibration.conftest import LENGTH, QUICK, SEQUENCES, layerwise
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions
from vllm_mcmoe.calibration.matrix.grids import quantize_rtn
from vllm_mcmoe.calibration.measure import expert_errors
from vllm_mcmoe.calibration.measure.factors import Factors, LayerFactors
from vllm_mcmoe.calibration.measure.sensitivity import _output_gradients, backward_traces, forward_traces, sample_labels
from vllm_mcmoe.calibration.measure.statistics import _measure_layer, measure, routing_statistics
from vllm_mcmoe.calibration.measure.super_experts import flag_super_experts
from vllm_mcmoe.calibration.model.text import load_sequences
from vllm_mcmoe.calibration.pipeline import calibrate
from vllm_mcmoe.calibration.recipes import RECIPES, find_recipe
from vllm_mcmoe.errors import PlanError

LAYER = "model.layers.2.block_sparse_moe.experts"
RTN = dataclasses.replace(QUICK, name="rtn", error_quantizer="rtn")


@pytest.fixture(scope="module")
def sequences(reference_model, calibration_files):
    tokenizer = AutoTokenizer.from_pretrained(reference_model)
    return load_sequences(calibration_files, tokenizer, sequences=SEQUENCES, length=LENGTH)


@pytest.fixture(scope="module")
def rtn_calibration(reference_model, sequences):
    return measure(layerwise(reference_model), sequences, recipe=RTN)


@pytest.fixture(scope="module")
def transformers_model(reference_model):
    return AutoModelForCausalLM.from_pretrained(reference_model, dtype=torch.float32, experts_implementation="eager")


def log_probs(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.log_softmax(-1)


def test_what_all_rows_cost_is_learnt_from_some(reference_model, calibration_files):
    """Of 512 units and 256 features 64 are quantised, of every expert of a layer at 2 bits: what they cost alone is an
    eighth or a quarter, and not that part of the whole, because rows differ and add up."""
    tokenizer = AutoTokenizer.from_pretrained(reference_model)
    sequences = load_sequences(calibration_files, tokenizer, sequences=8 * SEQUENCES, length=LENGTH)
    refined = dataclasses.replace(RECIPES["mcmoe"], gptq=GPTQOptions(act_order=True, refinement_sweeps=8))
    some = dataclasses.replace(refined, measured_rows=64)
    traces = backward_traces(layerwise(reference_model), sequences.tokens, show_progress=False)
    trace = next(traces)  # whose layer is loaded as long as the iterator is
    found = {
        name: [expert_errors.measure_expert(trace, expert, recipe, (2,), None) for expert in range(8)]
        for name, recipe in (("all", refined), ("some", some))
    }

    def relative(part: str) -> torch.Tensor:
        """To what is measured on all rows."""
        values = {
            which: torch.tensor([e.error[2] if part == "error" else e.loss_increase[part][2] for e in found[which]])
            for which in found
        }
        return values["some"] / values["all"]

    for part in ("gate_up", "down"):
        assert (relative(part) - 1).abs().median() < 0.12, part
        assert (relative(part) - 1).abs().max() < 0.3, part
    assert (relative("error") - 1).abs().max() < 0.1
    assert [e.down_output_max for e in found["some"]] == [e.down_output_max for e in found["all"]]


def test_small_matrices_are_measured_whole(reference_model, sequences):
    """The reference model's are: what `normal` measures of larger ones is the same there, to the last bit."""
    traces = forward_traces(layerwise(reference_model), sequences.tokens)
    trace = next(traces)
    rows = [find_recipe("mcmoe", effort).measured_rows for effort in ("normal", "best")]
    assert rows == [256, None]
    recipes = [dataclasses.replace(RECIPES["mcmoe"], measured_rows=count) for count in rows]
    first, second = (expert_errors.measure_expert(trace, 0, recipe, (1, 3), None) for recipe in recipes)
    assert first == second


def test_some_sequences_are_measured_and_their_gradients_stand_where_they_belong(reference_model, sequences):
    """Half of them, evenly spaced: what is measured is what measuring these alone gives, but for the places of the
    gradients, which quantising looks up among all tokens."""
    model, length = layerwise(reference_model), sequences.tokens.shape[1]
    half = dataclasses.replace(RTN, gptq=dataclasses.replace(RTN.gptq, output_sweeps=1))
    chosen = dataclasses.replace(sequences, tokens=sequences.tokens[::2])
    some = dataclasses.replace(half, measured_tokens=chosen.tokens.numel() + length - 1)
    found, alone = measure(model, sequences, recipe=some), measure(model, chosen, recipe=half)
    assert found.factors.layers == alone.factors.layers
    assert found.factors.tokens == chosen.tokens.numel()
    assert found.gradient_norms == {}  # those of some tokens would be taken for those of the first
    places = torch.arange(sequences.tokens.numel()).view(-1, length)[::2].flatten()
    for name, gradients in found.output_gradients.items():
        assert torch.equal(gradients.tokens, places)
        assert torch.equal(gradients.values, alone.output_gradients[name].values)
    weighted = dataclasses.replace(some, hessian_weighting="gradient")
    assert measure(model, sequences, recipe=weighted, widths=()).factors.tokens == sequences.tokens.numel()


def test_effort_is_for_recipes_by_name():
    assert find_recipe("mcmoe", "best") == RECIPES["mcmoe"]
    assert [find_recipe("mcmoe", effort).bfloat16_products for effort in ("fast", "normal", "best")] == [1, 1, 0]
    assert find_recipe("paper-code", "normal") == RECIPES["paper-code"]
    sweeps = [find_recipe("mcmoe", effort).gptq.refinement_sweeps for effort in ("fast", "normal", "best")]
    assert sweeps == [2, 4, 8]
    assert find_recipe(QUICK, "fast") is QUICK
    with pytest.raises(ValueError, match="effort 'heroic' is not one of fast, normal, best"):
        find_recipe("mcmoe", "heroic")
    with pytest.raises(PlanError, match="recipe paper-code has scalar codes alone"):  # the command line shows it
        find_recipe("paper-code", codes="trellis")


def test_routing_weights_are_counted_before_renormalisation_and_only_where_selected():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    ids = torch.tensor([[0, 1], [2, 1]])
    count, weight_sum = routing_statistics(probs, ids)
    assert count.tolist() == [1, 2, 1]
    assert weight_sum.tolist() == pytest.approx([0.5, 0.5, 0.7], rel=1e-6)


def test_every_token_activates_top_k_experts_in_every_layer(rtn_calibration, sequences):
    factors = rtn_calibration.factors
    for layer in factors.layers.values():
        assert sum(layer.activation_count) == factors.tokens * factors.top_k
        assert 0 < sum(layer.routing_weight_sum) < factors.tokens
    assert factors.tokens == sequences.tokens.numel()


def test_the_error_is_the_norm_of_the_layer_outputs_change(reference_model, sequences, rtn_calibration):
    """Against the model's own experts module with one expert's weights replaced."""
    expert, width = 3, 2
    for trace in forward_traces(layerwise(reference_model), sequences.tokens):
        if trace.name == LAYER:
            experts, inputs = trace.layer.module.mlp.experts, trace.inputs
            arguments = (inputs.x, inputs.topk_ids, inputs.topk_weights)
            with torch.no_grad():
                before = experts(*arguments)
                for stack in (experts.gate_up_proj, experts.down_proj):
                    stack[expert] = quantize_rtn(stack[expert], width, search="minmax").dequantize()
                change = (experts(*arguments) - before).norm()
    measured = rtn_calibration.factors.layers[LAYER].quantization_error[width][expert]
    assert measured == pytest.approx(float(change), rel=1e-4)  # float32 sums in another order


def test_gradients_equal_autograd_through_the_whole_model(reference_model, sequences, transformers_model):
    tokens = sequences.tokens[:2]
    model = layerwise(reference_model)
    gradients = {trace.name: trace.gradients for trace in backward_traces(model, tokens, seed=5)}

    outputs, handles = [], []
    for layer in transformers_model.model.layers:
        keep = lambda module, args, output: (output.retain_grad(), outputs.append(output))[0]  # noqa: E731
        handles.append(layer.mlp.experts.register_forward_hook(keep))
    logits = transformers_model(tokens).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(5)
    labels = sample_labels(logits.detach(), generator)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for output, gradient in zip(outputs, gradients.values().__reversed__(), strict=True):
        assert torch.allclose(output.grad, gradient, atol=1e-5 * float(output.grad.abs().max()))


def test_sampled_labels_have_the_softmax_distribution():
    logits = torch.tensor([0.0, 1.0, -30.0, 2.0])
    labels = sample_labels(logits.expand(20000, 4), torch.Generator().manual_seed(0))
    frequency = labels.bincount(minlength=4) / 20000
    # a binomial's standard deviation is at most 0.0035 here
    assert torch.allclose(frequency, logits.softmax(0), atol=0.015)


def test_labels_are_sampled_from_the_models_own_predictions(reference_model, sequences):
    """The gradient's expectation over such labels is zero, so the mean of 64 samples shrinks by a factor of 8."""
    model = layerwise(reference_model)
    with torch.no_grad():
        hidden = model.embed(sequences.tokens[:1])
    gradients = torch.stack([next(_output_gradients(model, hidden, seed)) for seed in range(64)])
    mean, single = gradients.mean(0).norm(), gradients[0].norm()
    assert mean < 2 * single / math.sqrt(64)


def test_predicted_loss_increase_is_the_kl_divergence_of_quantising_the_part(
    reference_model, sequences, transformers_model, rtn_calibration
):
    """Summed over all experts of a layer, at 4 bits, where the second order suffices. One sampled label per token
    leaves about 10% of noise in a sum over 1024 tokens and 8 experts; cross terms between experts about as much."""
    before = log_probs(transformers_model, sequences.tokens)
    stack = transformers_model.model.layers[2].mlp.experts.down_proj
    original = stack.data.clone()
    for expert in range(8):
        stack.data[expert] = quantize_rtn(original[expert], 4, search="minmax").dequantize()
    after = log_probs(transformers_model, sequences.tokens)
    stack.data.copy_(original)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    predicted = sum(rtn_calibration.factors.layers[LAYER].loss_increase["down"][4])
    assert predicted == pytest.approx(kl, rel=0.4)


def test_more_bits_cost_less_everywhere(rtn_calibration):
    for layer in rtn_calibration.factors.layers.values():
        tables = [layer.quantization_error, *layer.loss_increase.values()]
        for table in tables:
            assert all(fine < coarse for coarse, fine in zip(table[2], table[4], strict=True))


def test_gptq_errors_are_smaller_than_round_to_nearest(reference_model, sequences, rtn_calibration):
    gptq = measure(layerwise(reference_model), sequences, recipe=QUICK, widths=(2,)).factors
    for name, layer in gptq.layers.items():
        rtn = rtn_calibration.factors.layers[name].quantization_error[2]
        assert sum(layer.quantization_error[2]) < 0.8 * sum(rtn)


def test_recipes_without_gradients_are_measured_forward_only(reference_model, sequences):
    calibration = measure(layerwise(reference_model), sequences, recipe="paper-code")
    assert calibration.gradient_norms == {}
    for layer in calibration.factors.layers.values():
        assert layer.loss_increase is None
        assert sorted(layer.quantization_error) == [1, 2, 3]


def test_a_uniform_allocation_needs_counts_only(reference_model, sequences):
    factors = measure(layerwise(reference_model), sequences, recipe="uniform").factors
    assert all(layer.quantization_error == {} for layer in factors.layers.values())
    plan = allocate(factors, recipe="uniform", bits=2.25)
    assert all(widths == [2] * 8 for layer in plan.layers.values() for widths in layer.values())


def test_forward_and_backward_sweeps_see_the_same_experts(reference_model, sequences):
    recipe = dataclasses.replace(RTN, objective="weighted_error")
    forward = measure(layerwise(reference_model), sequences, recipe=recipe, widths=(2,)).factors
    backward = measure(layerwise(reference_model), sequences, recipe=RTN, widths=(2,)).factors
    assert list(forward.layers) == list(backward.layers)
    for name, layer in forward.layers.items():
        assert layer.activation_count == backward.layers[name].activation_count
        assert layer.quantization_error[2] == pytest.approx(backward.layers[name].quantization_error[2], rel=1e-4)


def test_gradient_norms_have_mean_one_and_one_entry_per_token(rtn_calibration, sequences):
    for norms in rtn_calibration.gradient_norms.values():
        assert norms.shape == (sequences.tokens.numel(),)
        assert float(norms.mean()) == pytest.approx(1, rel=1e-5)


def test_calibration_is_deterministic(reference_model, calibration_files, rtn_calibration):
    options = {"recipe": RTN, "sequences": SEQUENCES, "length": LENGTH}
    again = calibrate(reference_model, calibration_files, **options)
    assert dataclasses.replace(again, linears=None) == rtn_calibration.factors  # which were measured without linears


def test_another_seed_samples_other_labels(reference_model, calibration_files, rtn_calibration):
    other = calibrate(
        reference_model, calibration_files, recipe=RTN, sequences=SEQUENCES, length=LENGTH, widths=(2,), seed=1
    )
    first = rtn_calibration.factors.layers[LAYER].loss_increase["down"][2]
    assert other.layers[LAYER].loss_increase["down"][2] != first


def test_factors_survive_the_file_and_can_be_allocated(rtn_calibration, tmp_path):
    rtn_calibration.factors.save(tmp_path / "factors.json")
    plan = allocate(Factors.load(tmp_path / "factors.json"), recipe=RTN, bits=3.0)
    assert plan.average_bits <= 3.0
    assert list(plan.layers) == list(rtn_calibration.factors.layers)


def test_qwen3_is_measured_on_its_moe_layers(qwen3_model, calibration_files):
    factors = calibrate(qwen3_model, calibration_files, recipe=QUICK, sequences=4, length=64)
    assert list(factors.layers) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    for layer in factors.layers.values():
        assert layer.shapes == {"gate_up": [256, 128], "down": [128, 128]}
        assert sum(layer.activation_count) == 4 * 64 * 3


def test_an_expert_without_tokens_costs_nothing(reference_model, sequences):
    model = layerwise(reference_model)
    traces = backward_traces(model, sequences.tokens[:2])  # a trace is valid while its generator lives
    trace = next(traces)
    rerouted = torch.where(trace.inputs.topk_ids == 5, 0, trace.inputs.topk_ids)
    trace = dataclasses.replace(trace, inputs=dataclasses.replace(trace.inputs, topk_ids=rerouted))
    layer = _measure_layer(trace, model.description, QUICK, (2,), None)
    assert layer.activation_count[5] == 0
    assert layer.quantization_error[2][5] == 0
    assert layer.loss_increase["down"][2][5] == 0
    assert layer.down_output_max[5] == 0


def make_factors(maxima) -> Factors:
    ones = [1.0] * len(maxima[0])
    layers = {
        f"layer{i}": LayerFactors(ones, ones, {2: ones}, down_output_max=list(row)) for i, row in enumerate(maxima)
    }
    return Factors(model="m", tokens=1, top_k=1, layers=layers)


def test_super_experts_exceed_percentile_and_tenth_of_maximum_where_massive_activations_form():
    maxima = [[1.0] * 100 for _ in range(4)]
    maxima[1][7], maxima[3][9] = 500.0, 400.0
    factors, messages = make_factors(maxima), []
    flag_super_experts(factors, {"layer1"}, messages.append)
    assert {name: layer.super_experts for name, layer in factors.layers.items()} == {
        "layer0": [],
        "layer1": [7],
        "layer2": [],
        "layer3": [],
    }
    assert "layer1: super experts [7]" in messages[0]


def test_an_ordinary_model_has_no_super_experts(rtn_calibration):
    assert all(layer.super_experts == [] for layer in rtn_calibration.factors.layers.values())


def test_an_expert_that_makes_massive_activations_is_found(sequences, editable_model):
    name = "model.layers.1.block_sparse_moe.experts.6.w2.weight"
    tensors = load_file(editable_model / "model.safetensors")
    tensors[name][17] *= 2000  # one output feature of one expert
    save_file(tensors, editable_model / "model.safetensors")
    recipe = RECIPES["paper-code"]
    factors = measure(layerwise(editable_model), sequences, recipe=recipe, widths=(3,)).factors
    flagged = {name: layer.super_experts for name, layer in factors.layers.items() if layer.super_experts}
    assert flagged == {"model.layers.1.block_sparse_moe.experts": [6]}
