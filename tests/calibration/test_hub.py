"""Models by their names on the hub: huggingface_hub's own client against a hub in this process."""

import dataclasses
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, metadata_load
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.calibration.conftest import QUICK, interrupted_at_the_last_layer, mixed_plan
from tests.hub_server import Hub, running_hub
from vllm_mcmoe.calibration.checkpoint.report import QuantizationReport
from vllm_mcmoe.calibration.common import progress as progress_bars
from vllm_mcmoe.calibration.evaluate.inspection import inspect_checkpoint, inspect_model
from vllm_mcmoe.calibration.evaluate.resources import plan_resources
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.model import folder
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.folder import find_model
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.prune.prune import prune
from vllm_mcmoe.cli import app
from vllm_mcmoe.errors import FormatError, HubError, PruningError, UnsupportedModelError, WorkDirectoryError

NAME = "org/Tiny-Qwen3"
FEW = {"sequences": 4, "length": 32, "show_progress": False}
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory, qwen3_model) -> Path:
    """In a shard per decoder layer and one for the rest, as models are released, with a model card."""
    out = Path(shutil.copytree(qwen3_model, tmp_path_factory.mktemp("sharded") / "model"))
    shards: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        number = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 4
        shards.setdefault(f"model-{number:05d}-of-00004.safetensors", {})[name] = tensor
    (out / "model.safetensors").unlink()
    for file, tensors in shards.items():
        save_file(tensors, out / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "README.md").write_text(CARD)
    return out


@pytest.fixture
def hub(monkeypatch, tmp_path, model) -> Iterator[Hub]:
    """A hub that has the model, asked by everything here, and an empty cache."""
    with running_hub() as server:
        server.add(NAME, model)
        ask(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def ask(monkeypatch, url: str, token: str | bool = False) -> None:
    """From now on everything asks the hub at this address."""
    monkeypatch.setattr(folder, "hub_api", lambda: HfApi(endpoint=url, token=token))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_all(name: Any, **options: Any) -> dict[str, Any]:
    source = WeightFiles(describe_model(find_model(name, **options)))
    return {name: source.read(name) for name in source.names()}


def quantize_tiny(name: Any, out: Path, model: Path, data: list[Path], **changes: Any) -> QuantizationReport:
    options = {"plan": mixed_plan(model), "recipe": QUICK, "sequences": 8, "length": 64, "show_progress": False}
    return quantize(name, out, data, **{**options, **changes})


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


SHARDS = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]


def test_a_name_is_quantised_into_the_checkpoint_of_the_directory(
    hub, model, tiny_checkpoint, tmp_path, calibration_files
):
    quantize_tiny(NAME, tmp_path / "out", model, calibration_files, evaluation_data=calibration_files[:1])
    named, local = contents(tmp_path / "out"), contents(tiny_checkpoint)
    card, card_of_local = named.pop("README.md").decode(), local.pop("README.md").decode()
    report, report_of_local = (json.loads(files.pop("quantization_report.json")) for files in (named, local))
    assert report.pop("evaluation") and report_of_local.pop("evaluation") is None  # this one was evaluated
    assert (named, report) == (local, report_of_local)
    assert f"# {NAME}, experts at" in card and "# tiny-qwen3, experts at" in card_of_local
    metadata = metadata_load(tmp_path / "out" / "README.md")
    assert metadata["base_model"] == NAME and metadata["base_model_relation"] == "quantized"
    assert metadata["license"] == "apache-2.0" and "language" not in metadata
    assert "base_model" not in metadata_load(tiny_checkpoint / "README.md")
    assert sorted(hub.fetched(".safetensors")) == SHARDS  # each once, over all passes
    assert sorted(hub.fetched(".json")) == sorted(name for name in contents(model) if name.endswith(".json"))
    blobs = list((tmp_path / "cache" / "models--org--Tiny-Qwen3" / "blobs").iterdir())
    assert sum(blob.stat().st_size for blob in blobs) == sum(map(len, contents(model).values()))  # nothing twice


def test_a_shard_is_fetched_when_the_first_of_its_tensors_is_read(hub):
    source = WeightFiles(describe_model(NAME))
    assert hub.fetched(".safetensors") == []
    source.read("model.layers.1.self_attn.q_proj.weight")
    source.read("model.layers.1.mlp.experts.3.up_proj.weight")
    assert hub.fetched(".safetensors") == [SHARDS[1]]
    source.read("model.norm.weight")
    assert hub.fetched(".safetensors") == [SHARDS[1], SHARDS[3]]


