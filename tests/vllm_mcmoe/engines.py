"""Small vLLM engines and what they answer.

Nothing here imports numba, not even through calibration: a process that is to run an engine itself must not have it
loaded before, because vLLM then looks through every loaded module and stumbles over an object of llvmlite.

    python -m tests.vllm_mcmoe.engines JOBS.json     # serves many models one after another, for score_in_one_process
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.vllm_mcmoe import torchvision_import, wna16_operator

NEW_TOKENS = 12

# Tokens of a prompt and its answer, and float32 [tokens - 1] the logprob of each after the first.
Scored = tuple[list[int], torch.Tensor]


def start_engine(model: Path, **options: Any):
    """An engine for a small machine: eager and little KV cache unless told otherwise."""
    from vllm import LLM

    defaults = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "gpu_memory_utilization": 0.05,
    }
    return LLM(str(model), **(defaults | options))


def stop_engine(engine) -> None:
    engine.llm_engine.engine_core.shutdown()


def engine_logprobs(engine, prompts: Sequence[Sequence[int]]) -> list[Scored]:
    """Covers prefill (the prompts' own tokens) and decode (NEW_TOKENS greedy ones)."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=1, prompt_logprobs=1, ignore_eos=True)
    results = []
    for output in engine.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], sampling, use_tqdm=False):
        completion = output.outputs[0]
        tokens = list(output.prompt_token_ids) + list(completion.token_ids)
        entries = list(output.prompt_logprobs[1:]) + list(completion.logprobs)
        logprobs = [entry[token].logprob for token, entry in zip(tokens[1:], entries, strict=True)]
        results.append((tokens, torch.tensor(logprobs)))
    return results


@dataclass(frozen=True)
class Job:
    """One model to serve, with options of the engine and variables that hold while it is loaded and served.

    without_gate   lift vLLM's check that refuses experts without a gate on CPUs, whichever kernels compute them
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    without_gate: bool = False


def score_in_one_process(jobs: dict[str, Job], prompts: list[list[int]], work: Path) -> dict[str, list[Scored]]:
    """engine_logprobs of every job, from one child process: the second engine in it takes 3 s instead of 40."""
    jobs_file, results_file = work / "jobs.json", work / "results.pt"
    document = {name: asdict(job) for name, job in jobs.items()}
    jobs_file.write_text(json.dumps({"jobs": document, "prompts": prompts, "results": str(results_file)}))
    child = subprocess.run(
        [sys.executable, "-m", "tests.vllm_mcmoe.engines", str(jobs_file)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"serving {', '.join(jobs)} failed:\n{child.stdout[-2000:]}\n{child.stderr[-6000:]}")
    return torch.load(results_file)


def _serve_all(jobs_file: Path) -> None:
    document = json.loads(jobs_file.read_text())
    jobs = {name: Job(**job) for name, job in document["jobs"].items()}
    torchvision_import.provide_where_missing()
    _load_model_classes(jobs.values())
    wna16_operator.provide_where_missing()
    results = {}
    for name, job in jobs.items():
        with patch.dict(os.environ, job.environment), _gate_check_lifted(job.without_gate):
            engine = start_engine(job.model, **job.options)
            results[name] = engine_logprobs(engine, document["prompts"])
            stop_engine(engine)
    torch.save(results, document["results"])


@contextmanager
def _gate_check_lifted(lifted: bool) -> Iterator[None]:
    from vllm.model_executor.layers.fused_moe import config

    class Pretended:
        """The platform, but for the one question whose answer the check hangs on."""

        def is_xpu(self) -> bool:
            return True

        def __getattr__(self, name: str) -> Any:
            return getattr(current_platform, name)

    current_platform = config.current_platform
    with patch.object(config, "current_platform", Pretended()) if lifted else nullcontext():
        yield


def _load_model_classes(jobs) -> None:
    """Else vLLM starts a process of its own per architecture, 15 s each, to look at the class without importing it."""
    from vllm.model_executor.models.registry import _VLLM_MODELS, ModelRegistry

    for job in jobs:
        (architecture,) = json.loads(Path(job.model, "config.json").read_text())["architectures"]
        module, name = _VLLM_MODELS[architecture]
        path = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
        model_class = getattr(importlib.import_module(path), name)
        ModelRegistry.register_model(architecture, model_class)


if __name__ == "__main__":
    _serve_all(Path(sys.argv[1]))
