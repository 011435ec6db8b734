"""What a model will take, against published sizes and against a checkpoint that was really written."""

import pytest
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig

from tests.tiny_models import make_tiny
from vllm_mcmoe.calibration.evaluate.resources import plan_resources
from vllm_mcmoe.calibration.pipeline import quantize

QWEN3_30B = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8,
    "vocab_size": 151936,
}  # fmt: skip
# transformers' defaults are the released models' sizes
MODELS = {
    "mixtral-8x7b": MixtralConfig(architectures=["MixtralForCausalLM"]),
    "qwen3-30b-a3b": Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **QWEN3_30B),
    "deepseek-v3": DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"], topk_method="noaux_tc", scoring_func="sigmoid"
    ),
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    found = {}
    for name, config in MODELS.items():
        directory = tmp_path_factory.mktemp(name)
        config.save_pretrained(directory)
        found[name] = plan_resources(directory)
    return found


@pytest.mark.parametrize(
    ("model", "total", "active"),
    # As the model cards round them; they count the embeddings as active.
    [("mixtral-8x7b", 46.7e9, 12.9e9), ("qwen3-30b-a3b", 30.5e9, 3.3e9), ("deepseek-v3", 671e9, 37e9)],
)
def test_parameters_are_the_published_ones(plans, model, total, active):
    parameters = plans[model].parameters
    assert parameters.total == pytest.approx(total, rel=2e-3)
    embeddings = MODELS[model].vocab_size * MODELS[model].hidden_size
    assert parameters.active + embeddings == pytest.approx(active, rel=0.02)


def test_less_effort_is_less_work(tmp_path):
    MODELS["mixtral-8x7b"].save_pretrained(tmp_path)
    fast, normal, best = (
        plan_resources(tmp_path, effort=effort).quantization.expert_products for effort in ("fast", "normal", "best")
    )
    assert fast < 0.7 * normal < 0.52 * best


def test_a_cache_of_latent_attention_is_counted_as_such(plans):
    assert plans["deepseek-v3"].serving.kv_bytes_per_token == 2 * 61 * (512 + 64)
    assert plans["mixtral-8x7b"].serving.kv_bytes_per_token == 2 * 32 * 2 * 8 * 128


def test_a_cache_is_counted_by_what_each_layer_keeps(tmp_path, reference_model):
    """Of tiny models: Mamba and experts keep none, sliding layers of MiMo twice the heads, Gemma's full ones larger."""
    expected = {
        "nemotron-h": 2 * 2 * 64,  # one layer of attention among five
        "mimo-v2": 2 * (64 + 2 * 64 + 64),
        "gemma4": 2 * (2 * 32 + 64),
        "gpt-oss": 2 * 2 * 2 * 64,
    }
    for kind, values in expected.items():
        plan = plan_resources(make_tiny(kind, tmp_path / kind, reference_model))
        assert plan.serving.kv_bytes_per_token == 2 * values, kind


def test_attention_by_its_definition_counts_in_memory_and_no_other(tmp_path, reference_model):
    """Four arrays of [4 heads, length, length] float32, for so many sequences as are computed at once."""
    for kind, heads in (("gpt-oss", 4), ("mixtral", 0)):
        model = make_tiny(kind, tmp_path / kind, reference_model)
        long, short = (plan_resources(model, length=n).quantization.memory_bytes for n in (2048, 1024))
        assert long - short == 4 * heads * 4 * (2048**2 - 2 * 1024**2)


def test_devices_hold_what_is_placed_on_them_and_half_as_many_would_not(plans):
    for plan in plans.values():
        for placement in plan.serving.placements:
            usable = 0.9e9 * int(placement.device.split()[0])
            assert placement.per_device_bytes <= usable
            assert placement.devices == 1 or 2 * placement.per_device_bytes > usable


def test_thin_slices_of_small_experts_are_kept_whole_by_expert_parallelism(plans):
    options = {placement.device: placement.options for placement in plans["deepseek-v3"].serving.placements}
    assert options["48 GB GPU"] == "--tensor-parallel-size 8 --enable-expert-parallel"
    assert options["24 GB GPU"].endswith("--pipeline-parallel-size 2")  # 16 GPUs are two machines of 8


def test_the_checkpoint_has_the_size_that_was_planned(reference_model, calibration_files, tmp_path):
    plan = plan_resources(reference_model, bits=2.25)
    out = tmp_path / "out"
    report = quantize(reference_model, out, calibration_files, recipe="uniform", bits=2.25, sequences=4, length=64,
                      show_progress=False)  # fmt: skip
    assert plan.quantization.model_bytes == report.original_total_bytes
    assert plan.serving.checkpoint_bytes == pytest.approx(report.total_bytes, rel=1e-4)  # shapes of packed linears


def test_more_measured_widths_and_more_text_take_longer(reference_model):
    def products(**options) -> float:
        return plan_resources(reference_model, **options).quantization.work.total

    few = {"sequences": 2, "length": 256}
    assert products(recipe="uniform", **few) <= products(recipe="paper-code", **few) < products(**few) / 10
    assert products(**few) < products()
