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


def printed_by(module: str, **variables: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", module]
    root = Path(__file__).parents[2]
    return json.loads(
        subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout
    )


@pytest.fixture(scope="module")
def counted() -> dict:
    return printed_by("tests.kernels.triton_kernel_counts")


def test_kernels_are_compiled_several_at_a_time_and_all_are_finished(tmp_path):
    found = printed_by("tests.kernels.triton_compile_layer", TRITON_CACHE_DIR=str(tmp_path))
    assert found == {
        "prepare_kernel": ["CompiledKernel"],
        "grouped_gemm_kernel": ["CompiledKernel"] * 5,
        "combine_kernel": ["CompiledKernel"],
    }


@pytest.mark.parametrize("model", ["mixtral", "qwen3"])
def test_a_model_needs_few_kernels_and_all_are_compiled_while_loading(counted, model):
    """Mixtral's layers have four sets of widths in gate_up and three in down; tokens go from 1 to 16,384."""
    assert Counter(counted[model]["at load"])["grouped_gemm_kernel"] >= 5
    assert len(counted[model]["at load"]) <= MOST_KERNELS
    assert counted[model]["later"] == []


def test_layers_with_and_without_trellis_codes_have_kernels_of_their_own_all_compiled_while_loading(counted):
    """Two layers have some in one projection or the other: these share theirs."""
    assert counted["both kinds"]["later"] == []
    alone, both = (Counter(counted[model]["at load"]) for model in ("qwen3", "both kinds"))
    assert both["grouped_gemm_kernel"] == 2 * alone["grouped_gemm_kernel"]
    assert both["prepare_kernel"] == 2 * alone["prepare_kernel"]
    assert both["combine_kernel"] == alone["combine_kernel"]


@pytest.mark.parametrize("model", ["mixtral", "qwen3", "both kinds"])
def test_a_layer_is_three_launches_for_few_tokens_and_four_for_more(counted, model):
    for tokens, launched in counted[model]["launches"].items():
        if int(tokens) <= FEW_TOKENS:
            assert launched == FEWEST_LAUNCHES
        else:
            chunks = -(-int(tokens) // TOKENS_PER_CHUNK)
            assert launched == [*FEWEST_LAUNCHES, "combine_kernel"] * chunks
