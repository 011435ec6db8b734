"""What is in memory while a model is measured and quantised."""

from pathlib import Path

import pytest
import torch

from benchmarks.streaming_memory import quantize_within, write_random_mixtral
from tests.calibration import child_process
from tests.calibration.conftest import layerwise
from vllm_mcmoe.calibration.measure.expert_tokens import ExpertTokens, second_moment
from vllm_mcmoe.calibration.measure.sensitivity import choose_store
from vllm_mcmoe.calibration.model import activations
from vllm_mcmoe.calibration.model.activations import SCRATCH, ActivationStore, DiskRows

HIDDEN, INTERMEDIATE, EXPERTS = 512, 512, 16
LAYER_BYTES = 4 * EXPERTS * 3 * HIDDEN * INTERMEDIATE  # 50 MB in float32; attention adds 6%


def peak_of_quantising(model: Path, out: Path) -> int:
    """The most bytes resident; weights are rounded to nearest, which takes seconds."""
    options = {"sequences": 2, "length": 64, "activations": "disk", "show_progress": False}
    return quantize_within(None, model, out, **options)


def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """Of three times the layers, none may stay: eight more layers would be 400 MB in float32, 200 MB in bf16.

    The smallest peak of two runs, or of up to five: pages of mapped files count while they are resident, which differs
    from run to run and on a busy machine can only add, while what stays in memory stays in every run.
    """
    models = {n: write_random_mixtral(tmp_path / f"model-{n}", n, HIDDEN, INTERMEDIATE, EXPERTS) for n in (4, 12)}
    peaks: dict[int, list[int]] = {4: [], 12: []}

    def grows() -> bool:
        return min(peaks[12]) - min(peaks[4]) >= LAYER_BYTES

    for run in range(5):
        for layers, model in models.items():
            out = tmp_path / f"out-{layers}-{run}"
            peaks[layers].append(child_process.result_of(peak_of_quantising, model, out))
        if run >= 1 and not grows():
            break
    assert not grows(), peaks


def test_only_one_layer_is_loaded_at_a_time_and_embeddings_and_head_only_while_used(reference_model):
    model = layerwise(reference_model)

    def loaded() -> set[str]:
        return {name for name, parameter in model.module.named_parameters() if not parameter.is_meta}

    assert loaded() == {"model.norm.weight"}
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    (hidden,) = model.embed(tokens)
    assert loaded() == {"model.norm.weight"}
    with torch.no_grad(), model.loaded_layer(1) as layer:
        hidden = layer(hidden)
        assert {name.split(".")[2] for name in loaded() if ".layers." in name} == {"1"}
    assert loaded() == {"model.norm.weight"}
    model.logits(hidden)
    model.release_head()
    assert loaded() == {"model.norm.weight"}


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(sequences, 5, 8, generator=generator) for sequences in (3, 3, 1)]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_activations_come_back_bit_for_bit_by_batch_and_by_row(tmp_path, batches, place):
    store = ActivationStore(tmp_path / "activations" if place == "disk" else None)
    stored = store.collect("x", iter(batches), tokens=35)
    assert all(torch.equal(a, b) for a, b in zip(stored, batches, strict=True))
    flat = torch.cat([batch.flatten(0, 1) for batch in batches])
    index = torch.tensor([34, 0, 17, 17])
    assert torch.equal(stored.rows[index], flat[index])
    assert torch.equal(stored.rows[index[:0]], flat[:0])
    assert len(stored.rows) == 35


def test_activations_on_disk_are_found_again_until_they_are_dropped(tmp_path, batches):
    ActivationStore(tmp_path / "a").collect("x", iter(batches), tokens=35)
    again = ActivationStore(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(again.find("x"), batches, strict=True))
    again.drop("x")
    assert again.find("x") is None
    assert list((tmp_path / "a").iterdir()) == []


def test_activations_that_were_damaged_or_never_finished_are_not_found(tmp_path, batches):
    store = ActivationStore(tmp_path / "a")
    store.collect("damaged", iter(batches), tokens=35)
    (tmp_path / "a" / "damaged.f32").write_bytes(bytes(35 * 8 * 4))
    store.create("unfinished", tokens=35).append(batches[0])
    store.collect(f"{SCRATCH}x", iter(batches), tokens=35)
    assert [store.find(name) for name in ("damaged", "unfinished", f"{SCRATCH}x", "never made")] == [None] * 4


def test_activations_in_memory_are_not_found_by_a_later_run(batches):
    store = ActivationStore()
    store.collect("x", iter(batches), tokens=35)
    assert store.find("x") is None


@pytest.mark.parametrize(("available", "on_disk"), [(3 << 30, False), (1 << 30, True)])
def test_auto_keeps_activations_in_memory_where_they_fit(tmp_path, reference_model, monkeypatch, available, on_disk):
    """Next to two layers of the reference model (27 MB in all) and 2 GiB."""
    monkeypatch.setattr(activations, "available_memory", lambda: available)
    messages = []
    store = choose_store("auto", layerwise(reference_model), 4096, True, tmp_path / "a", messages.append)
    rows = store.collect("x", [torch.zeros(1, 2, 3)], tokens=2).rows
    assert isinstance(rows, DiskRows) == on_disk
    assert bool(messages) == on_disk


def test_large_second_moments_are_computed_in_their_upper_half_and_mirrored():
    """Of 2500 columns: blocks of 1024 rows, the last one smaller."""
    x = torch.randn(64, 2500, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(64, generator=torch.Generator().manual_seed(1))
    moment = second_moment(ExpertTokens(torch.arange(64), torch.ones(64), x), weights, None)
    expected = (x.double() * weights[:, None]).t() @ x.double()
    assert torch.allclose(moment.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(moment, moment.t())


def test_second_moments_are_summed_over_chunks_of_tokens():
    """5000 tokens are three chunks; float32 sums in another order than in one product."""
    x = torch.randn(6000, 16, generator=torch.Generator().manual_seed(0))
    index, weights = torch.arange(0, 5000), torch.rand(5000, generator=torch.Generator().manual_seed(1))
    tokens = ExpertTokens(index, torch.ones(5000), x)
    assert [len(chunk) for chunk in tokens.chunks()] == [2048, 2048, 904]
    expected = (x[:5000].double().square() * weights[:, None]).t() @ x[:5000].double().square()
    assert torch.allclose(second_moment(tokens, weights, torch.square).double(), expected, rtol=1e-4)
