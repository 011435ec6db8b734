"""The online rules against their definitions in plain Python, and what makes a rule unusable."""

import json
import math

import pytest
import torch

from vllm_mcmoe.errors import FormatError, PruningError
from vllm_mcmoe.pruning import (
    ActivationCounts,
    LayerPruning,
    PruningConfig,
    PruningRules,
    ratio_pruning,
    resolve_target,
)

LAYER = "model.layers.0.mlp.experts"
TOKENS, HIDDEN, EXPERTS = 40, 16, 6


def routed(top_k: int, seed: int = 0):
    """x, topk_weights and topk_ids as a router gives them, unordered: vLLM's CPU router does not sort."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights = torch.rand(TOKENS, top_k, generator=generator) + 0.01
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(TOKENS)]).int()
    return x, weights, ids


def ratio(thresholds, strength: float) -> LayerPruning:
    return ratio_pruning(torch.as_tensor(thresholds), torch.tensor(strength), EXPERTS, HIDDEN)


def learned_tensors(top_k: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "expert_bias": torch.randn(EXPERTS, generator=generator),
        "weight_slopes": torch.randn(2, top_k - 1, generator=generator),
        "projection": torch.randn(3, HIDDEN, generator=generator),
        "expert_features": torch.randn(EXPERTS, 3, generator=generator),
    }


def learned_score(tensors, x, pairs, rank) -> float:
    """a_r log w_r + b_r log w_0 + c_e + A_e . (U x)"""
    weight, expert = pairs[rank]
    a, b = tensors["weight_slopes"][:, rank - 1].tolist()
    features = [sum(u * v for u, v in zip(row, x, strict=True)) for row in tensors["projection"].tolist()]
    from_x = sum(u * v for u, v in zip(tensors["expert_features"][expert].tolist(), features, strict=True))
    return a * math.log(weight) + b * math.log(pairs[0][0]) + tensors["expert_bias"][expert].item() + from_x


def expected(x, weights, ids, score, thresholds, strength) -> list[dict[int, float]]:
    """Per token: kept expert -> routing weight, by the definition."""
    result = []
    for token in range(len(x)):
        pairs = sorted(zip(weights[token].tolist(), ids[token].tolist(), strict=True), reverse=True)
        kept = [pairs[0]]
        for rank in range(1, len(pairs)):
            if score(x[token].tolist(), pairs, rank) >= thresholds[rank - 1]:
                kept.append(pairs[rank])
        factor = 1 + strength * (sum(w for w, _ in pairs) / sum(w for w, _ in kept) - 1)
        result.append({expert: weight * factor for weight, expert in kept})
    return result


def as_dicts(weights, ids) -> list[dict[int, float]]:
    return [
        {e: w for w, e in zip(row, experts, strict=True) if e >= 0}
        for row, experts in zip(weights.tolist(), ids.tolist(), strict=True)
    ]


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("method", ["odp", "otp"])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_rules_are_their_definitions(top_k, method, strength, backend):
    x, weights, ids = routed(top_k)
    if method == "odp":
        thresholds = torch.linspace(0.3, 0.8, top_k - 1)
        rule = ratio(thresholds, strength)

        def score(x, pairs, rank):
            return pairs[rank][0] / pairs[0][0]
    else:
        thresholds, tensors = torch.zeros(top_k - 1), learned_tensors(top_k)
        rule = LayerPruning(thresholds, torch.tensor(strength), tensors)

        def score(x, pairs, rank):
            return learned_score(tensors, x, pairs, rank)

    wanted = expected(x, weights, ids, score, thresholds.tolist(), strength)
    rule = rule.on_device(torch.device("cpu"), backend)
    got = as_dicts(*rule(x, weights, ids))
    assert [set(token) for token in got] == [set(token) for token in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-5)  # float32 sums in another order
    kept = sum(map(len, got))
    assert TOKENS < kept < TOKENS * top_k, "a rule that keeps or drops everything shows nothing"
    assert rule.counts.tolist() == [TOKENS * top_k, TOKENS * top_k - kept]


@pytest.mark.parametrize("method", ["odp", "otp"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_switched_off_every_pair_keeps_its_exact_weight(method, backend):
    x, weights, ids = routed(4)
    rule = rules(method).layer(LAYER, 0.0, top_k=4, num_experts=EXPERTS, hidden_size=HIDDEN)
    rule = rule.on_device(torch.device("cpu"), backend)
    assert as_dicts(*rule(x, weights, ids)) == as_dicts(weights, ids)
    assert rule.counts.tolist() == [TOKENS * 4, 0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_padding_stays_padding_and_is_not_counted(backend):
    x, weights, ids = routed(2)
    ids[5:] = -1
    weights[5:] = 0
    rule = ratio([2.0], 1.0).on_device(torch.device("cpu"), backend)  # drops every second expert
    pruned_weights, pruned_ids = rule(x, weights, ids)
    assert (pruned_ids[5:] == -1).all()
    assert torch.isfinite(pruned_weights).all()
    assert rule.counts.tolist() == [10, 5]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [48, 36])  # 36 is no multiple of a vector's 16 lanes
def test_the_compiled_rule_agrees_with_the_reference_for_few_tokens_and_many(ids_dtype, dtype, hidden):
    """Few tokens are projected by the compiled code, many by torch."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, hidden, generator=generator).to(dtype)
    weights = torch.rand(500, 4, generator=generator)
    ids = torch.randint(-1, EXPERTS, (500, 4), generator=generator).to(ids_dtype)
    tensors = learned_tensors(4) | {"projection": torch.randn(3, hidden, generator=generator)}
    rules = {}
    for backend in ("reference", "cpu"):
        rule = LayerPruning(torch.tensor([0.0, 0.5, 1.0]), torch.tensor(0.4), tensors)
        rules[backend] = rule.on_device(torch.device("cpu"), backend)
    for tokens in (slice(0, 1), slice(1, 65), slice(65, 500)):
        call = x[tokens], weights[tokens], ids[tokens]
        wanted_weights, wanted_ids = rules["reference"](*call)
        found_weights, found_ids = rules["cpu"](*call)
        assert torch.equal(found_ids, wanted_ids)
        kept = wanted_ids >= 0
        torch.testing.assert_close(found_weights[kept], wanted_weights[kept])
    assert 0 < rules["cpu"].counts[1] < rules["cpu"].counts[0]
    assert torch.equal(rules["cpu"].counts, rules["reference"].counts)


