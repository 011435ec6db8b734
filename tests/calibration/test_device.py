"""Calibration on a device: the real pipeline on a pretended one, whose numbers are the CPU's and which refuses operands
in host memory (pretend_device.py). What a GPU rounds differently is for tests/gpu.

Registering a device changes torch for a whole process (torch.accelerator finds one), so every run has its own.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from tests.calibration import child_process
from tests.calibration.conftest import QUICK, interrupted_at_the_last_layer
from tests.tiny_models import make_tiny
from vllm_mcmoe.calibration.allocate.plan import Plan
from vllm_mcmoe.calibration.common.device import choose_device
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.matrix import row_loops
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.weights import WeightFiles
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.prune import otp
from vllm_mcmoe.calibration.prune.prune import prune
from vllm_mcmoe.calibration.quantize import checkpoint_run
from vllm_mcmoe.calibration.recipes import RECIPES
from vllm_mcmoe.cli import app
from vllm_mcmoe.errors import DeviceError, WorkDirectoryError

# Everything the default recipe does, in less of it: some experts have the 128 tokens of a Hessian of their own.
RECIPE = dataclasses.replace(
    RECIPES["mcmoe"],
    name="short",
    gptq=dataclasses.replace(RECIPES["mcmoe"].gptq, refinement_sweeps=1, output_sweeps=1),
    widths=(1, 2),
)
TEXT = {"sequences": 4, "length": 80, "show_progress": False}


def run(device_name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """function(..., device=...), in a process of its own, on "cpu" or the "pretend" device."""
    result = child_process.result_of(_run, device_name, function, arguments, options)
    if isinstance(result, BaseException):
        raise result
    return result


def _run(device_name: str, function: Callable[..., Any], arguments: tuple, options: dict) -> Any:
    device = torch.device("cpu")
    if device_name == "pretend":
        from tests.calibration.pretend_device import PRETEND as device
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention of CPUs is no other device's
        return function(*arguments, device=device, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory, reference_model) -> Path:
    return make_tiny("mixtral", tmp_path_factory.mktemp("mixtral") / "model", reference_model)


@pytest.fixture(scope="module")
def text(calibration_files) -> list[Path]:
    return calibration_files[:1]


@pytest.fixture(scope="module")
def cpu_checkpoint(model, text, tmp_path_factory) -> Path:
    """Measured, allocated, quantised and scored on the CPU."""
    out = tmp_path_factory.mktemp("cpu") / "checkpoint"
    run("cpu", quantize_scored, model, out, text)
    return out


def quantize_scored(model: Path, out: Path, text: list[Path], **options: Any) -> None:
    quantize(model, out, text, bits=2.0, recipe=RECIPE, evaluation_data=text, **TEXT, **options)


def quantize_by_plan(model: Path, out: Path, text: list[Path], **options: Any) -> None:
    """Without measuring: no gradients."""
    layer = {"gate_up": [1, 2, 3, 8], "down": [2, 1, 4, 2]}
    plan = Plan(layers=dict.fromkeys(describe_model(model).moe_layers.values(), layer))
    quantize(model, out, text, plan=plan, recipe=QUICK, **TEXT, **options)


def test_a_checkpoint_made_on_a_device_has_the_bytes_of_the_cpus(model, text, cpu_checkpoint, tmp_path):
    run("pretend", quantize_scored, model, tmp_path / "out", text, activations="disk")
    assert contents(tmp_path / "out") == contents(cpu_checkpoint)


def quantize_interrupted(model: Path, out: Path, text: list[Path], *, device: torch.device) -> None:
    """By plan, interrupted and continued."""
    with interrupted_at_the_last_layer():
        quantize_by_plan(model, out, text, device=device)
    quantize_by_plan(model, out, text, device=device)


def test_work_begun_on_a_device_is_continued_there(model, text, tmp_path):
    run("pretend", quantize_interrupted, model, tmp_path / "pretend", text)
    run("cpu", quantize_by_plan, model, tmp_path / "cpu", text)
    assert contents(tmp_path / "pretend") == contents(tmp_path / "cpu")


@pytest.fixture
def prunable(cpu_checkpoint, tmp_path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        (tmp_path / name).mkdir()
        for file, content in contents(cpu_checkpoint).items():
            (tmp_path / name / file).write_bytes(content)
        return tmp_path / name

    return copy


def prune_briefly(checkpoint: Path, text: list[Path], **options: Any) -> list[Any]:
    otp.STEPS = 5
    return prune(checkpoint, text, evaluation_data=text, **TEXT, **options)


def test_a_pruning_rule_made_on_a_device_has_the_bytes_and_scores_of_the_cpus(text, prunable):
    on_cpu, on_device = prunable("cpu"), prunable("pretend")
    assert run("pretend", prune_briefly, on_device, text) == run("cpu", prune_briefly, on_cpu, text)
    assert contents(on_device) == contents(on_cpu)


def test_an_evaluation_on_a_device_gives_the_cpus_figures(model, text, cpu_checkpoint):
    options = {"against": model, "activations": "float", **TEXT}
    assert run("pretend", evaluate, cpu_checkpoint, text, **options) == run(
        "cpu", evaluate, cpu_checkpoint, text, **options
    )


PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "addr_", "linalg_cholesky_ex", "linalg_solve_triangular"}


class ProductsSeen(TorchDispatchMode):
    """by_device: device type -> names of the matrix operations that ran there."""

    def __init__(self) -> None:
        super().__init__()
        self.by_device: dict[str, set[str]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name in PRODUCTS:
            devices = {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
            self.by_device.setdefault("+".join(sorted(devices)), set()).add(name)
        return operation(*args, **(kwargs or {}))


def products_of_quantising(model: Path, out: Path, text: list[Path], *, device: torch.device) -> dict[str, set[str]]:
    with ProductsSeen() as seen:
        quantize_by_plan(model, out, text, device=device)
    return seen.by_device


def test_matrix_products_run_on_the_device(model, text, tmp_path):
    seen = run("pretend", products_of_quantising, model, tmp_path / "out", text)
    assert set(seen) == {"pretend"}
    assert {"mm", "addmm_", "linalg_cholesky_ex", "linalg_solve_triangular"} <= seen["pretend"]


def test_work_begun_on_another_kind_of_device_is_refused(model, text, tmp_path):
    with pytest.raises(WorkDirectoryError, match="device other than the CPU was None, is pretend"):
        run("pretend", begin_on_the_cpu_and_go_on, model, tmp_path / "out", text)


def begin_on_the_cpu_and_go_on(model: Path, out: Path, text: list[Path], *, device: torch.device) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    checkpoint_run.quantize_layer = stop
    with pytest.raises(KeyboardInterrupt):
        quantize_by_plan(model, out, text, device="cpu")
    quantize_by_plan(model, out, text, device=device)


def test_row_loops_write_back_what_is_wanted():
    written, back, consumed, untouched = child_process.result_of(_rows_after_a_loop)
    assert written == back == [[1.0] * 3] * 2
    assert consumed == untouched


def _rows_after_a_loop() -> tuple[list, ...]:
    from tests.calibration.pretend_device import PRETEND

    def kernel(wanted: np.ndarray, consumed: np.ndarray) -> None:
        wanted += 1
        consumed += 1

    host, (wanted, consumed) = torch.zeros(2, 3), torch.zeros(2, 2, 3).to(PRETEND).unbind()
    row_loops.over_rows(kernel, (host, host.clone()), written=(host,))
    row_loops.over_rows(kernel, (wanted, consumed), written=(wanted,))
    return host.tolist(), wanted.tolist(), consumed.tolist(), torch.zeros(2, 3).tolist()


def gpus(monkeypatch, count: int) -> None:
    """As if torch found so many GPUs; none of them can be used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


