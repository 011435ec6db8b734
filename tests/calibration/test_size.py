"""One budget for the whole checkpoint: the program against brute force, what it is told, and what is written."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from tests.calibration.conftest import QUICK, interrupted_at_the_last_layer, layerwise
from tests.calibration.test_allocation import random_factors
from tests.tiny_models import TINY_MODELS, make_tiny
from vllm_mcmoe.calibration.allocate import program
from vllm_mcmoe.calibration.allocate.bits import written_bits
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.allocate.program import allocate
from vllm_mcmoe.calibration.allocate.size import show_size, size_in_bytes
from vllm_mcmoe.calibration.checkpoint.size import DecidedBytes, decided_bytes
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import load_dequantized, open_weights
from vllm_mcmoe.calibration.evaluate.inspection import inspect_checkpoint
from vllm_mcmoe.calibration.evaluate.resources import plan_resources, planned_weights
from vllm_mcmoe.calibration.matrix.gptq import HessianFactor
from vllm_mcmoe.calibration.matrix.linears import LINEAR_BITS, PACKED_BITS, quantize_linear
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS, Factors, LinearFactors, LinearTable
from vllm_mcmoe.calibration.measure.linear_errors import LinearMeasurer, table_of
from vllm_mcmoe.calibration.measure.sensitivity import backward_traces, kl_divergence, sample_labels
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import skeleton
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.recipes import RECIPES
from vllm_mcmoe.errors import FormatError, PlanError

HEAD = "lm_head"
WIDTHS = (1, 2, 3)
OTHER = 12_345


def with_linears(factors: Factors, seed: int = 0, numels: tuple[int, ...] = (65536, 32768)) -> Factors:
    """One module per size in each layer, and a head of the first size."""
    rng = np.random.default_rng(seed)
    names = [f"{layer}.linear{i}" for layer in factors.layers for i in range(len(numels))]
    sizes = [*numels] * len(factors.layers)
    modules = [
        LinearFactors(
            [name],
            {16: 2 * numel, **{bits: numel * bits // 8 + 2 * numel // 128 + 16 for bits in PACKED_BITS}},
            {bits: float(importance * 4.0**-bits) for bits in PACKED_BITS},
        )
        for name, numel, importance in zip([*names, HEAD], [*sizes, numels[0]], rng.lognormal(0, 2, 99), strict=False)
    ]
    experts = sum(layer.num_experts * layer.expert_numel for layer in factors.layers.values())
    original = OTHER + 2 * experts + sum(module.nbytes[16] for module in modules)
    table = LinearTable(modules, HEAD, 128, OTHER, original)
    return dataclasses.replace(factors, linears=table)


def expert_choices(factors: Factors) -> list[list[tuple[float, float]]]:
    """(bytes, cost) of every width of every item."""
    return [
        [
            (written_bits(w) * layer.numel(p) / 8 + layer.shapes[p][0], layer.loss_increase[p][w][expert])
            for w in WIDTHS
        ]
        for layer in factors.layers.values()
        for expert in range(layer.num_experts)
        for p in PROJECTIONS
    ]  # fmt: skip


def linear_choices(factors: Factors) -> list[list[tuple[float, float]]]:
    return [[(m.nbytes[w], m.loss_increase.get(w, 0.0)) for w in LINEAR_BITS] for m in factors.linears.modules]


def brute_force(choices: list[list[tuple[float, float]]], available: float) -> float:
    """Least cost of at most so many bytes."""
    costs = [
        sum(cost for _, cost in chosen)
        for chosen in itertools.product(*choices)
        if sum(nbytes for nbytes, _ in chosen) <= available
    ]
    return min(costs)


# 16 bytes of shapes per linear are paid for by those of 16 bits, too, so that sizes keep a common divisor
def paid_for_shapes(factors: Factors) -> list[list[tuple[float, float]]]:
    return [[(n + (16 if w == 16 else 0), c) for w, (n, c) in zip(LINEAR_BITS, module, strict=True)]
            for module in linear_choices(factors)]  # fmt: skip


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plan_of_a_size_is_the_optimum_that_brute_force_finds(share, seed):
    factors = with_linears(random_factors(1, 2, seed=seed), seed)
    choices = expert_choices(factors) + paid_for_shapes(factors)
    least, most = (sum(extreme(n for n, _ in item) for item in choices) for extreme in (min, max))
    size = int(OTHER + least + share * (most - least))
    plan = allocate(factors, size=size, widths=WIDTHS)
    assert plan.objective == pytest.approx(brute_force(choices, size - OTHER), rel=1e-12)
    linears = sum(m.loss_increase.get(plan.linears[m.names[0]], 0.0) for m in factors.linears.modules)
    experts = sum(
        layer.loss_increase[p][width][expert]
        for name, layer in factors.layers.items()
        for p in PROJECTIONS
        for expert, width in enumerate(plan.layers[name][p])
    )
    assert linears + experts == pytest.approx(plan.objective, rel=1e-12)
    assert plan.extra["planned_bytes"] <= size
    assert plan.extra["relative_gap"] == 0


@pytest.mark.parametrize("linear_bits", LINEAR_BITS)
def test_linears_may_be_held_at_a_width_and_the_head_at_16(linear_bits):
    factors = with_linears(random_factors(1, 2))
    fixed = sum(m.nbytes[16 if m.names[0] == HEAD else linear_bits] for m in factors.linears.modules)
    size = OTHER + fixed + 200_000
    plan = allocate(factors, size=size, linear_bits=linear_bits, widths=WIDTHS)
    assert plan.objective == pytest.approx(brute_force(expert_choices(factors), 200_000), rel=1e-12)
    assert set(plan.linears.values()) == {linear_bits, 16}
    assert plan.linears[HEAD] == 16


def test_the_core_of_a_large_problem_with_linears_is_as_good_as_the_whole(monkeypatch):
    factors = with_linears(random_factors(8, 16, widths=(1, 2, 3, 4)))
    size = "20%"
    exact = allocate(factors, size=size)
    monkeypatch.setattr(program, "EXACT_VARIABLES", 0)
    reduced = allocate(factors, size=size)
    assert exact.objective <= reduced.objective * (1 + 1e-12)
    assert reduced.objective <= exact.objective / (1 - reduced.extra["relative_gap"]) * (1 + 1e-9)
    assert reduced.extra["planned_bytes"] <= size_in_bytes(size, factors.linears.original_bytes)


def test_recipes_with_a_budget_per_layer_share_out_what_linears_leave():
    factors = with_linears(random_factors(2, 6))
    size = 2_000_000
    plan = allocate(factors, recipe="paper-code", size=size, linear_bits=4)
    assert plan.extra["planned_bytes"] <= size
    with pytest.raises(PlanError, match="'paper-code' has one budget per layer"):
        allocate(factors, recipe="paper-code", size=size)
    with pytest.raises(PlanError, match="'weighted_error' has another unit than what linears cost"):
        allocate(factors, recipe="paper-code", size=size, scope="model")


@pytest.mark.parametrize("size", [100_000, 40_000_000])
def test_an_impossible_size_names_the_least_and_the_largest_which_are_possible(size):
    factors = with_linears(random_factors(2, 4))
    with pytest.raises(PlanError, match=r"for the whole checkpoint cannot be met .*feasible are") as caught:
        allocate(factors, size=size, widths=WIDTHS)
    named = [int(part.split(" bytes")[0].replace(",", "")) for part in str(caught.value).split("(")[1:] if "," in part]
    least, largest = named[-2:]
    assert allocate(factors, size=least, widths=WIDTHS).extra["planned_bytes"] == pytest.approx(least, abs=100)
    assert set(allocate(factors, size=largest, widths=WIDTHS).linears.values()) == {16}
    with pytest.raises(PlanError, match="feasible are"):
        allocate(factors, size=least - 1000, widths=WIDTHS)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("13.5GB", 13_500_000_000), ("12 GiB", 12 * 2**30), ("800mb", 800_000_000), ("45%", 450), (".5kB", 500)],
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert size_in_bytes(text, 1000) == nbytes


@pytest.mark.parametrize("text", ["13.5", "GB", "-1GB", "0%", "1,5GB", "3 apples"])
def test_what_is_no_size_is_refused_with_examples(text):
    with pytest.raises(PlanError, match=r"is not a size like 13\.5GB"):
        size_in_bytes(text, 1000)


def test_sizes_are_shown_with_all_their_bytes():
    assert show_size(13_512_345_678) == "13.51 GB (13,512,345,678 bytes)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "1MB", "bits": 2.0}, "give either bits .* or size"),
        ({"bits": 2.0, "linear_bits": 4}, "linear_bits holds linears at a width under a size"),
        ({"size": "1MB", "budget": "="}, "a size is an upper bound"),
        ({"size": 0}, "not a positive number"),
    ],
)
def test_contradictory_sizes_are_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        allocate(with_linears(random_factors(1, 4)), **arguments)


def test_factors_without_what_a_size_needs_stay_of_use_and_are_refused_by_name():
    factors = random_factors(1, 4, widths=(1, 2, 3, 4))
    assert allocate(factors, bits=2.0).linears is None
    with pytest.raises(PlanError, match="the factors of random have no table of linears, which a size"):
        allocate(factors, size="500kB")
    unmeasured = with_linears(factors)
    for module in unmeasured.linears.modules:
        module.loss_increase = {}
    with pytest.raises(PlanError, match=r"layers\.0\.linear0: the factors of random do not say what quant"):
        allocate(unmeasured, size="500kB")
    assert allocate(unmeasured, size="500kB", linear_bits=4).linears[HEAD] == 16


def test_factors_and_plans_keep_their_linears_in_their_files(tmp_path):
    factors = with_linears(random_factors(1, 2, widths=(1, 2, 3, 4)))
    plan = allocate(factors, size="500kB")
    factors.save(tmp_path / "factors.json")
    plan.save(tmp_path / "plan.json")
    assert Factors.load(tmp_path / "factors.json") == factors
    assert Plan.load(tmp_path / "plan.json") == plan
    document = json.loads((tmp_path / "plan.json").read_text())
    allocate(factors, bits=2.0).save(tmp_path / "plan.json")  # as files were before there were sizes
    assert document["linears"] and "linears" not in json.loads((tmp_path / "plan.json").read_text())
    document["linears"][HEAD] = 6
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"linears\['lm_head'\]: found 6, expected one of \(4, 8, 16\)"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "linears: version: found 2, expected 1"),
        (("modules", 0, "bytes"), {"4": 1}, r"modules\[0\]: bytes: found widths 4, expected 4, 8, 16"),
        (("modules", 1, "loss_increase", "8"), "much", r"modules\[1\]: loss_increase\[8\]: found 'much'"),
        (("modules", 2, "names"), [], r"modules\[2\]: names: found an empty list"),
        (("other_bytes",), None, "linears: other_bytes: found None"),
    ],
)
def test_a_damaged_table_of_linears_is_refused_by_its_place(path, value, message, tmp_path):
    with_linears(random_factors(1, 2)).save(tmp_path / "factors.json")
    document = json.loads((tmp_path / "factors.json").read_text())
    *way, last = path
    place = document["linears"]
    for key in way:
        place = place[key]
    place[last] = value
    (tmp_path / "factors.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=message):
        Factors.load(tmp_path / "factors.json")


GROUPS = [("a.q", "a.k"), ("a.o",)]


@pytest.mark.parametrize(
    ("linears", "message"),
    [
        ({"a.q": 4, "a.k": 8, "a.o": 16}, r"one of these, which must have one width: a\.q 4, a\.k 8"),
        ({"a.q": 4, "a.k": 4}, r"lack 'a\.o'; give it 16"),
        ({"a.q": 4, "a.k": 4, "a.o": 8, "b.o": 8}, r"the plan's linear 'b\.o' is none of the model's"),
    ],
)
def test_a_plan_whose_linears_do_not_fit_the_model_is_refused(linears, message):
    plan = Plan(layers={"a": {"gate_up": [2], "down": [2]}}, linears=linears)
    with pytest.raises(PlanError, match=message):
        plan.check_linears(GROUPS)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_what_config_json_says_of_a_size_is_what_the_files_say(kind, tmp_path, reference_model):
    """Of every architecture: the linears that are decided, and the bytes where it is no wrapper with towers."""
    path = make_tiny(kind, tmp_path / kind, reference_model)
    description = describe_model(path)
    planned = DecidedBytes.of(description, planned_weights(description, skeleton(description)))
    found = decided_bytes(layerwise(path))
    assert planned.groups == found.groups
    assert planned.group_size == found.group_size
    if TINY_MODELS[kind].around is None:
        assert planned.other == pytest.approx(found.other, rel=0.01)
        assert planned.original == pytest.approx(found.original, rel=0.01)


@pytest.fixture(scope="module")
def tokens(reference_model, calibration_files):
    return load_calibration_data(describe_model(reference_model), calibration_files, 8, 64, print)


@pytest.fixture(scope="module")
def measured(reference_model, tokens):
    """The table of linears, measured as the pipeline does."""
    model = layerwise(reference_model)
    measurer = LinearMeasurer(model, tokens.tokens.numel(), None)
    for _ in backward_traces(model, tokens.tokens, watcher=measurer, show_progress=False):
        pass
    return measurer.table()


def module_of(table: LinearTable, name: str) -> LinearFactors:
    return next(module for module in table.modules if name in module.names)


def test_a_linears_cost_is_that_of_the_whole_models_own_backward_pass(reference_model, tokens, measured):
    """The output projection of layer 1, with the same sampled labels."""
    name = "model.layers.1.self_attn.o_proj"
    model = load_dequantized(reference_model)
    linear, seen = model.get_submodule(name), {}

    def keep(module, args, output):
        seen["x"] = args[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: seen.update(gradient=gradient.flatten(0, -2)))

    linear.register_forward_hook(keep)
    embedded = model.get_input_embeddings()(tokens.tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits.flatten(0, -2)
    labels = sample_labels(logits.detach(), torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    factor = HessianFactor.build(seen["x"].t() @ seen["x"])
    weight = linear.weight.detach()
    for bits in PACKED_BITS:
        quantized, _ = quantize_linear(weight, factor, bits, 128, torch.bfloat16)
        products = (seen["x"] @ (quantized - weight).t() * seen["gradient"]).sum(-1)
        expected = 0.5 * float(products.square().mean())
        assert module_of(measured, name).loss_increase[bits] == pytest.approx(expected, rel=0.02)  # a few codes differ


def test_the_heads_cost_is_the_kl_divergence_of_the_quantised_one(reference_model, tokens, measured):
    model = load_dequantized(reference_model)
    with torch.no_grad():
        hidden = model.model(tokens.tokens).last_hidden_state.flatten(0, -2)
        weight = model.lm_head.weight
        before = (hidden @ weight.t()).log_softmax(-1)
        quantized, _ = quantize_linear(weight, HessianFactor.build(hidden.t() @ hidden), 4, 128, torch.bfloat16)
        after = (hidden @ quantized.t()).log_softmax(-1)
    expected = kl_divergence(before, after) / len(hidden)
    assert module_of(measured, HEAD).loss_increase[4] == pytest.approx(expected, rel=0.02)


def test_more_bits_cost_less_and_everything_is_measured(reference_model, measured):
    assert [tuple(module.names) for module in measured.modules] == [
        group.names for group in decided_bytes(layerwise(reference_model)).groups
    ]
    for module in measured.modules:
        assert 0 < 50 * module.loss_increase[8] < module.loss_increase[4]  # 256 times the squared error


SIZE = 9_500_000  # some linears at 4 bits, some at 8
OPTIONS = {"recipe": dataclasses.replace(QUICK, widths=(1, 2, 4)), "sequences": 8, "length": 64, "show_progress": False}


@pytest.fixture(scope="module")
def sized(reference_model, calibration_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("sized") / "out"
    quantize(reference_model, out, calibration_files, size=SIZE, **OPTIONS)
    return out


def test_the_files_are_as_large_as_was_asked_for_within_one_step(sized):
    written = sum(path.stat().st_size for path in sized.glob("*.safetensors"))
    plan, factors = Plan.load(sized / "plan.json"), Factors.load(sized / "factors.json")
    experts = [layer.numel(p) * (written_bits(4) - written_bits(2)) / 8
               for layer in factors.layers.values() for p in PROJECTIONS]  # fmt: skip
    linears = [module.nbytes[16] - module.nbytes[8] for module in factors.linears.modules if HEAD not in module.names]
    assert SIZE - max(experts + linears) < written <= plan.extra["planned_bytes"] <= SIZE
    assert plan.extra["requested_bytes"] == SIZE


def test_every_linear_has_the_plans_width_in_files_config_and_report(sized, reference_model):
    plan, weights = Plan.load(sized / "plan.json"), open_weights(sized)
    assert len(set(plan.linears.values())) > 1
    original = open_weights(reference_model)
    for name, bits in plan.linears.items():
        weight, before = weights.read(f"{name}.weight").float(), original.read(f"{name}.weight").float()
        assert weights.numel(f"{name}.weight") == before.numel()
        if bits == 16:
            assert torch.equal(weight, before)
        else:
            assert weight[0, :128].unique().numel() <= 2**bits
            assert (weight - before).norm() < {4: 0.25, 8: 0.02}[bits] * before.norm()
    summary = inspect_checkpoint(sized)
    assert summary.warnings == []
    assert summary.linears == plan.linears
    report = json.loads((sized / "quantization_report.json").read_text())
    assert (report["linears"], report["linear_bits"]) == (plan.linears, None)
    assert f"output head | {plan.linears[HEAD]} bits" in (sized / "README.md").read_text()


def test_a_run_of_a_size_goes_on_where_it_was_interrupted(sized, reference_model, calibration_files, tmp_path):
    out = tmp_path / "out"
    with interrupted_at_the_last_layer():
        quantize(reference_model, out, calibration_files, size=SIZE, **OPTIONS)
    quantize(reference_model, out, calibration_files, size=SIZE, **OPTIONS)
    for path in sized.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_steps_one_by_one_make_the_same_checkpoint(sized, reference_model, calibration_files, tmp_path):
    """From factors.json, and from plan.json."""
    factors = Factors.load(sized / "factors.json")
    plan = allocate(factors, recipe=OPTIONS["recipe"], size=SIZE)
    assert plan.linears == Plan.load(sized / "plan.json").linears
    quantize(reference_model, tmp_path / "out", calibration_files, plan=plan, **OPTIONS)
    for path in sized.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_impossible_sizes_and_contradictions_are_refused_before_any_work(
    sized, reference_model, qwen3_model, calibration_files, tmp_path
):
    def refused(message: str, model=reference_model, **request) -> None:
        with pytest.raises(PlanError, match=message):
            quantize(model, tmp_path / "out", calibration_files, **{**OPTIONS, **request})
        assert not list(tmp_path.iterdir())

    refused("cannot be met .* feasible are 4.* MB", size="3MB")
    refused("feasible are", size="90%")
    refused("exactly one of plan, bits, bits_per_layer and size", size=SIZE, bits=2.0)
    plan, factors = Plan.load(sized / "plan.json"), Factors.load(sized / "factors.json")
    refused("the plan gives every linear a width of its own", plan=plan, linear_bits=4)
    refused("the plan has no layer", model=qwen3_model, plan=plan)
    other = dataclasses.replace(plan, linears={**plan.linears, "model.layers.0.self_attn.q_proj": 16})
    refused("vLLM makes one of these", plan=other)
    refused("have no table of linears", size=SIZE, factors=dataclasses.replace(factors, linears=None))
    another = dataclasses.replace(factors, linears=dataclasses.replace(factors.linears, other_bytes=1))
    refused("the factors are of another model, .*other_bytes", size=SIZE, factors=another)


def test_resources_of_a_size_are_what_the_program_finds(reference_model):
    plan = plan_resources(reference_model, size=SIZE)
    table = table_of(decided_bytes(layerwise(reference_model)))
    least, largest = program.size_range(describe_model(reference_model), RECIPES["mcmoe"], table)
    assert (plan.size.requested_bytes, plan.serving.checkpoint_bytes) == (SIZE, SIZE)
    assert plan.size.least_bytes == pytest.approx(least, rel=1e-3)
    assert plan.size.largest_bytes == pytest.approx(largest, rel=1e-3)
    assert 1.125 <= plan.size.least_expert_bits < plan.size.most_expert_bits <= 4.25
    held = plan_resources(reference_model, size=SIZE, linear_bits=4).size
    assert held.least_expert_bits == held.most_expert_bits
    with pytest.raises(PlanError, match="feasible are"):
        plan_resources(reference_model, size="1%")