def test_a_model_s_layers_count_together_and_the_first_copies_for_a_reader():
    counts = ActivationCounts(torch.device("cpu"))
    assert counts.host is counts.device
    counts.host = torch.zeros(2, dtype=torch.int64)  # as on a device
    x, weights, ids = routed(2)
    first, second = (ratio([2.0], 1.0).on_device(torch.device("cpu"), "cpu", counts=counts) for _ in range(2))
    for layer in (first, second):
        layer(x, weights, ids)
    assert counts.device.tolist() == [4 * TOKENS, 2 * TOKENS]
    assert counts.host.tolist() == [0, 0]  # of whole passes: what there was when this one began
    first(x, weights, ids)
    assert counts.host.tolist() == [4 * TOKENS, 2 * TOKENS]


def test_the_only_expert_of_a_token_stays():
    x, weights, ids = routed(1)
    for backend in ("reference", "cpu"):
        rule = ratio(torch.zeros(0), 1.0).on_device(torch.device("cpu"), backend)
        assert as_dicts(*rule(x, weights, ids)) == as_dicts(weights, ids)


def test_an_expert_the_rule_does_not_know_is_an_error():
    x, weights, ids = routed(2)
    ids[7] = torch.tensor([0, EXPERTS])
    weights[7] = torch.tensor([0.6, 0.4])
    with pytest.raises(IndexError, match=f"names expert {EXPERTS}, the pruning rule knows {EXPERTS}"):
        ratio([0.5], 0.0).on_device(torch.device("cpu"), "cpu")(x, weights, ids)


def test_the_order_and_dtype_of_the_pairs_do_not_matter():
    x, weights, ids = routed(4)
    rule = ratio([0.5, 0.5, 0.5], 0.0)
    flipped = as_dicts(*rule(x, weights.flip(1), ids.flip(1)))
    assert flipped == as_dicts(*rule(x, weights, ids))
    assert rule(x.bfloat16(), weights.bfloat16(), ids)[0].dtype == torch.float32  # what the kernels take


