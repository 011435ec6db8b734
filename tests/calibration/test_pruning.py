"""Calibrating pruning rules: costs against their definition, the division of the budget against brute force, and the
rules themselves on the reference model."""

import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.calibration.conftest import LENGTH
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import open_weights
from vllm_mcmoe.calibration.evaluate.experts_forward import layer_rules
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_sequences
from vllm_mcmoe.calibration.prune import rules as rules_module
from vllm_mcmoe.calibration.prune.costs import RoutedTokens, best_renormalization, drop_costs, mask_costs, routed_tokens
from vllm_mcmoe.calibration.prune.odp import GRID, allocated_thresholds, divide_budget, measure_curves
from vllm_mcmoe.calibration.prune.otp import router_scores, train_mask_router
from vllm_mcmoe.calibration.prune.prune import prune, write_rules
from vllm_mcmoe.calibration.prune.rules import calibrate_rules, target_levels
from vllm_mcmoe.errors import PruningError
from vllm_mcmoe.kernels.reference.pruning import by_weight, drop, renormalized

LAYER = "model.layers.0.block_sparse_moe.experts"


def made_up_tokens(count: int = 64, top_k: int = 3, hidden: int = 8, experts: int = 5, seed: int = 0) -> RoutedTokens:
    generator = torch.Generator().manual_seed(seed)
    return RoutedTokens(
        name=LAYER,
        x=torch.randn(count, hidden, generator=generator),
        weights=torch.rand(count, top_k, generator=generator).sort(descending=True).values + 0.01,
        ids=torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(count)]),
        products=torch.randn(count, top_k, generator=generator),
    )


# ---- costs


def test_a_masks_cost_is_half_the_squared_gradient_product_of_the_outputs_change():
    tokens, strength = made_up_tokens(), torch.tensor(0.4)
    keep = torch.tensor([True, False, True]).expand(64, 3)
    costs = mask_costs(tokens, keep, strength)
    for token in range(64):
        weights, products = tokens.weights[token].tolist(), tokens.products[token].tolist()
        factor = 1 + 0.4 * (sum(weights) / (weights[0] + weights[2]) - 1)
        after = factor * (weights[0] * products[0] + weights[2] * products[2])
        change = after - sum(w * p for w, p in zip(weights, products, strict=True))
        assert costs[token].item() == pytest.approx(0.5 * change**2, rel=1e-4, abs=1e-7)


def test_drop_costs_add_up_to_the_cost_of_keeping_the_first_experts():
    tokens, strength = made_up_tokens(top_k=4), torch.tensor(0.2)
    costs = drop_costs(tokens, strength)
    for kept in (1, 2, 3):
        keep = (torch.arange(4) < kept).expand(64, 4)
        torch.testing.assert_close(costs[:, kept - 1 :].sum(-1), mask_costs(tokens, keep, strength))


def test_the_best_renormalisation_is_where_the_cost_is_least():
    tokens = made_up_tokens(count=500)
    tokens.products[:, 1:] = tokens.products[:, :1] * 0.4  # experts that partly stand in for each other
    keep = (torch.arange(3) < 1).expand(500, 3)
    best = best_renormalization(tokens, keep)
    assert 0 < best < 1

    def cost(strength: float) -> float:
        return mask_costs(tokens, keep, torch.tensor(strength)).double().sum().item()

    assert cost(float(best)) <= min(cost(step / 100) for step in range(101)) * (1 + 1e-6)


def test_the_predicted_cost_is_the_kl_that_dropping_really_causes(reference_model, evaluation_files):
    """To second order, for changes that are independent from token to token and flip no later router's choice: the
    second experts of the last layer are scaled by 0.5 or 1.5 at random instead of dropped."""
    text = load_sequences(evaluation_files, AutoTokenizer.from_pretrained(reference_model), sequences=10, length=LENGTH)
    model = LayerwiseModel(open_weights(reference_model))
    with torch.no_grad():
        before = torch.cat([model.logits(h) for h in _run(model, text.tokens, change=0.0)]).log_softmax(-1)
        after = torch.cat([model.logits(h) for h in _run(model, text.tokens, change=0.5)]).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    predicted = []
    for seed in range(4):
        layer = next(routed_tokens(model, text.tokens, seed=seed, show_progress=False))
        change = 0.5 * layer.weights[:, 1] * layer.products[:, 1]
        predicted.append(0.5 * change.square().mean().item())
    print(f"KL {kl:.5f}, predicted {predicted}")
    # a quarter is what sampled labels (6% each) and the terms of third order leave; a wrong factor 2 is caught
    assert sum(predicted) / 4 == pytest.approx(kl, rel=0.25)


