"""The start cache below the engine: what is found again, what is not, and what happens where it cannot be written."""

import json
import logging
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.kernels.matrices import random_call
from tests.vllm_mcmoe.test_expert_weights import (
    HIDDEN,
    INTERMEDIATE,
    WITHOUT_CONTENT,
    layer_weights,
    load,
    random_checkpoint,
)
from tests.vllm_mcmoe.test_plugin import engine_config
from vllm_mcmoe import start_cache
from vllm_mcmoe.expert_loading import ExpertLoading, checkpoint_directory, expert_loading
from vllm_mcmoe.expert_weights import LayerWeights, Shard
from vllm_mcmoe.start_cache import StartCache, cache_root

WHOLE = Shard(expert_ids=(0, 1, 2, 3), tp_rank=0, tp_size=1)
BUFFERS = ("gate_up", "gate_up_table", "down", "down_table")


@pytest.fixture(scope="module")
def tensors():
    return random_checkpoint(HIDDEN, INTERMEDIATE)


@pytest.fixture
def model(tmp_path, tensors) -> Path:
    """A model's folder, with the layer's tensors."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    named = {f"{expert}.{shard}.qweight": matrix.qweight for (expert, shard), matrix in tensors.items()}
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def log():
    """What the plugin logs, [level, message]; vLLM's loggers do not propagate."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    logger = logging.getLogger("vllm.mcmoe")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def warnings(log) -> list[str]:
    return [message for level, message in log if level == "WARNING"]


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def start(root: Path, model: Path, tensors, shard: Shard = WHOLE):
    """What a start does with one layer: (the experts, or None where they cannot be cached; whether they were found)."""
    cache = StartCache(root, lambda: model)
    weights = layer_weights(shard, allocate=False)
    found = cache.find(weights)
    if found is not None:
        return found, True
    weights.allocate()
    load(weights, tensors)
    return cache.write(weights), False


def found_again(root: Path, model: Path, shard: Shard = WHOLE) -> bool:
    return StartCache(root, lambda: model).find(layer_weights(shard, allocate=False)) is not None


def test_the_second_start_finds_what_the_first_wrote(root, model, tensors):
    (first, first_found), (second, second_found) = start(root, model, tensors), start(root, model, tensors)
    assert (first_found, second_found) == (False, True)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in BUFFERS)


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: touch(model / "model.safetensors"),
        lambda model: (model / "model.safetensors").write_bytes(b"shorter"),
        lambda model: (model / "model.safetensors").rename(model / "gone.safetensors"),
    ],
    ids=["time", "size", "missing"],
)
def test_a_checkpoint_that_has_changed_is_not_found(root, model, tensors, change):
    start(root, model, tensors)
    change(model)
    assert not found_again(root, model)


def test_a_copy_elsewhere_is_another_checkpoint(root, model, tensors):
    start(root, model, tensors)
    copy = shutil.copytree(model, model.with_name("copy"))  # keeps sizes and times
    assert not found_again(root, copy)


def test_a_link_to_the_checkpoint_is_the_checkpoint(root, model, tensors):
    start(root, model, tensors)
    link = model.with_name("link")
    link.symlink_to(model)
    assert found_again(root, link)


def test_every_shard_counts(root, model, tensors):
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("one", "two"):
        shutil.copy2(model / "model.safetensors", model / f"{name}.safetensors")
    start(root, model, tensors)
    assert found_again(root, model)
    touch(model / "two.safetensors")
    assert not found_again(root, model)


def test_a_new_pruning_rule_keeps_the_entries(root, model, tensors):
    """mcmoe prune replaces config.json and adds a file the index does not name."""
    start(root, model, tensors)
    (model / "config.json").write_text('{"quantization_config": {"pruning": {}}}')
    (model / "pruning-0123.safetensors").write_bytes(b"")
    assert found_again(root, model)


def test_ranks_with_different_parts_have_different_files(root, model, tensors):
    parts = [Shard((0, 1, 2, 3), 0, 2), Shard((0, 1, 2, 3), 1, 2), Shard((0, 2), 0, 1), Shard((1, 3), 0, 1), WHOLE]
    for part in parts:
        start(root, model, tensors, part)
    assert len(files(root)) == len(parts)
    for part in parts:
        experts, found = start(root, model, tensors, part)
        assert found
        weights = layer_weights(part)
        load(weights, tensors)
        assert torch.equal(experts.down, StartCache(root / "other", lambda: model).write(weights).down)