# ---- a checkpoint's rules


def rules(method: str = "odp", top_k: int = 4) -> PruningRules:
    levels = (0.0, 0.25, 0.5)
    thresholds = torch.tensor([[0.1], [0.5], [0.9]]).repeat(1, top_k - 1)
    tensors = {f"{LAYER}.thresholds": thresholds, f"{LAYER}.renormalize": torch.tensor(0.2)}
    if method == "otp":
        tensors |= {f"{LAYER}.{name}": tensor for name, tensor in learned_tensors(top_k).items()}
    return PruningRules.create(method, 0.25, top_k, levels, tensors)


SHAPE = {"top_k": 4, "num_experts": EXPERTS, "hidden_size": HIDDEN}


@pytest.mark.parametrize("target, threshold", [(0.25, 0.5), (0.375, 0.7), (0.125, 0.3), (0.5, 0.9), (0.7, 0.9)])
def test_a_target_between_two_levels_lies_between_their_thresholds(target, threshold):
    layer = rules().layer(LAYER, target, **SHAPE)
    assert layer.thresholds.exp().tolist() == pytest.approx([threshold] * 3)  # ratios, compared as logarithms


@pytest.mark.parametrize("method", ["odp", "otp"])
def test_rules_come_back_from_their_file(tmp_path, method):
    written = rules(method)
    (tmp_path / written.config.file_name).write_bytes(written.serialize())
    config = PruningConfig.from_dict(json.loads(json.dumps(written.config.to_dict())))
    assert config == written.config
    read = PruningRules.load(tmp_path, config)
    assert read.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(read.tensors[name], written.tensors[name]) for name in read.tensors)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    written = rules()
    with pytest.raises(FormatError, match=r"pruning-.*is missing.*mcmoe prune"):
        PruningRules.load(tmp_path, written.config)
    (tmp_path / written.config.file_name).write_bytes(written.serialize()[:-1] + b"x")
    with pytest.raises(FormatError, match=r"pruning-.*is damaged"):
        PruningRules.load(tmp_path, written.config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_k": 2}, "calibrated for top-4 routing, .* selects 2"),
        ({"num_experts": 8}, r"expert_bias is torch.float32 \[6\], expected torch.float32 \[8\]"),
        ({"hidden_size": 32}, r"projection is .*expected torch.float32 \['any', 32\]"),
    ],
)
def test_rules_of_another_model_are_refused(change, message):
    with pytest.raises(FormatError, match=message):
        rules("otp").layer(LAYER, 0.25, **(SHAPE | change))


def test_rules_for_fewer_layers_are_refused():
    with pytest.raises(FormatError, match=r"no tensor model.layers.1.mlp.experts.thresholds; .*another model"):
        rules().layer("model.layers.1.mlp.experts", 0.25, **SHAPE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "magic"}, "method is 'magic'; this vllm-mcmoe knows odp, otp"),
        ({"target": 1.0}, r"target is 1; expected a fraction .* in \[0, 1\)"),
        ({"target": -0.1}, "target is -0.1"),
        ({"target": 0.8}, "with top-4 routing at most 0.750"),
        ({"target": "half"}, "target: missing or of the wrong type"),
        ({"levels": [0.1, 0.2]}, "levels must ascend from 0"),
        ({"sha256": None}, "sha256: missing"),
    ],
)
def test_a_faulty_config_is_refused(changes, message):
    with pytest.raises((FormatError, PruningError), match=message):
        PruningConfig.from_dict(rules().config.to_dict() | changes)


@pytest.mark.parametrize("request_, target", [("on", 0.25), ("off", 0.0), ("0.1", 0.1), (0.3, 0.3)])
def test_what_to_prune_can_be_asked_for(request_, target):
    assert resolve_target(rules().config, request_) == target


@pytest.mark.parametrize("request_", ["maybe", "1.5", "nan", 0.9, [0.1], None])
def test_what_cannot_be_asked_for_is_refused(request_):
    with pytest.raises(PruningError):
        resolve_target(rules().config, request_)
