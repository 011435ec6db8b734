"""Every supported architecture served by stock vLLM on CPU, against transformers with the same dequantised weights."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.released_forms import in_mxfp4
from tests.tiny_models import NO_GATE, TINY_MODELS, make_tiny
from tests.vllm_mcmoe.engines import Job, Scored, score_in_one_process
from tests.vllm_mcmoe.serving import (
    assert_close,
    assert_close_with_int8_linears,
    expected_logprobs,
    prompts_from,
    with_int8_activations,
    with_int8_linears,
)
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.checkpoint.size import decided_bytes
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import load_dequantized
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions
from vllm_mcmoe.calibration.model.description import MoeModel, describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.recipes import RECIPES

pytestmark = pytest.mark.engine

# Widths that a plan gives, without measuring and with the quickest quantiser: seconds for all models together.
QUICK = dataclasses.replace(RECIPES["uniform"], name="quick", gptq=GPTQOptions(mse_search=False))
GATE_UP_BITS, DOWN_BITS = [2, 3, 1, 4, 2, 8, 2, 3], [3, 2, 2, 1, 4, 2, 8, 2]

# Neither size a multiple of the group size, 128, and heads of a size that vLLM's CPU attention has.
ODD = "mixtral-odd"
ODD_SIZES = {"hidden_size": 192, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1}
# vLLM refuses experts without a gate on CPUs before it asks who computes them. Without that check they are served.
WITHOUT_GATE = [kind for kind, tiny in TINY_MODELS.items() if tiny.not_served == NO_GATE]
SERVED = [kind for kind, tiny in TINY_MODELS.items() if tiny.cpu_refusal is None and tiny.not_served is None]
SERVED += WITHOUT_GATE
KINDS = {**{kind: (kind, {}) for kind in SERVED}, ODD: ("mixtral", ODD_SIZES)}
RELEASED_IN = {"gpt-oss": in_mxfp4}  # the others are made as they are released, in 16 bits
IN_BFLOAT16 = [kind for kind in SERVED if TINY_MODELS[kind].bfloat16]


# Every width of linears, and the output head at 8 bits where vLLM's model serves it packed.
MIXED, MIXED_BITS, HEAD_BITS = "mixed", (4, 8, 16), 8


@dataclasses.dataclass(frozen=True)
class Packed:
    """A model with linears of 4 or 8 bits, or MIXED, and how to serve it."""

    kind: str
    bits: int | str = 4
    dtype: str = "float32"
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


# One model for each set of linears an adapter names: with a shared expert and biases, with multi-head latent attention
# and shared experts, with gated delta nets in one tensor and in two; and one whose groups are of 64. vLLM's operator
# does not compute in float32, our kernels do: on the best instruction set of the machine, which another may lack, and
# on the one all have.
PACKED = {
    "qwen2 4-bit": Packed("qwen2"),
    "qwen2 8-bit": Packed("qwen2", bits=8),
    "deepseek-v3 4-bit": Packed("deepseek-v3"),
    "hy3 4-bit": Packed("hy3"),
    "qwen3-next 4-bit": Packed("qwen3-next", dtype="bfloat16"),
    "qwen3.5-vision 4-bit": Packed("qwen3.5-vision", dtype="bfloat16"),
    "gpt-oss 4-bit": Packed("gpt-oss"),
    "qwen2 mixed": Packed("qwen2", bits=MIXED),
    "deepseek-v3 mixed": Packed("deepseek-v3", bits=MIXED),
    "hy3 mixed": Packed("hy3", bits=MIXED),
    "gemma4 mixed": Packed("gemma4", bits=MIXED),
    "gpt-oss mixed": Packed("gpt-oss", bits=MIXED),
    "qwen3.5-vision mixed": Packed("qwen3.5-vision", bits=MIXED, dtype="bfloat16"),
    "gemma4 4-bit": Packed("gemma4"),
    "mixtral-odd 4-bit": Packed(ODD),
    "qwen2 4-bit, portable": Packed("qwen2", environment={"VLLM_MCMOE_CPU_ISA": "portable"}),
    "mixtral-odd 8-bit, portable": Packed(ODD, bits=8, environment={"VLLM_MCMOE_CPU_ISA": "portable"}),
    "mixtral-odd 4-bit, bfloat16": Packed(ODD, dtype="bfloat16"),
}
# By vLLM's operator, or in its place one in plain torch where vLLM's build for this CPU has none.
DELEGATED = {
    f"{kind} 4-bit, by vLLM": Packed(kind, dtype="bfloat16", environment={"VLLM_MCMOE_LINEARS": "vllm"})
    for kind in ("qwen2", "deepseek-v3", ODD)
}

# Of multi-head latent attention in vLLM's CPU backends, the one that needs no AMX and computes in float32, too.
OPTIONS = {kind: {"attention_backend": "CPU_MLA"} for kind in ("deepseek-v2", "deepseek-v3", "glm4-lite")}
# Without the preprocessors of pictures, which tiny models lack.
OPTIONS |= {kind: {"language_model_only": True} for kind, tiny in TINY_MODELS.items() if tiny.around is not None}


def cycled_plan(model: MoeModel, linear_bits: int | str = 4) -> Plan:
    """Every width, gate_up and down apart; of linears, too, where they are MIXED."""
    widths = {"gate_up": GATE_UP_BITS[: model.num_experts], "down": DOWN_BITS[: model.num_experts]}
    plan = Plan(layers={name: widths for name in model.moe_layers.values()})
    if linear_bits == MIXED:
        groups = decided_bytes(LayerwiseModel(WeightFiles(model))).groups
        bits = [HEAD_BITS if g.layer is None else MIXED_BITS[i % len(MIXED_BITS)] for i, g in enumerate(groups)]
        plan.linears = {name: width for group, width in zip(groups, bits, strict=True) for name in group.names}
    return plan


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, reference_model, calibration_files) -> dict[tuple[str, int | str], Path]:
    """(kind, bits of linears) -> checkpoint: of every tiny model with linears in 16 bits, and those of PACKED."""
    directory = tmp_path_factory.mktemp("architectures")
    made = {}
    for kind, (tiny, changes) in KINDS.items():
        model = RELEASED_IN.get(kind, Path)(make_tiny(tiny, directory / kind, reference_model, **changes))
        for linear_bits in {16, *(packed.bits for packed in PACKED.values() if packed.kind == kind)}:
            out = made[kind, linear_bits] = directory / f"{kind}-{linear_bits}"
            options = {"recipe": QUICK, "sequences": 8, "length": 64}
            options["linear_bits"] = None if linear_bits == MIXED else linear_bits
            plan = cycled_plan(describe_model(model), linear_bits)
            quantize(model, out, calibration_files, plan=plan, **options)
    return made


@pytest.fixture(scope="module")
def served(checkpoints, reference_model, evaluation_files, tmp_path_factory) -> dict[str, list[Scored]]:
    jobs = {}
    for kind in KINDS:
        dtype = "bfloat16" if kind in IN_BFLOAT16 else "float32"
        options = {"dtype": dtype, "max_model_len": 128} | OPTIONS.get(kind, {})
        jobs[kind] = Job(str(checkpoints[kind, 16]), options, without_gate=kind in WITHOUT_GATE)
    for name, packed in (PACKED | DELEGATED).items():
        options = {"dtype": packed.dtype, "max_model_len": 128} | OPTIONS.get(packed.kind, {})
        jobs[name] = Job(str(checkpoints[packed.kind, packed.bits]), options, packed.environment)
    prompts = prompts_from(reference_model, evaluation_files[:3])
    return score_in_one_process(jobs, prompts, tmp_path_factory.mktemp("served"))


def expected_of(checkpoint: Path, results: list[Scored], *, int8_linears: bool = True) -> torch.Tensor:
    """Logprobs of all results' tokens, one after another."""
    model = with_int8_activations(load_dequantized(checkpoint))
    if int8_linears:
        with_int8_linears(model, checkpoint)
    if describe_model(checkpoint).architecture == "PhiMoEForCausalLM":
        torch.nn.init.zeros_(model.lm_head.bias)  # vLLM loads it and leaves it out, docs/architectures.md
    return torch.cat([expected_logprobs(model, tokens) for tokens, _ in results])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in IN_BFLOAT16])