def test_auto_is_the_cpu_without_a_gpu_and_says_so(monkeypatch):
    gpus(monkeypatch, 0)
    messages: list[str] = []
    assert choose_device("auto", messages.append) == torch.device("cpu")
    assert messages == ["Computing on cpu (torch finds no GPU)."]


def test_auto_is_the_current_gpu_where_there_is_one(monkeypatch):
    gpus(monkeypatch, 2)
    messages: list[str] = []
    chosen = choose_device("auto", messages.append)
    assert chosen == torch.device("cuda:0")
    assert choose_device(chosen, messages.append) == chosen  # as the parts of a run are told, without another word
    assert messages == ["Computing on cuda:0 (GPU 0)."]


@pytest.mark.parametrize(("request_", "expected"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_device_is_chosen_by_name(request_, expected, monkeypatch):
    gpus(monkeypatch, 2)
    assert choose_device(request_) == torch.device(expected)


def test_a_gpu_never_computes_in_tf32(monkeypatch):
    gpus(monkeypatch, 1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        choose_device("cuda")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["nonsense", "", "meta", "cuda:", "cuda:x", "cpu:1"])
def test_another_name_is_refused(name):
    with pytest.raises(DeviceError, match="is not one of auto, cpu, cuda and cuda:N"):
        choose_device(name)


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [(0, "cuda", "finds no GPU"), (0, "cuda:1", "finds no GPU"), (2, "cuda:2", "finds 2 of them, counted from cuda:0")],
)
def test_a_gpu_that_is_not_there_is_refused(count, name, message, monkeypatch):
    gpus(monkeypatch, count)
    for request in (name, torch.device(name)):
        with pytest.raises(DeviceError, match=message):
            choose_device(request)


def test_a_gpu_smaller_than_a_layer_is_refused_before_any_work(model, monkeypatch):
    gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1_000_000_000))
    monkeypatch.setattr(LayerwiseModel, "layer_bytes", lambda self: 1_200_000_000)
    with pytest.raises(DeviceError, match=r"a decoder layer takes 1\.2 GB in float32, cuda:0 has 1\.0 GB"):
        LayerwiseModel(WeightFiles(describe_model(model)), choose_device("cuda"))


@pytest.mark.parametrize(
    "command",
    [
        "quantize MODEL OUT --bits 2.0 --data TEXT",
        "calibrate MODEL --out OUT --data TEXT",
        "evaluate MODEL --data TEXT",
        "prune MODEL --data TEXT",
    ],
)
def test_every_command_refuses_a_missing_gpu_before_any_work(command, model, text, tmp_path, monkeypatch):
    gpus(monkeypatch, 0)
    paths = {"MODEL": str(model), "OUT": str(tmp_path / "out"), "TEXT": str(text[0])}
    arguments = [paths.get(word, word) for word in command.split()]
    result = CliRunner().invoke(app, [*arguments, "--device", "cuda"])
    assert isinstance(result.exception, DeviceError)
    assert list(tmp_path.iterdir()) == []
