"""How many kernels the launcher compiles and launches for layers of real shapes; no GPU is needed for that."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

MOST_KERNELS = 12
FEWEST_LAUNCHES = ["prepare_kernel", "grouped_gemm_kernel", "grouped_gemm_kernel"]
FEW_TOKENS, TOKENS_PER_CHUNK = 4, 4096


@pytest.fixture(scope="module")
def counted() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton_kernel_counts"]
    root = Path(__file__).parents[2]
    return json.loads(
        subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout
    )


@pytest.mark.parametrize("model", ["mixtral", "qwen3"])
def test_a_model_needs_few_kernels_and_all_are_compiled_while_loading(counted, model):
    """Mixtral's layers have four sets of widths in gate_up and three in down; tokens go from 1 to 16,384."""
    assert Counter(counted[model]["at load"])["grouped_gemm_kernel"] >= 5
    assert len(counted[model]["at load"]) <= MOST_KERNELS
    assert counted[model]["later"] == []


@pytest.mark.parametrize("model", ["mixtral", "qwen3"])
def test_a_layer_is_three_launches_for_few_tokens_and_four_for_more(counted, model):
    for tokens, launched in counted[model]["launches"].items():
        if int(tokens) <= FEW_TOKENS:
            assert launched == FEWEST_LAUNCHES
        else:
            chunks = -(-int(tokens) // TOKENS_PER_CHUNK)
            assert launched == [*FEWEST_LAUNCHES, "combine_kernel"] * chunks