def test_logprobs_equal_transformers_with_dequantised_weights(kind, checkpoints, served):
    expected = expected_of(checkpoints[kind, 16], served[kind])
    assert expected.std() > 0.4  # else any model would agree
    assert_close(torch.cat([logprobs for _, logprobs in served[kind]]), expected)


# bfloat16 has three digits, and a token whose experts nearly tie may get another one: single logprobs differ by tenths,
# their mean by 0.07. Swapping two linears of a kind in two layers moves the mean by 0.3 to 1.0.
MEAN_DIFFERENCE_IN_BFLOAT16 = 0.2


@pytest.mark.parametrize("kind", IN_BFLOAT16)
def test_logprobs_are_those_of_transformers_in_bfloat16(kind, checkpoints, served):
    expected = expected_of(checkpoints[kind, 16], served[kind], int8_linears=False)
    difference = (torch.cat([logprobs for _, logprobs in served[kind]]) - expected).abs()
    print(f"difference: mean {difference.mean():.4f}, largest {difference.max():.4f}")
    assert expected.std() > 0.4
    assert difference.mean() < MEAN_DIFFERENCE_IN_BFLOAT16


@pytest.mark.parametrize("name", [name for name, packed in PACKED.items() if packed.dtype == "float32"])
def test_packed_linears_give_the_logprobs_of_transformers_too(name, checkpoints, served):
    expected = expected_of(checkpoints[PACKED[name].kind, PACKED[name].bits], served[name])
    assert_close_with_int8_linears(torch.cat([logprobs for _, logprobs in served[name]]), expected)


@pytest.mark.parametrize("name", [name for name, packed in (PACKED | DELEGATED).items() if packed.dtype == "bfloat16"])
def test_packed_linears_are_served_where_they_belong_in_bfloat16(name, checkpoints, served):
    packed = (PACKED | DELEGATED)[name]
    expected = expected_of(checkpoints[packed.kind, packed.bits], served[name], int8_linears=name in PACKED)
    difference = (torch.cat([logprobs for _, logprobs in served[name]]) - expected).abs().mean()
    print(f"{name}: mean difference {difference:.4f}, expected to spread by {expected.std():.2f}")
    # a gated delta net's state adds up what 4 bits of rounding do to every token before
    assert difference < (0.1 * expected.std() if packed.kind in IN_BFLOAT16 else MEAN_DIFFERENCE_IN_BFLOAT16)
