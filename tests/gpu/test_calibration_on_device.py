"""Calibration on a GPU against the CPU. Placement is tested without one (tests/calibration/test_device.py); what is
left is that a GPU has every operation, and that its sums in another order change nothing but the last bits.

A last bit may move a code to its neighbour or a token to another expert, so what is compared is quality. The tolerances
have not met a GPU yet.
"""

import pytest
import torch

from tests.calibration.conftest import QUICK, interrupted_at_the_last_layer, layer_by_layer_logits
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions, HessianFactor, proxy_loss, quantize_gptq
from vllm_mcmoe.calibration.measure.factors import Factors
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.prune.prune import prune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]

TEXT = {"sequences": 8, "length": 128, "show_progress": False}


@pytest.fixture(scope="module")
def checkpoints(reference_model, calibration_files, tmp_path_factory):
    """Device -> the reference model at 2.5 bits, measured and quantised there."""
    made = {}
    for device in ("cpu", "cuda"):
        made[device] = tmp_path_factory.mktemp(device) / "checkpoint"
        quantize(reference_model, made[device], calibration_files, bits=2.5, recipe=QUICK, device=device, **TEXT)
    return made


def test_logits_are_the_cpus(reference_model):
    tokens = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    expected, found = (layer_by_layer_logits(reference_model, tokens, device) for device in ("cpu", "cuda"))
    # Float32 throughout: TF32 would be off by 1e-3. A median, because a token on the edge of two experts may switch.
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 1e-5


@pytest.mark.parametrize("options", [{}, {"codes": "trellis", "metadata": "float8"}], ids=["scalar", "trellis"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_matrix_is_quantised_as_well_as_on_the_cpu(bits, options):
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(1024, 320, generator=generator), torch.randn(256, 320, generator=generator)
    options = GPTQOptions(act_order=True, refinement_sweeps=4, **options)
    losses = []
    for device in ("cpu", "cuda"):
        factor = HessianFactor.build((inputs.t() @ inputs).to(device), options)
        matrix = quantize_gptq(weight.to(device), factor, bits, options)
        assert matrix.codes.device.type == device
        losses.append(float(proxy_loss(weight.to(device), matrix, factor).sum()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_measured_factors_are_the_cpus(checkpoints):
    expected, found = (Factors.load(checkpoints[device] / "factors.json") for device in ("cpu", "cuda"))
    for name, layer in expected.layers.items():
        ratio = torch.tensor(found.layers[name].loss_increase["down"][2]) / torch.tensor(layer.loss_increase["down"][2])
        assert ratio.log().abs().median() < 0.05  # sampled labels, too, may fall on the other side of an edge
    assert [sum(layer.activation_count) for layer in found.layers.values()] == [
        sum(layer.activation_count) for layer in expected.layers.values()
    ]


def test_a_checkpoint_is_as_good_as_one_made_on_the_cpu(checkpoints, evaluation_files):
    options = {"device": "cpu", "pruning": "off", **TEXT}
    expected, found = (evaluate(checkpoints[made_on], evaluation_files, **options) for made_on in ("cpu", "cuda"))
    assert found.average_bits == pytest.approx(expected.average_bits, rel=0.01)
    assert found.token_perplexity == pytest.approx(expected.token_perplexity, rel=0.02)


def test_an_evaluation_gives_the_cpus_figures(reference_model, checkpoints, evaluation_files):
    options = {"against": reference_model, **TEXT}
    expected, found = (evaluate(checkpoints["cpu"], evaluation_files, device=d, **options) for d in ("cpu", "cuda"))
    assert found.token_perplexity == pytest.approx(expected.token_perplexity, rel=1e-3)
    assert found.mean_kl == pytest.approx(expected.mean_kl, rel=1e-2)


def test_a_pruning_rule_drops_what_it_was_asked_to(checkpoints, calibration_files):
    unpruned, pruned = prune(
        checkpoints["cuda"], calibration_files, target=0.25, evaluation_data=calibration_files, device="cuda", **TEXT
    )
    assert unpruned.mean_kl == pytest.approx(0, abs=1e-5)
    assert pruned.pruned == pytest.approx(0.25, abs=0.02)


def test_unfinished_work_is_continued(reference_model, checkpoints, calibration_files, tmp_path):
    plan = Plan.load(checkpoints["cuda"] / "plan.json")
    options = {"plan": plan, "recipe": QUICK, "device": "cuda", "activations": "disk", **TEXT}
    with interrupted_at_the_last_layer():
        quantize(reference_model, tmp_path / "out", calibration_files, **options)
    messages: list[str] = []
    quantize(reference_model, tmp_path / "out", calibration_files, log=messages.append, **options)
    assert "3 of 4 layers are quantised already." in messages