def _run(model: LayerwiseModel, tokens: torch.Tensor, change: float) -> list[torch.Tensor]:
    """Final hidden states with the routing weights of the last layer's second experts times 1 - or 1 + change."""
    generator = torch.Generator().manual_seed(0)
    hidden = model.embed(tokens)
    for index in range(model.num_layers):
        with model.loaded_layer(index) as layer:
            compute = type(layer.module.mlp.experts).forward

            def forward(x, ids, weights, experts=layer.module.mlp.experts, compute=compute, index=index):
                signs = torch.randint(0, 2, (len(x), 1), generator=generator) * 2 - 1
                second = weights < weights.max(-1, keepdim=True).values
                changed = torch.where(second, weights * (1 + change * signs), weights)
                return compute(experts, x, ids, changed if index == model.num_layers - 1 else weights)

            with layer.experts_forward(forward):
                hidden = [layer(batch) for batch in hidden]
    return hidden


# ---- ODP


def test_the_budget_is_divided_at_least_cost():
    """Against every division of a coarse grid among three convex curves."""
    grid = torch.linspace(0, 1, GRID + 1, dtype=torch.float64)
    costs = torch.stack([2.0 * grid**2, 0.5 * grid**3, 1.0 * grid**2])
    shares = divide_budget(costs, [0.3, 0.6])
    for row, mean in zip(shares, (0.3, 0.6), strict=True):
        assert row.mean().item() == pytest.approx(mean)
        total = sum(_cost_at(curve, share) for curve, share in zip(costs, row.tolist(), strict=True))
        steps = range(0, GRID + 1, 5)
        best = min(
            sum(costs[i, q].item() for i, q in enumerate(division))
            for division in itertools.product(steps, steps, steps)
            if sum(division) == round(3 * mean * GRID)
        )
        assert total <= best + 1e-9


def _cost_at(curve: torch.Tensor, share: float) -> float:
    low = min(int(share * GRID), GRID - 1)
    return torch.lerp(curve[low], curve[low + 1], share * GRID - low).item()


def test_allocated_thresholds_drop_the_fraction_asked_for():
    layers = {f"layer {seed}": made_up_tokens(count=2000, seed=seed) for seed in range(3)}
    curves = {name: measure_curves(tokens, torch.tensor(0.0)) for name, tokens in layers.items()}
    levels = target_levels(3)
    thresholds = allocated_thresholds(curves, levels, 3)
    for position, level in enumerate(levels[:-1]):
        dropped = sum((tokens.ratios < thresholds[name][position]).sum().item() for name, tokens in layers.items())
        assert dropped / (3 * 2000 * 3) == pytest.approx(level, abs=0.005)  # half a grid step


# ---- OTP


def test_a_mask_router_learns_what_its_inputs_tell_about_the_cost():
    tokens = made_up_tokens(count=8192, top_k=2, hidden=16)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(5))
    truth = tokens.weights[:, 1:].square() * (0.5 * (tokens.x @ direction) + 0.7 * tokens.ids[:, 1])[:, None].exp()
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(6)).square()  # one gradient sample
    costs = truth * noise
    tensors = train_mask_router(tokens, costs, num_experts=5)
    scores = router_scores(tokens.x, tokens.weights, tokens.ids, tensors)
    correlation = torch.corrcoef(torch.stack((scores[:, 0], truth[:, 0].log())))[0, 1]
    untrained = torch.corrcoef(torch.stack((2 * tokens.weights[:, 1].log(), truth[:, 0].log())))[0, 1]
    print(f"correlation of log costs: {correlation:.3f}, from the routing weight alone {untrained:.3f}")
    assert correlation > 0.9 > untrained


# ---- on the reference model

BUDGET = {"sequences": 20, "length": LENGTH}


@pytest.fixture(scope="module")
def rules(mixed_checkpoint, calibration_files):
    model = LayerwiseModel(open_weights(mixed_checkpoint))
    text = load_sequences(
        calibration_files, AutoTokenizer.from_pretrained(mixed_checkpoint), sequences=64, length=LENGTH
    )
    return {m: calibrate_rules(model, text.tokens, m, 0.25, show_progress=False) for m in ("odp", "otp")}


@pytest.fixture(scope="module")
def measured(mixed_checkpoint, evaluation_files, rules):
    def run(pruning):
        return evaluate(mixed_checkpoint, evaluation_files, against=mixed_checkpoint, pruning=pruning, **BUDGET)

    model = describe_model(mixed_checkpoint)
    return {"off": run("off")} | {method: run(layer_rules(rule, model, 0.25)) for method, rule in rules.items()}


@pytest.mark.parametrize("method", ["odp", "otp"])
def test_a_quarter_of_the_activations_costs_two_percent_at_most(measured, method):
    pruned, unpruned = measured[method], measured["off"]
    print(f"{method}: pruned {pruned.pruned:.3f}, perplexity {unpruned.token_perplexity} -> {pruned.token_perplexity}")
    assert pruned.pruned == pytest.approx(0.25, abs=0.02)  # other text than the thresholds were made on
    assert pruned.token_perplexity < 1.02 * unpruned.token_perplexity
    assert unpruned.pruned == 0
    assert unpruned.mean_kl == pytest.approx(0, abs=1e-6)