def test_the_same_part_of_another_layer_has_a_file_of_its_own(root, model, tensors):
    start(root, model, tensors)
    weights = layer_weights(WHOLE)
    other = LayerWeights("model.layers.1.mlp.experts", WHOLE, weights.gate_up.codes, weights.down.codes, 256, 512)
    assert StartCache(root, lambda: model).find(other) is None


@pytest.mark.parametrize("version", ["LAYOUT_VERSION", "FORMAT_VERSION"])
def test_another_version_finds_nothing_and_removes_the_old_entries(root, model, tensors, monkeypatch, version):
    start(root, model, tensors)
    (old,) = files(root)
    monkeypatch.setattr(start_cache, version, 99)
    assert not found_again(root, model)
    start(root, model, tensors)
    (new,) = files(root)
    assert new != old


def test_entries_of_what_the_checkpoint_was_before_are_removed_and_nothing_else_is(root, model, tensors):
    other = shutil.copytree(model, model.with_name("other"))
    start(root, other, tensors)
    (kept,) = files(root)
    start(root, model, tensors)
    (before,) = set(files(root)) - {kept}
    (strangers := before.parent.parent / "notes").mkdir()
    (strangers / "mine.txt").write_text("not the cache's")
    touch(model / "model.safetensors")
    start(root, model, tensors)
    assert not before.parent.exists()
    assert {kept, strangers / "mine.txt"} < set(files(root))
    assert len(files(root)) == 3


def test_a_mapped_entry_survives_its_removal(root, model, tensors):
    experts, _ = start(root, model, tensors)
    expected = experts.down.clone()
    touch(model / "model.safetensors")
    start(root, model, tensors)
    assert torch.equal(experts.down, expected)


def test_a_damaged_entry_is_named_and_written_again(root, model, tensors, log):
    expected, _ = start(root, model, tensors)
    (file,) = files(root)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # what is mapped stays whole
    file.write_bytes(content)
    repaired, found = start(root, model, tensors)
    assert not found
    (warning,) = warnings(log)
    assert str(file) in warning and "checksum of down, matrix 3, does not match" in warning
    assert torch.equal(repaired.gate_up, expected.gate_up) and torch.equal(repaired.down, expected.down)
    assert found_again(root, model)


def test_a_foreign_entry_is_named_and_written_again(root, model, tensors, log):
    start(root, model, tensors)
    (file,) = files(root)
    file.unlink()
    file.write_bytes(b"not ours" * 1000)
    _, found = start(root, model, tensors)
    assert not found
    (warning,) = warnings(log)
    assert str(file) in warning and "begins with b'not ours'" in warning
    assert found_again(root, model)


def two_layers(cache: StartCache, tensors) -> list:
    """Both layers of a model, as vLLM goes through them: all are built before one is finished."""
    layers = [layer_weights(WHOLE, allocate=False), layer_weights(Shard((0, 1), 0, 1), allocate=False)]
    assert [cache.find(weights) for weights in layers] == [None, None]
    for weights in layers:
        weights.allocate()
        load(weights, tensors)
    return [cache.write(weights) for weights in layers]


def test_a_disk_without_room_for_all_layers_is_warned_of_once_and_not_begun_with(
    root, model, tensors, monkeypatch, log
):
    usage = namedtuple("usage", "total used free")(10**12, 10**12, start_cache.RESERVE_BYTES + 600_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert two_layers(StartCache(root, lambda: model), tensors) == [None, None]
    (warning,) = warnings(log)
    assert "has 1.1 GB free" in warning and "VLLM_MCMOE_CACHE" in warning
    assert files(root) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB: room for one of the two layers."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system of its own for this test: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_is_warned_of_once_and_keeps_what_is_complete(
    small_disk, model, tensors, monkeypatch, log
):
    usage = namedtuple("usage", "total used free")(10**12, 0, 10**12)  # others fill it after the cache has looked
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert [experts is None for experts in two_layers(StartCache(small_disk, lambda: model), tensors)] == [False, True]
    (warning,) = warnings(log)
    assert "No space left on device" in warning
    assert [file.suffix for file in files(small_disk)] == [".records"]
    assert found_again(small_disk, model)


