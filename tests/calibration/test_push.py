"""Checkpoints to the hub: huggingface_hub's own client against a hub in this process."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from tests.hub_server import TOKEN, Hub, running_hub
from vllm_mcmoe.calibration import push as push_module
from vllm_mcmoe.calibration.model import folder
from vllm_mcmoe.calibration.prune.prune import prune
from vllm_mcmoe.calibration.push import push
from vllm_mcmoe.errors import FormatError, HubError

NAME = "me/Tiny-Qwen3-mcmoe"
FEW = {"sequences": 4, "length": 32, "show_progress": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_checkpoint, calibration_files) -> Path:
    """A pruned checkpoint."""
    out = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("finished") / "out"))
    prune(out, calibration_files[:1], method="odp", target=0.25, **FEW)
    return out


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "checkpoint"))


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as server:
        log_in(monkeypatch, server, TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def log_in(monkeypatch, hub: Hub, token: str | bool) -> None:
    for module in (folder, push_module):
        monkeypatch.setattr(module, "hub_api", lambda: HfApi(endpoint=hub.url, token=token))


def uploaded(checkpoint: Path) -> dict[str, bytes]:
    """What the hub should have of it."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    files["README.md"] = files["README.md"].replace(b"PATH_TO_THIS_DIRECTORY", NAME.encode())
    return files | {".gitattributes": b""}


def committed(hub: Hub) -> int:
    return len(hub.repositories[NAME].commits)


def test_a_checkpoint_is_uploaded_with_a_card_that_names_it(hub, checkpoint):
    messages: list[str] = []
    before = (checkpoint / "README.md").read_bytes()
    assert push(checkpoint, NAME, log=messages.append) == f"{hub.url}/{NAME}"
    assert hub.repositories[NAME].files() == uploaded(checkpoint)
    assert f"vllm serve {NAME}".encode() in hub.repositories[NAME].files()["README.md"]
    assert (checkpoint / "README.md").read_bytes() == before
    assert not hub.repositories[NAME].private
    assert any(line.startswith("Uploading ") and line.endswith(f"to {hub.url}/{NAME}.") for line in messages)


def test_what_is_there_is_not_uploaded_again(hub, checkpoint):
    push(checkpoint, NAME)
    commits = committed(hub)
    push(checkpoint, NAME)
    assert committed(hub) == commits


def test_an_upload_that_broke_off_goes_on_with_what_is_missing(hub, checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub._upload_pipeline.INITIAL_COMMIT_SIZE_INDEX", 0)
    monkeypatch.setattr("huggingface_hub._upload_pipeline.COMMIT_SIZE_SCALE", [4])  # files per commit
    hub.room = 2
    with pytest.raises(HubError, match=f"{NAME}: it was not uploaded whole; the same command goes on .* HTTP 403"):
        push(checkpoint, NAME)
    there = set(hub.repositories[NAME].files())
    assert 0 < len(there) < len(uploaded(checkpoint))
    hub.room = None
    hub.changed.clear()
    push(checkpoint, NAME)
    assert hub.repositories[NAME].files() == uploaded(checkpoint)
    assert set().union(*hub.changed) == uploaded(checkpoint).keys() - there


def test_a_new_pruning_rule_replaces_the_one_on_the_hub(hub, checkpoint, calibration_files):
    push(checkpoint, NAME)
    (old,) = (path.name for path in checkpoint.glob("pruning-*"))
    prune(checkpoint, calibration_files[:1], method="odp", target=0.1, **FEW)
    push(checkpoint, NAME)
    assert old not in hub.repositories[NAME].files()
    assert hub.repositories[NAME].files() == uploaded(checkpoint)


def test_a_branch_and_a_private_repository_are_made(hub, checkpoint):
    assert push(checkpoint, NAME, private=True, revision="2.5bit") == f"{hub.url}/{NAME}/tree/2.5bit"
    assert hub.repositories[NAME].private
    assert hub.repositories[NAME].files("2.5bit") == uploaded(checkpoint)
    assert hub.repositories[NAME].files().keys() == {".gitattributes"}


@pytest.mark.parametrize(
    ("name", "token", "told"),
    [
        (NAME, False, "HTTP 401: Invalid username or password; `hf auth login` or HF_TOKEN says who you are"),
        ("other/Tiny", TOKEN, "HTTP 403: You don't have the rights to create a model under other"),
        ("Tiny", TOKEN, "Tiny is no name on the hub: those are ORG/NAME"),
    ],
)
def test_who_may_not_upload_is_told_why(hub, checkpoint, monkeypatch, name, token, told):
    log_in(monkeypatch, hub, token)
    with pytest.raises(HubError, match=told):
        push(checkpoint, name)
    assert hub.repositories == {}


def test_offline_nothing_is_uploaded(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so the hub is not asked"):
        push(checkpoint, NAME)


def without(name: str):
    return lambda checkpoint: next(checkpoint.glob(name)).unlink()


def without_an_expert(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for layer in config["quantization_config"]["experts"].values():
        layer["gate_up"].append(2)
        layer["down"].append(2)
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without("config.json"), "config.json does not exist"),
        (without("model-00002-of-*"), "named in the index but missing"),
        (without("pruning-*"), r"pruning-.*\.safetensors is missing, which config.json names"),
        (without("README.md"), r"README\.md is missing, the model card"),
        (without_an_expert, "expert 8: 0 of 3 projections have a qweight.*lists all faults"),
    ],
)
def test_a_checkpoint_that_is_not_complete_is_refused_before_anything_is_sent(hub, checkpoint, damage, told):
    damage(checkpoint)
    with pytest.raises(FormatError, match=told):
        push(checkpoint, NAME)
    assert hub.requests == []


def test_a_model_as_released_is_no_checkpoint(hub, qwen3_model):
    with pytest.raises(FormatError, match="this model is not quantised; run `mcmoe quantize`"):
        push(qwen3_model, NAME)