class RandomPruning(torch.nn.Module):
    """Drops half of the second experts by chance."""

    counts = torch.zeros(2, dtype=torch.int64)

    def forward(self, x, topk_weights, topk_ids):
        weights, ids = by_weight(topk_weights, topk_ids)
        return drop(weights, ids, torch.rand(len(x), 1) >= 0.5, torch.tensor(0.0), self.counts)


def test_both_rules_are_far_better_than_chance(measured, mixed_checkpoint, evaluation_files):
    torch.manual_seed(0)
    rule = RandomPruning()  # one for all layers: it knows nothing of them
    layers = dict.fromkeys(describe_model(mixed_checkpoint).moe_layers.values(), rule)
    chance = evaluate(mixed_checkpoint, evaluation_files, against=mixed_checkpoint, pruning=layers, **BUDGET)
    print(f"random: pruned {chance.pruned:.3f}, KL {chance.mean_kl}; {[(m, e.mean_kl) for m, e in measured.items()]}")
    assert chance.pruned == pytest.approx(0.25, abs=0.01)
    assert measured["odp"].mean_kl < 0.3 * chance.mean_kl
    assert measured["otp"].mean_kl < 0.3 * chance.mean_kl


def test_a_rule_is_written_replaced_and_switched_off(editable_checkpoint, evaluation_files, rules):
    for method in ("odp", "otp"):
        write_rules(editable_checkpoint, rules[method])
        config = json.loads((editable_checkpoint / "config.json").read_text())["quantization_config"]
        assert config["pruning"]["method"] == method
        assert [p.name for p in editable_checkpoint.glob("pruning-*")] == [rules[method].config.file_name]
    few = {"sequences": 5, "length": LENGTH}
    fractions = [evaluate(editable_checkpoint, evaluation_files, pruning=p, **few).pruned for p in ("off", 0.1, "on")]
    assert fractions[0] == 0
    assert fractions[1] == pytest.approx(0.1, abs=0.03)
    assert fractions[2] == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("method", ["odp", "otp"])
def test_a_killed_calibration_goes_on_from_its_finished_layers(
    editable_checkpoint, calibration_files, method, monkeypatch
):
    """The rule is the same bytes, wherever activations are kept, and no finished layer is done again."""
    budget = {"method": method, "sequences": 8, "length": LENGTH, "show_progress": False}
    calibrated, calibrate_layer = [], rules_module._calibrate_layer

    def calibrate(layer, *arguments):
        if len(calibrated) == 2:
            raise KeyboardInterrupt
        calibrated.append(layer.name)
        return calibrate_layer(layer, *arguments)

    monkeypatch.setattr(rules_module, "_calibrate_layer", calibrate)
    with pytest.raises(KeyboardInterrupt):
        prune(editable_checkpoint, calibration_files, **budget)
    assert not list(editable_checkpoint.glob("pruning-*"))
    done = calibrated.copy()
    calibrated[:] = []
    prune(editable_checkpoint, calibration_files, **budget)
    assert not set(done) & set(calibrated)
    (resumed,) = editable_checkpoint.glob("pruning-*")
    monkeypatch.setattr(rules_module, "_calibrate_layer", calibrate_layer)
    resumed_bytes = resumed.read_bytes()
    prune(editable_checkpoint, calibration_files, activations="disk", **budget)
    assert [path.name for path in editable_checkpoint.glob("pruning-*")] == [resumed.name]
    assert resumed.read_bytes() == resumed_bytes
    assert not list(editable_checkpoint.parent.glob("*.partial"))


def test_asking_for_pruning_where_there_is_none_is_an_error(mixed_checkpoint, evaluation_files):
    with pytest.raises(PruningError, match=r"has no pruning rule for the target 0\.2"):
        evaluate(mixed_checkpoint, evaluation_files, pruning=0.2, **BUDGET)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "magic"}, "'magic' is not one of odp, otp"),
        ({"target": 1.0}, r"expected a fraction of expert activations in \[0, 1\)"),
        ({"target": 0.6}, "with top-2 routing at most 0.500"),
    ],
)
def test_bad_requests_are_refused_before_any_work(mixed_checkpoint, calibration_files, options, message):
    before = sorted(p.name for p in mixed_checkpoint.iterdir())
    with pytest.raises(PruningError, match=message):
        prune(mixed_checkpoint, calibration_files, **options)
    assert sorted(p.name for p in mixed_checkpoint.iterdir()) == before


def test_renormalising_keeps_the_sum_of_the_routing_weights():
    weights = torch.tensor([[0.6, 0.3, 0.1]])
    keep = torch.tensor([[True, False, True]])
    assert (renormalized(weights, keep, torch.tensor(1.0)) * keep).sum().item() == pytest.approx(1.0)
    assert torch.equal(renormalized(weights, keep, torch.tensor(0.0)), weights)