def test_a_read_only_folder_is_warned_of_once(small_disk, model, tensors, log):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert two_layers(StartCache(small_disk, lambda: model), tensors) == [None, None]
    (warning,) = warnings(log)
    assert "Read-only file system" in warning


def test_entries_in_a_read_only_folder_are_used(small_disk, model, tensors, monkeypatch):
    monkeypatch.setattr(start_cache, "RESERVE_BYTES", 0)
    start(small_disk, model, tensors)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert start(small_disk, model, tensors)[1]


def test_a_folder_that_cannot_be_is_warned_of_once(root, model, tensors, log):
    root.write_text("a file")
    assert two_layers(StartCache(root, lambda: model), tensors) == [None, None]
    (warning,) = warnings(log)
    assert str(root) in warning


def test_a_checkpoint_that_is_downloaded_while_it_is_loaded_is_cached(root, model, tensors):
    there = []
    cache = StartCache(root, lambda: model if there else None)
    weights = layer_weights(WHOLE, allocate=False)
    assert cache.find(weights) is None
    weights.allocate()
    load(weights, tensors)
    there.append(True)
    assert cache.write(weights) is not None
    assert found_again(root, model)


def test_a_checkpoint_that_changes_while_it_is_loaded_is_not_cached(root, model, tensors, log):
    cache = StartCache(root, lambda: model)
    weights = layer_weights(WHOLE, allocate=False)
    cache.find(weights)
    weights.allocate()
    load(weights, tensors)
    touch(model / "model.safetensors")
    assert cache.write(weights) is None
    (warning,) = warnings(log)
    assert "has changed while it was being loaded" in warning
    assert files(root) == []


def test_a_layer_that_another_process_has_written_meanwhile_is_mapped(root, model, tensors):
    cache = StartCache(root, lambda: model)
    weights = layer_weights(WHOLE, allocate=False)
    assert cache.find(weights) is None
    start(root, model, tensors)
    (file,) = files(root)
    before = file.stat()
    assert cache.write(weights) is not None  # without memory, it could not have repacked
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, Path("/vllm/mcmoe")),
        ("", Path("/vllm/mcmoe")),
        ("/fast/disk", Path("/fast/disk")),
        ("~/cache", Path.home() / "cache"),
        ("off", None),
    ],
)
def test_the_environment_says_where_the_cache_is(monkeypatch, setting, expected):
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/vllm")
    if setting is None:
        monkeypatch.delenv("VLLM_MCMOE_CACHE")
    else:
        monkeypatch.setenv("VLLM_MCMOE_CACHE", setting)
    assert cache_root() == expected


def test_a_model_of_the_hub_is_its_snapshot(tmp_path):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789" * 4)
    assert checkpoint_directory("some/model", None, str(tmp_path)) == snapshot
    assert checkpoint_directory("some/model", "main", str(tmp_path)) == snapshot
    assert checkpoint_directory("some/other", None, str(tmp_path)) is None


def two_layers_of_a_model(loading: ExpertLoading, tensors) -> list[torch.nn.Module]:
    """What vLLM does with them. Where they are cached, tensors have no content that could be read."""
    layers = [layer_weights(WHOLE, allocate=False), layer_weights(Shard((0, 1), 0, 1), allocate=False)]
    layers[1].layer_name = "model.layers.1.mlp.experts"
    for weights in layers:
        loading.begin(weights)
    for weights in layers:
        wanted = weights.on_complete or weights.gate_up.allocated
        load(weights, tensors, device="cpu" if wanted else WITHOUT_CONTENT)
        weights.check_complete()
    return [loading.finish(weights) for weights in layers]


@pytest.fixture
def config(reference_model, tmp_path):
    """A real config, of a model whose files nobody else touches."""
    return engine_config(shutil.copytree(reference_model, tmp_path / "model"))


def test_each_start_says_in_one_line_what_it_did(config, root, tensors, monkeypatch, log):
    monkeypatch.setenv("VLLM_MCMOE_CACHE", str(root))
    two_layers_of_a_model(ExpertLoading(config, "cpu"), tensors)
    two_layers_of_a_model(ExpertLoading(config, "cpu"), tensors)
    written, mapped = [message for _, message in log]
    assert "Experts of 2 MoE layers, 0.00 GB, took" in written
    assert "2 repacked and written" in written
    assert "2 mapped" in mapped
    for message in (written, mapped):
        assert f"Cache: {root}; VLLM_MCMOE_CACHE=off switches it off." in message