def test_inspect_reads_the_config_and_headers_and_plan_resources_the_config_alone(hub, model):
    plan_resources(NAME, bits=2.5)
    assert [request.path.rsplit("/", 1)[-1] for request in hub.requests if request.sent] == [
        "Tiny-Qwen3", "config.json",
    ]  # fmt: skip
    summary = inspect_model(NAME, 2.5)
    assert summary.headers == 4
    assert dataclasses.replace(summary, headers=None) == inspect_model(model, 2.5)
    assert hub.fetched(".safetensors") == []
    assert sorted(hub.fetched(".safetensors", ranges=True)) == SHARDS
    assert "tokenizer.json" not in hub.fetched(".json")


def test_headers_that_disagree_with_the_config_are_found_without_a_download(hub):
    files = dict(hub.repositories[NAME].files())
    config = json.loads(files["config.json"]) | {"num_experts": 9, "num_local_experts": 9}
    hub.repositories[NAME].commit(files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(UnsupportedModelError, match=r"experts\.8\.gate_proj.* is missing; config.json promises 9"):
        inspect_model(NAME, 2.5)
    assert hub.fetched(".safetensors") == []


def test_a_file_that_is_no_safetensors_is_found_without_a_download(hub):
    files = hub.repositories[NAME].files()
    hub.repositories[NAME].commit(files | {SHARDS[2]: b"<html>" * 1000})
    with pytest.raises(FormatError, match=f"{NAME}: {SHARDS[2]} cannot be read as safetensors"):
        WeightFiles(describe_model(NAME))


def test_a_single_file_and_none(hub, qwen3_model):
    hub.add("org/single", qwen3_model)
    assert read_all("org/single").keys() == read_all(qwen3_model).keys()
    hub.add("org/none", qwen3_model).commit({"config.json": (qwen3_model / "config.json").read_bytes()})
    with pytest.raises(FormatError, match=r"org/none: neither model\.safetensors\.index\.json nor model\.safetensors"):
        read_all("org/none")


def test_files_of_weights_may_be_in_a_folder(hub, model):
    files = dict(hub.repositories[NAME].files())
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    moved = {f"weights/{file}": files.pop(file) for file in SHARDS}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.repositories[NAME].commit(files | moved)
    assert read_all(NAME).keys() == read_all(model).keys()


def test_a_revision_is_a_branch_or_a_commit(hub):
    repository = hub.repositories[NAME]
    first = repository.branches["main"]
    repository.commit(repository.files() | {"generation_config.json": b"{}"}, "other")
    assert find_model(NAME).revision == find_model(NAME, first).revision == first
    other = find_model(NAME, "other")
    assert other.fetch("generation_config.json").read_bytes() == b"{}"
    assert find_model(NAME).fetch("generation_config.json").read_bytes() != b"{}"


def test_a_model_stays_at_its_commit_when_the_branch_moves(hub, model):
    found = find_model(NAME)
    repository = hub.repositories[NAME]
    repository.commit({name: b"" for name in repository.files()})
    assert read_all(found).keys() == read_all(model).keys()


def test_unfinished_work_goes_on_at_its_commit_and_without_the_hub(
    hub, model, tiny_checkpoint, tmp_path, calibration_files, monkeypatch
):
    with interrupted_at_the_last_layer():
        quantize_tiny(NAME, tmp_path / "out", model, calibration_files)
    repository = hub.repositories[NAME]
    begun = repository.branches["main"]
    moved = repository.commit(repository.files() | {"README.md": b"new"})
    with pytest.raises(
        WorkDirectoryError, match=f"model was {NAME}, commit {begun}, is {NAME}, commit {moved}. Repeat"
    ):
        quantize_tiny(NAME, tmp_path / "out", model, calibration_files)
    ask(monkeypatch, f"http://127.0.0.1:{free_port()}")
    messages: list[str] = []
    found = find_model(NAME, begun, messages.append)
    quantize_tiny(found, tmp_path / "out", model, calibration_files, log=messages.append)
    assert "2 of 3 layers are quantised already." in messages
    assert any("cannot be reached" in line and "are taken to be those in" in line for line in messages)
    written, expected = contents(tmp_path / "out"), contents(tiny_checkpoint)
    del written["README.md"], expected["README.md"]
    assert written == expected


def test_evaluate_takes_names(hub, model, tiny_checkpoint, calibration_files):
    hub.add("me/quantised", tiny_checkpoint)
    named = evaluate("me/quantised", calibration_files[:1], against=NAME, **FEW)
    local = evaluate(tiny_checkpoint, calibration_files[:1], against=model, **FEW)
    assert (named.model, named.against) == ("me/quantised", NAME)
    assert named.mean_kl == local.mean_kl and named.average_bits == local.average_bits


def test_the_rule_of_a_pruned_checkpoint_is_fetched_with_it(hub, model, tiny_checkpoint, tmp_path, calibration_files):
    pruned = Path(shutil.copytree(tiny_checkpoint, tmp_path / "pruned"))
    prune(pruned, calibration_files[:1], method="odp", **FEW)
    hub.add("me/pruned", pruned)
    assert evaluate("me/pruned", calibration_files[:1], **FEW).pruned > 0


def test_a_checkpoint_on_the_hub_is_inspected_without_its_weights(hub, tiny_checkpoint):
    hub.add("me/quantised", tiny_checkpoint)
    assert inspect_checkpoint("me/quantised") == inspect_checkpoint(tiny_checkpoint)
    assert hub.fetched(".safetensors") == []


def test_a_directory_comes_before_a_name(hub, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / NAME)
    assert find_model(NAME).path == Path(NAME)
    assert hub.requests == []
    with pytest.raises(HubError, match=f"{NAME}: a revision was given, main, which only ORG/NAME on the hub has"):
        find_model(NAME, "main")


@pytest.mark.parametrize("name", ["missing", "./models/missing", "/models/missing", "a/b/c", "../missing"])
def test_what_cannot_be_a_name_is_a_directory_that_is_missing(hub, name):
    with pytest.raises(UnsupportedModelError, match=r"no config\.json there; expected a .* directory, or ORG/NAME"):
        describe_model(name)
    assert hub.requests == []


def test_a_mistyped_directory_is_said_to_be_neither(hub):
    with pytest.raises(
        HubError, match=rf"models/mixtral: no such directory, and no model of that name on the hub \({hub.url}\)"
    ):
        describe_model("models/mixtral")


@pytest.mark.parametrize(
    ("traits", "told"),
    [
        ({"private": True}, "no such directory, and no model of that name .* private, log in with `hf auth login`"),
        ({"gated": True}, "org/closed: access is granted on request only: ask for it at .*/org/closed, then log in"),
    ],
)
def test_a_model_that_is_not_for_everybody(hub, model, traits, told):
    hub.add("org/closed", model, **traits)
    with pytest.raises(HubError, match=told):
        describe_model("org/closed")


def test_a_refused_token(hub, monkeypatch):
    ask(monkeypatch, hub.url, token="hf_expired")
    with pytest.raises(HubError, match=r"HTTP 401: Invalid credentials .*; `hf auth login` or HF_TOKEN says who"):
        describe_model(NAME)


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_a_revision_that_is_missing(hub, revision):
    with pytest.raises(HubError, match=f"{NAME}: the hub .* has no such revision of it; give --revision a branch, a"):
        find_model(NAME, revision)


def test_a_repository_without_a_config(hub):
    hub.repositories[NAME].commit({"README.md": b"a data set, perhaps"})
    with pytest.raises(HubError, match=f"{NAME}: no config.json in that repository"):
        describe_model(NAME)


def test_offline_the_cache_is_all_there_is(hub, monkeypatch, tmp_path, model):
    read_all(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert read_all(NAME).keys() == read_all(model).keys()
    assert inspect_model(NAME, 2.5).headers is None
    with pytest.raises(
        HubError,
        match=f"org/other: no such directory, and revision main of .* not in the cache folder {tmp_path / 'cache'}; "
        "HF_HUB_OFFLINE is set, so the hub is not asked",
    ):
        describe_model("org/other")
    assert hub.requests == []


def test_offline_a_shard_that_is_not_in_the_cache_is_named(hub, monkeypatch):
    WeightFiles(describe_model(NAME)).read("model.norm.weight")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"header of model-0000[123]-of-00004\.safetensors .* HF_HUB_OFFLINE is set"):
        read_all(NAME)


def test_without_network_the_cache_folder_is_named(hub, monkeypatch, tmp_path):
    ask(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(
        HubError,
        match=f"no such directory, and revision main .* cache folder {tmp_path / 'cache'}; .* cannot be reached",
    ):
        describe_model(NAME)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # 10 MB, which the shard does not have
    hub.cut[SHARDS[0]] = 200_000
    found = read_all(NAME)
    expected = read_all(model)
    assert all(found[name].equal(expected[name]) for name in expected)
    ranges = [request.range for request in hub.requests if request.path.endswith(SHARDS[0]) and request.range]
    assert ranges == ["bytes=0-100000", "bytes=200000-"]


def test_after_a_download_that_failed_only_what_is_missing_is_fetched(hub, model, tmp_path):
    source = WeightFiles(describe_model(NAME))
    hub.refused[f"*/{SHARDS[2]}"] = 403
    with pytest.raises(
        HubError, match=rf"{SHARDS[2]} could not be fetched: .* HTTP 403.* kept in {tmp_path / 'cache'}: the same"
    ):
        for name in source.names():
            source.read(name)
    assert hub.fetched(".safetensors") == SHARDS[:2]
    hub.refused.clear()
    hub.requests.clear()
    assert read_all(NAME).keys() == read_all(model).keys()
    assert hub.fetched(".safetensors") == SHARDS[2:]


def test_a_shard_in_the_cache_that_differs_from_its_header_on_the_hub_is_refused(hub, model):
    source = WeightFiles(describe_model(NAME))
    files = hub.repositories[NAME].files()
    files[SHARDS[1]] = files[SHARDS[0]]
    with pytest.raises(FormatError, match=rf"{SHARDS[1]}: model\.layers\.1\..* is not what the hub said before"):
        source.read("model.layers.1.self_attn.q_proj.weight")


def test_a_snapshot_in_the_cache_is_a_directory_that_knows_its_name(hub, model):
    found = find_model(NAME)
    found.fetch_side_files()
    read_all(found)
    hub.requests.clear()
    snapshot = describe_model(found.path)
    assert (snapshot.folder.on_hub, snapshot.folder.name, snapshot.folder.revision) == (NAME, NAME, None)
    assert read_all(found.path).keys() == read_all(model).keys()
    assert hub.requests == []


def run_mcmoe(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_commands_take_a_revision(hub, tiny_checkpoint, calibration_files, tmp_path):
    hub.add("me/quantised", tiny_checkpoint)
    few = ("--sequences", 2, "--length", 32, "--json")
    repository = hub.repositories[NAME]
    repository.commit({name: content for name, content in repository.files().items() if name != SHARDS[0]}, "broken")
    assert run_mcmoe("plan-resources", NAME, "--revision", "broken", "--json").exit_code == 0
    data = ("--data", calibration_files[0])
    result = run_mcmoe("evaluate", "me/quantised", "--revision", "main", "--against", NAME, *data, *few)
    assert json.loads(result.stdout)["against"] == NAME
    with pytest.raises(HubError, match=f"header of {SHARDS[0]} could not be fetched: the hub .* has no such file"):
        run_mcmoe("evaluate", "me/quantised", "--against", NAME, "--against-revision", "broken", *data, *few)
    for command in (("calibrate", NAME), ("quantize", NAME, tmp_path / "out", "--bits", 2.5), ("inspect", NAME)):
        with pytest.raises(HubError, match="no such revision of it"):
            run_mcmoe(*command, "--revision", "v9")


@pytest.mark.parametrize("option", ["--revision", "--against-revision"])
def test_what_is_served_has_no_revision(option):
    address = "http://127.0.0.1:9/v1"
    result = run_mcmoe("evaluate", address, "--against", address, "--data", "x", option, "main")
    assert result.exit_code == 2
    assert f"Invalid value for {option}: goes with a name on the hub" in result.output


def test_prune_writes_into_no_checkpoint_but_ones_own(hub, tiny_checkpoint, calibration_files):
    hub.add("me/quantised", tiny_checkpoint)
    advice = "fetch one of your own with `hf download me/quantised --local-dir DIR`"
    with pytest.raises(PruningError, match=f"me/quantised is no directory; it may be a name on the hub.*{advice}"):
        prune("me/quantised", calibration_files)
    snapshot = find_model("me/quantised").path
    with pytest.raises(PruningError, match=f"lies in the hub's cache.*{advice}"):
        prune(snapshot, calibration_files)


def test_a_download_draws_its_bar_among_those_that_are_drawn(hub, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # standard error counts as a terminal, for rich
    monkeypatch.setenv("TQDM_POSITION", "-1")  # and for huggingface_hub
    seen = []

    class Watched(progress_bars._InnerBar):
        def close(self) -> None:
            if hasattr(self, "_task"):
                self.refresh()
                seen.append([(task.description, task.completed) for task in self._bars.tasks])
            super().close()

    monkeypatch.setattr(progress_bars, "_InnerBar", Watched)
    source = WeightFiles(describe_model(NAME))
    assert progress_bars.download_bar() is None
    first = source.names()[0]
    for name in progress_bars.progress([first], "Checking weights"):
        source.read(name)
        seen.append([task.description for task in progress_bars._drawn.tasks])
    shard = source.files.info[first].file
    ((outer, inner), left) = seen
    assert outer == ("Checking weights", 0) and left == ["Checking weights"]
    assert inner[0].endswith(shard.name) and inner[1] == shard.stat().st_size
    assert progress_bars.download_bar() is None
    assert "Checking weights" in capsys.readouterr().err
