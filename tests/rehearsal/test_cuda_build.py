"""What a GPU user's environment does, as far as it can be done without a GPU: `make rehearse-gpu`.

vLLM's CUDA build, its torch and its Triton, on CPU tensors. The tests of the kernels run there too, under that Triton.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs vLLM's CUDA build; `make rehearse-gpu` installs one for itself"
)


def result_of(module: str, *arguments: str, **environment: str) -> dict:
    """The JSON that a process prints last."""
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.strip().splitlines()[-1].removeprefix("result "))


@pytest.fixture(scope="module")
def layer() -> dict:
    return result_of("tests.rehearsal.layer_in_cuda_build", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def test_the_cuda_platform_gets_the_triton_kernels(layer):
    assert layer["is_cuda"]
    assert layer["backend"] == "triton"
    assert layer["method"] == "McmoeMoEMethod"
    assert not layer["is_monolithic"]


def test_vllms_loader_fills_the_layer_and_nothing_of_the_checkpoint_is_left(layer):
    assert layer["loaded"] == [f"{part}_{kind}" for part in ("w13", "w2") for kind in ("qweight", "scales", "zeros")]
    assert layer["parameters left"] == []


def test_the_layer_computes_what_the_experts_are_defined_to(layer):
    assert layer["error"] < 1e-5


def test_rows_of_a_captured_graph_that_are_padding_give_zeros(layer):
    assert layer["padding"] == 0


def test_no_kernel_is_compiled_after_loading():
    counted = result_of("tests.kernels.triton_kernel_counts")
    for model in counted.values():
        assert model["later"] == []
        assert len(model["at load"]) <= 12