def test_mapped_experts_get_the_biases_of_their_checkpoint(config, root, tensors, monkeypatch, log):
    """Biases are in no file of the cache: the second start reads them, though it reads no matrix."""
    monkeypatch.setenv("VLLM_MCMOE_CACHE", str(root))
    x, topk_weights, topk_ids = random_call(3, HIDDEN, 4, 2)

    def output(bias: float) -> torch.Tensor:
        loading = ExpertLoading(config, "cpu")
        weights = layer_weights(WHOLE, allocate=False, has_bias=True)
        loading.begin(weights)
        load(weights, tensors, device="cpu" if weights.on_complete else WITHOUT_CONTENT)
        parameters = dict(weights.parameters())
        for expert, shard_id in tensors:
            size, name = (HIDDEN, "w2_bias") if shard_id == "w2" else (INTERMEDIATE, "w13_bias")
            parameters[name].weight_loader(parameters[name], torch.full((size,), bias), "", shard_id, expert)
        weights.check_complete()
        return loading.finish(weights)(x, topk_weights, topk_ids)

    first, again, other = output(0.5), output(0.5), output(0.25)
    assert ["1 mapped" in message for _, message in log] == [False, True, True]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_layer_is_repacked_when_its_last_tensor_has_come_and_needs_no_memory_after_that(config, tensors):
    loading = ExpertLoading(config, "cpu")
    layers = [layer_weights(WHOLE, allocate=False), layer_weights(Shard((0, 1), 0, 1), allocate=False)]
    layers[1].layer_name = "model.layers.1.mlp.experts"
    for weights in layers:
        loading.begin(weights)
    sizes = []
    for weights in layers:
        load(weights, tensors, skip="0.w1.qweight")
        sizes.append([sum(p.numel() for _, p in layer.parameters()) > 0 for layer in layers])
        last = dict(weights.parameters())["w13_qweight"]
        last.weight_loader(last, tensors[0, "w1"].qweight, weight_name="", shard_id="w1", expert_id=0)
    assert sizes == [[True, False], [False, True]]
    for weights in layers:
        assert loading.finish(weights).down.numel() > 0


def test_off_means_no_cache(config, root, tensors, monkeypatch, log):
    monkeypatch.setenv("VLLM_MCMOE_CACHE", "off")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(root))
    two_layers_of_a_model(ExpertLoading(config, "cpu"), tensors)
    ((_, message),) = log
    assert "2 repacked and not cached (VLLM_MCMOE_CACHE is off)." in message
    assert not root.exists()


def test_a_start_that_cannot_write_serves_from_memory(config, root, tensors, monkeypatch, log):
    root.write_text("a file")
    monkeypatch.setenv("VLLM_MCMOE_CACHE", str(root))
    experts = two_layers_of_a_model(ExpertLoading(config, "cpu"), tensors)
    monkeypatch.setenv("VLLM_MCMOE_CACHE", "off")
    expected = two_layers_of_a_model(ExpertLoading(config, "cpu"), tensors)
    assert len(warnings(log)) == 1
    for one, other in zip(experts, expected, strict=True):
        assert torch.equal(one.gate_up, other.gate_up) and torch.equal(one.down, other.down)


@pytest.mark.parametrize(
    ("backend", "load_format", "reason"),
    [("cpu", "dummy", "--load-format dummy"), ("reference", "auto", "the reference backend has no start cache")],
)
def test_dummy_weights_and_other_backends_are_not_cached(
    config, root, tensors, monkeypatch, log, backend, load_format, reason
):
    monkeypatch.setenv("VLLM_MCMOE_CACHE", str(root))
    config.load_config.load_format = load_format
    for _ in range(2):
        two_layers_of_a_model(ExpertLoading(config, backend), tensors)
    assert [f"2 repacked and not cached ({reason})." in message for _, message in log] == [True, True]
    assert not root.exists()


def test_every_model_a_process_loads_is_looked_at_anew(config, reference_model):
    """Even where the one before was never finished: its layers must not be taken for those of the next."""
    unfinished = expert_loading(config, "cpu")
    unfinished.begin(layer_weights(WHOLE, allocate=False))  # and a failure ends the start
    assert expert_loading(config, "cpu") is unfinished
    assert expert_loading(engine_config(reference_model), "cpu") is not unfinished
