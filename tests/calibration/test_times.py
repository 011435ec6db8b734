"""How long quantising takes: counted by kind, predicted from a test of this machine, and seen to be so."""

import dataclasses
import time
from typing import get_args

import pytest
import torch

from vllm_mcmoe.calibration.evaluate import times
from vllm_mcmoe.calibration.evaluate.resources import plan_resources
from vllm_mcmoe.calibration.evaluate.speed import Speed, predict, typical_speed
from vllm_mcmoe.calibration.evaluate.times import phases_of, predict_times
from vllm_mcmoe.calibration.evaluate.work import Kind, MultiplyAdds, multiply_adds
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.recipes import find_recipe

FEW = {"sequences": 4, "length": 128}
KINDS = set(get_args(Kind))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_time_is_the_sum_of_all_kinds_of_work(reference_model):
    work = plan_resources(reference_model, **FEW).quantization.work
    assert {field.name for field in dataclasses.fields(Speed)} == KINDS
    found = {kind for amounts in dataclasses.asdict(work).values() for kind, amount in amounts.items() if amount}
    assert found == KINDS - {"rounded"}  # of this model all rows are measured, none rounded
    nothing = dataclasses.replace(typical_speed(False), **dict.fromkeys(KINDS, 0.0))
    of_kinds = 0.0
    for kind in KINDS:
        of_kinds += sum(predict(work, dataclasses.replace(nothing, **{kind: 2.0})).values())
    twice = sum(sum(amounts.values()) for amounts in dataclasses.asdict(work).values())
    assert of_kinds == pytest.approx(2 * twice)
    products = dataclasses.replace(nothing, **dict.fromkeys(get_args(MultiplyAdds), 1.0))
    assert sum(predict(work, products).values()) == pytest.approx(work.total)


def test_a_real_run_takes_about_as_long_as_predicted(
    reference_model, calibration_files, tmp_path, one_thread, monkeypatch
):
    """Within three times of it, on a machine with other work: benchmarks/streaming_memory.py shows how near it is."""
    tests = []
    measured = times.measure_speed

    def measure_speed(*arguments) -> Speed:
        tests.append(measured(*arguments))
        return tests[-1]

    monkeypatch.setattr(times, "measure_speed", measure_speed)
    predicted = predict_times(reference_model, linear_bits=16, tuned=False, **FEW)
    assert all(0 < value < 1 for speed in tests for value in dataclasses.asdict(speed).values())
    assert len(tests) == 1  # a hidden size at which no effort rounds products
    fast, normal, best = (sum(predicted[effort].values()) for effort in ("fast", "normal", "best"))
    assert fast < normal <= best
    options = {"bits": 2.25, "linear_bits": 16, "tuned": False, "effort": "fast", "show_progress": False, **FEW}
    started = time.process_time()
    quantize(reference_model, tmp_path / "out", calibration_files, **options)
    assert fast / 3 < time.process_time() - started < 3 * fast


def test_what_is_measured_and_quantised_makes_up_the_whole(reference_model):
    model = LayerwiseModel(WeightFiles(describe_model(reference_model)))
    recipe = find_recipe("mcmoe")
    work = plan_resources(reference_model, **FEW).quantization.work
    whole = sum(predict(work, typical_speed(False)).values())

    def seconds(**options) -> dict[str, float]:
        phases = phases_of(model, recipe, *FEW.values(), recipe.linear_bits, **options)
        assert all(phase.seconds > 0 for phase in phases)
        return {phase.description: phase.items * phase.seconds for phase in phases}

    found = seconds(measures=True)
    assert list(found) == [
        "Checking weights", "Running the model", "Measuring layers", "Quantising layers", "Tuning norms",
    ]  # fmt: skip
    assert sum(found.values()) == pytest.approx(whole)
    assert list(seconds(measures=True, quantizes=False)) == list(found)[:3]
    given = seconds(measures=False, evaluated=["a", "b", "a"])
    assert list(given) == ["Checking weights", "Quantising layers", "Tuning norms", "Running a", "Running b"]
    assert multiply_adds(work.backward) > 0
