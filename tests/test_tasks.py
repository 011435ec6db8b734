"""The items of benchmarks/lm_eval, and how benchmarks/tasks.py reads and compares answers."""

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FOLDER = BENCHMARKS / "lm_eval"
LEAST_ITEMS = 300  # a share near a half then has a standard error below 3%


def load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return load(FOLDER / "make_tasks.py")


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    return load(BENCHMARKS / "tasks.py")


def items(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_task_that_is_asked_has_a_file_and_enough_items(tasks):
    found = {}
    for file in FOLDER.glob("*.yaml"):
        settings = yaml.safe_load(file.read_text())
        data = FOLDER.parents[1] / settings["dataset_kwargs"]["data_files"]["test"]
        assert data == FOLDER / f"{file.stem}.jsonl"
        found[settings["task"]] = len(items(file.stem))
    assert set(found) == set(tasks.TASKS)
    assert min(found.values()) >= LEAST_ITEMS


@pytest.mark.parametrize("name", ["continuations", "copying", "recall"])
def test_the_items_are_what_the_script_makes(maker, name):
    assert list(getattr(maker, name)()) == items(name)


@pytest.mark.parametrize("name", ["continuations", "countries"])
def test_of_four_different_choices_one_is_right_at_any_place(name):
    places = Counter(item["answer"] for item in items(name))
    assert all(len(set(item["choices"])) == 4 for item in items(name))
    assert set(places) == {0, 1, 2, 3}
    assert max(places.values()) < 0.35 * sum(places.values())  # who always takes the same place gains nothing


def test_a_countrys_own_name_does_not_give_its_capital_away(maker):
    pairs = [("Tunisia", "Tunis"), ("El Salvador", "San Salvador"), ("Mexico", "Mexico City"), ("Panama", "Panama")]
    assert all(maker.gives_away(*pair) for pair in pairs)
    assert not maker.gives_away("Democratic Republic of the Congo", "Kinshasa")
    asked = [item for item in items("countries") if item["about"] == "capital"]
    for item in asked:
        name = item["context"].removeprefix("The capital of ").removesuffix(" is")
        assert not maker.gives_away(name, item["choices"][item["answer"]]), item
    assert len(asked) > 100


def test_what_is_asked_for_stands_in_the_context_once():
    for item in items("recall"):
        assert item["context"].count(f": {item['answer']}\n") == 1
    for item in items("copying"):
        assert f"Words: {item['answer']}." in item["context"]


def write_samples(folder: Path, task: str, metric: str, right: list[float]) -> None:
    """As lm_eval 0.4.13 writes them: a file per task in a folder named after the model, an item per line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"doc_id": i, "doc": {}, metric: value}) for i, value in enumerate(right)]
    (folder / f"samples_{task}_2026-12-01T00-00-00.000000.jsonl").write_text("\n".join(lines) + "\n")


def test_a_model_that_was_asked_already_is_not_served_again(tasks, tmp_path):
    write_samples(tmp_path / "model" / "some__folder", "mcmoe_recall", "exact_match", [1.0, 0.0])
    options = tasks.argparse.Namespace(work=tmp_path, tasks=["mcmoe_recall"], limit=None)
    assert tasks.read_answers(Path("/nowhere/model"), options) == {"mcmoe_recall": {0: 1.0, 1: 0.0}}


def test_only_what_is_missing_is_asked_and_the_other_answers_stay(tasks, tmp_path, monkeypatch):
    folder = tmp_path / "model" / "some__folder"
    write_samples(folder, "mcmoe_recall", "exact_match", [1.0, 0.0])
    asked = []

    def ask(model, out, missing, options) -> None:
        asked.append(missing)
        write_samples(folder, "mcmoe_copying", "exact_match", [0.0, 0.0])

    monkeypatch.setattr(tasks, "ask", ask)
    options = tasks.argparse.Namespace(work=tmp_path, tasks=["mcmoe_recall", "mcmoe_copying"], limit=None)
    found = tasks.read_answers(Path("/nowhere/model"), options)
    assert asked == [["mcmoe_copying"]]
    assert found == {"mcmoe_recall": {0: 1.0, 1: 0.0}, "mcmoe_copying": {0: 0.0, 1: 0.0}}


def test_a_tag_is_not_taken_for_a_task_whose_name_begins_like_it(tasks, tmp_path, monkeypatch):
    write_samples(tmp_path / "model" / "some__folder", "mcmoe_recall", "exact_match", [1.0, 0.0])
    monkeypatch.setattr(tasks, "ask", lambda *arguments: None)
    options = tasks.argparse.Namespace(work=tmp_path, tasks=["mcmoe"], limit=None)
    with pytest.raises(SystemExit, match="no answers to mcmoe; give single tasks"):
        tasks.read_answers(Path("/nowhere/model"), options)


def test_the_difference_to_the_original_is_that_on_the_same_items(tasks):
    original = {i: float(i < 60) for i in range(100)}
    checkpoint = original | {i: 0.0 for i in range(10)} | {i: 1.0 for i in range(98, 100)}
    score = tasks.score("task", checkpoint, original)
    assert (score.accuracy, score.difference) == (0.52, pytest.approx(-0.08))
    # 10 items lost, 2 won: the variance is (10 + 2) / 100 - 0.08², of n - 1
    assert score.difference_error == pytest.approx(math.sqrt((0.12 - 0.08**2) / 99))
    assert score.difference_error < score.error  # about 5%, of 100 items each
    assert tasks.score("task", original, original).difference is None


def test_answers_to_other_items_are_refused(tasks):
    with pytest.raises(ValueError, match="recall: 2 items were asked, and others of the original, 3"):
        tasks.score("recall", {0: 1.0, 1: 0.0}, {0: 1.0, 1: 0.0, 2: 1.0})
