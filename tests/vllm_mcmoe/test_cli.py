"""The command line as a user types it, in its own process, on the embedded reference model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.calibration.test_allocation import random_factors
from tests.hub_server import running_hub
from vllm_mcmoe.cli import spread_file_options

SMALL = ("--sequences", "5", "--length", "128")


def mcmoe(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("mcmoe")), *map(str, arguments)]
    # one thread: another test may run beside this one
    environment = {"COLUMNS": "200", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_several_files_may_follow_one_data_option():
    arguments = ["evaluate", "model", "--data", "a.txt", "b.txt", "--length", "64"]
    assert spread_file_options(arguments) == [
        "evaluate", "model", "--data", "a.txt", "--data", "b.txt", "--length", "64",
    ]  # fmt: skip


def test_the_steps_one_by_one_make_a_checkpoint(reference_model, calibration_files, evaluation_files, tmp_path):
    factors, plan, out = tmp_path / "factors.json", tmp_path / "plan.json", tmp_path / "out"
    calibration = ("--data", *calibration_files, *SMALL)
    steps = [
        mcmoe(
            "calibrate", reference_model, *calibration, "--out", factors, "--widths", "2,3", "--recipe", "paper-code"
        ),
        mcmoe("allocate", factors, "--bits-per-layer", 18, "--out", plan, "--recipe", "paper-code", "--widths", "2,3"),
        mcmoe("quantize", reference_model, out, "--plan", plan, "--recipe", "uniform", *calibration, "--no-evaluate",
              "--prune", 0.25, "--prune-method", "odp"),
        mcmoe("prune", out, *calibration, "--target", 0.1, "--method", "otp", "--evaluation-data", *evaluation_files),
    ]  # fmt: skip
    for step in steps:
        assert step.returncode == 0, step.stderr
    widths = json.loads(plan.read_text())["layers"]["model.layers.0.block_sparse_moe.experts"]["gate_up"]
    assert sum(widths) <= 18

    assert "KL to unpruned" in steps[-1].stdout
    kept = json.loads((out / "pruning_report.json").read_text())["points"]
    assert [point["target"] for point in kept] == [0, 0.1]
    drawn = mcmoe("report", out)
    assert drawn.returncode == 0, drawn.stderr
    assert f"{kept[1]['pruned']:.1%} dropped" in (out / "report.html").read_text()
    assert "factors.json is not there" in drawn.stderr

    inspected = mcmoe("inspect", out, "--json")
    summary = json.loads(inspected.stdout)
    assert summary["warnings"] == []
    assert summary["total_bytes"] == sum(summary["bytes_by_kind"].values())

    evaluated = mcmoe("evaluate", out, "--against", reference_model, "--data", *evaluation_files, *SMALL, "--json")
    scores = json.loads(evaluated.stdout)
    assert set(scores["perplexity_by_file"]) == {file.name for file in evaluation_files}
    assert 0 < scores["mean_kl"] < 1
    assert scores["average_bits"]["experts"] == pytest.approx(summary["expert_bits"], abs=1e-3)
    assert summary["quantization_config"]["pruning"]["method"] == "otp"
    assert scores["pruned"] == pytest.approx(0.1, abs=0.05)
    unpruned = mcmoe("evaluate", out, "--data", *evaluation_files, *SMALL, "--json", "--pruning", "off")
    assert json.loads(unpruned.stdout)["pruned"] == 0


def test_no_data_is_asked_for_where_the_builtin_text_will_do(reference_model, tmp_path):
    calibrated = mcmoe("calibrate", reference_model, "--out", tmp_path / "factors.json", "--recipe", "paper-code",
                       "--widths", "2,3", "--sequences", 9, "--length", 32)  # fmt: skip
    assert calibrated.returncode == 0, calibrated.stderr
    assert "Text: built-in (chat, documentation, european" in calibrated.stderr
    assert json.loads((tmp_path / "factors.json").read_text())["tokens"] == 9 * 32


def test_published_allocations_come_out_of_the_command(published_factors, published_allocations, tmp_path):
    published_factors.save(tmp_path / "factors.json")
    result = mcmoe(
        "allocate", tmp_path / "factors.json", "--recipe", "paper-code", "--bits-per-layer", 14,
        "--out", tmp_path / "plan.json", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    layers = json.loads(result.stdout)["layers"]
    assert [layer["gate_up"] for layer in layers.values()] == published_allocations["14"]
    assert [layer["down"] for layer in layers.values()] == published_allocations["14"]


def test_a_sweep_prints_and_draws_what_budgets_would_bring_and_writes_no_plan(tmp_path):
    random_factors(2, 4, widths=(1, 2, 3, 4)).save(tmp_path / "factors.json")
    result = mcmoe(
        "allocate", tmp_path / "factors.json", "--sweep", "1.5:2.5:0.5", "--plot", tmp_path / "sweep.svg",
        "--out", tmp_path / "plan.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    bars = [next(line for line in lines if f" {bits} bits" in line).count("\u2588") for bits in ("1.5", "2", "2.5")]
    assert bars[0] > bars[1] > bars[2] > 0
    assert "2.5 bits" not in result.stderr  # nothing was left out
    assert (tmp_path / "sweep.svg").read_text().startswith("<svg")
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["quantize", "missing", "out", "--bits", "2.5", "--data", "x.txt"], 1, "missing: no config.json there"),
        (["inspect", "missing"], 1, "missing: no config.json there"),
        (["allocate", "missing.json", "--bits", "2.5"], 1, "missing.json"),
        (["allocate", "missing.json"], 2, "give one of --bits, --bits-per-layer, --size and --sweep"),
        (["allocate", "missing.json", "--sweep", "3:2"], 2, "ends above its beginning"),
        (["allocate", "missing.json", "--bits", "2", "--plot", "x.svg"], 2, "--plot draws a --sweep"),
        (["report", "missing"], 1, "is not a model directory"),
        (["allocate", "missing.json", "--bits", "2", "--widths", "2,7"], 2, "7 is not one of"),
        (["quantize", "a", "b", "--data", "x", "--size", "13.5"], 2, "is not a size like 13.5GB"),
        (["allocate", "missing.json", "--bits", "2", "--linear-bits", "4"], 2, "--linear-bits goes with --size here"),
        (["plan-resources", "missing", "--bits", "2", "--size", "1GB"], 2, "give one of --bits and --size"),
        (["prune", "missing", "--data", "x.txt"], 1, "missing: no config.json there"),
        (["prune", "missing"], 1, "missing: no config.json there"),
        (["evaluate", "missing"], 2, "Missing option '--data'"),
        (["evaluate", "missing", "--data", "x.txt", "--top-logprobs", "20"], 2, "are for a server's address"),
        (["evaluate", "http://127.0.0.1:9/v1", "--data", "x.txt"], 1, "http://127.0.0.1:9/v1: no answer from a server"),
        (["quantize", "a", "b", "--data", "x"], 2, "give one of --bits, --bits-per-layer, --size and --plan"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_errors_are_explained_and_have_an_exit_code(arguments, exit_code, message):
    result = mcmoe(*arguments)
    assert result.returncode == exit_code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_inspect_says_from_the_config_alone_that_a_model_is_supported(reference_model, tmp_path):
    shutil.copy2(reference_model / "config.json", tmp_path)
    result = mcmoe("inspect", tmp_path, "--bits", 2.5, "--json")
    summary = json.loads(result.stdout)
    assert result.returncode == 0
    assert (summary["architecture"], summary["experts"], summary["top_k"]) == ("MixtralForCausalLM", 8, 2)
    assert summary["checkpoint_bytes"] < summary["model_bytes"] / 3


def test_inspect_takes_a_name_from_the_hub_that_the_environment_names(qwen3_model, tmp_path):
    with running_hub() as hub:
        repository = hub.add("org/tiny", qwen3_model)
        commit = repository.commit(repository.files(), "v1")
        repository.commit({})
        arguments = ("inspect", "org/tiny", "--revision", "v1", "--json")
        result = mcmoe(*arguments, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["architecture"], summary["headers"]) == ("Qwen3MoeForCausalLM", 1)
    kept = f"files are kept in {tmp_path}/hub/models--org--tiny/snapshots/{commit}"
    assert f"org/tiny: commit {commit}; {kept}" in " ".join(result.stderr.split())


def test_inspect_fails_with_the_reason_where_a_model_is_not_supported(tmp_path):
    config = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = mcmoe("inspect", tmp_path)
    assert result.returncode == 1
    assert "Llama4ForConditionalGeneration is not supported; its experts are called with inputs" in result.stderr
