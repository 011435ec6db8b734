"""Where the work of quantising goes: counted, seen in a run, and as time.

    python benchmarks/quantising_work.py                     # a layer an eighth of Mixtral's sizes, two minutes
    python benchmarks/quantising_work.py --counts-only       # Mixtral-8x7B and Qwen3-30B-A3B by their configs, seconds

Counted is what `mcmoe plan-resources` counts. Seen are the products that torch really did (torch.utils.flop_counter),
which leaves out Cholesky factors, triangular solves and the compiled loops; attention's products between tokens, which
the count leaves out, are among them. Time is of one thread, in seconds of CPU.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from streaming_memory import REFERENCE, write_random_mixtral
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from vllm_mcmoe.calibration import pipeline
from vllm_mcmoe.calibration.evaluate.resources import plan_resources
from vllm_mcmoe.calibration.evaluate.work import Work, multiply_adds
from vllm_mcmoe.calibration.matrix import gptq
from vllm_mcmoe.calibration.measure import expert_errors, expert_tokens, statistics
from vllm_mcmoe.calibration.model.experts import Expert
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer
from vllm_mcmoe.calibration.quantize import layer as quantize_layer

CONFIGS: dict[str, PretrainedConfig] = {
    "Mixtral-8x7B": MixtralConfig(architectures=["MixtralForCausalLM"]),  # transformers' defaults are its sizes
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, intermediate_size=6144, num_experts=128,
        num_experts_per_tok=8, vocab_size=151936,
    ),
}  # fmt: skip


class Steps:
    """FLOP and CPU seconds of each step, without those of the steps inside it."""

    def __init__(self, counter: FlopCounterMode):
        self.counter = counter
        self.flop: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self._within = ["other"]
        self._since = (0, time.process_time())

    def _settle(self) -> None:
        now = self.counter.get_total_flops(), time.process_time()
        self.flop[self._within[-1]] += now[0] - self._since[0]
        self.seconds[self._within[-1]] += now[1] - self._since[1]
        self._since = now

    def of(self, function: Callable, name: Callable[[str, tuple, dict], str]) -> Callable:
        """function, whose calls belong to the step that name(step around it, arguments) gives."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._settle()
            self._within.append(name(self._within[-1], args, kwargs))
            try:
                return function(*args, **kwargs)
            finally:
                self._settle()
                self._within.pop()

        return timed


def _unless_measuring(step: str) -> Callable[[str, tuple, dict], str]:
    """What measuring quantises is part of measuring."""
    return lambda around, args, kwargs: around if around == "measuring" else step


def _watched(steps: Steps) -> ExitStack:
    """Every step's functions, replaced by ones that are counted."""

    def refinement(around: str, args: tuple, kwargs: dict) -> str:
        return _unless_measuring("output_sweeps" if len(args) > 2 and args[2] is not None else "sweeps")(around, (), {})

    def always(step: str) -> Callable[[str, tuple, dict], str]:
        return lambda around, args, kwargs: step

    def forward(around: str, args: tuple, kwargs: dict) -> str:
        if around == "tuning":
            return around
        return "backward" if torch.is_grad_enabled() else "forward"

    def backward(around: str, args: tuple, kwargs: dict) -> str:
        return around if around == "tuning" else "backward"

    def expert(around: str, args: tuple, kwargs: dict) -> str:
        return "intermediates" if around == "hessians" else around

    stack = ExitStack()
    for owner, name, step in (
        (DecoderLayer, "__call__", forward),
        (torch.Tensor, "backward", backward),
        (pipeline, "tune", always("tuning")),
        (statistics, "measure_expert", always("measuring")),
        (expert_errors, "_down_output_max", always("intermediates")),
        (Expert, "intermediate", expert),
        (Expert, "output", expert),
        (expert_tokens, "second_moment", always("hessians")),
        (gptq, "_inverse_factor", always("factors")),
        (gptq, "refine", refinement),
        (quantize_layer, "quantize_gptq", always("gptq")),
        (quantize_layer, "output_hessians", always("output_hessians")),
    ):
        stack.enter_context(mock.patch.object(owner, name, steps.of(getattr(owner, name), step)))
    return stack


def _show_run(work: Work, steps: Steps) -> None:
    total = sum(steps.seconds.values())
    print("| step | counted, GFLOP | products seen, GFLOP | CPU seconds | share |")
    print("|---|---:|---:|---:|---:|")
    for step, amounts in [*asdict(work).items(), ("other", {})]:
        products = multiply_adds(amounts)
        seen, seconds = steps.flop[step] / 1e9, steps.seconds[step]
        print(f"| {step} | {2 * products / 1e9:.1f} | {seen:.1f} | {seconds:.1f} | {seconds / total:.0%} |")
    print(f"| all | {2 * work.total / 1e9:.1f} | {sum(steps.flop.values()) / 1e9:.1f} | {total:.1f} | |", flush=True)


def _show_counts(effort: str) -> None:
    works = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as directory:
            config.save_pretrained(directory)
            work = plan_resources(directory, effort=effort).quantization.work
        works[name] = {step: 2 * multiply_adds(amounts) / 1e15 for step, amounts in asdict(work).items()}
    print(f"| PFLOP, --effort {effort} |", " | ".join(works), "|")
    print("|---|", " | ".join("---:" for _ in works), "|")
    for step in next(iter(works.values())):
        print(f"| {step} |", " | ".join(f"{work[step]:.2f}" for work in works.values()), "|")
    print("| all |", " | ".join(f"{sum(work.values()):.1f}" for work in works.values()), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts-only", action="store_true", help="of the released models; run nothing")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1792)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--effort", choices=("fast", "normal", "best"), default="normal")
    options = parser.parse_args()
    _show_counts(options.effort)
    if options.counts_only:
        return
    torch.set_num_threads(1)
    data = sorted((REFERENCE / "corpus").glob("*.calibration.txt"))
    calibration = {key: getattr(options, key) for key in ("sequences", "length", "effort")}
    with tempfile.TemporaryDirectory() as directory:
        shape = (1, options.hidden, options.intermediate, options.experts)
        model = write_random_mixtral(Path(directory) / "model", *shape)
        work = plan_resources(model, linear_bits=16, **calibration).quantization.work
        with FlopCounterMode(display=False) as counter:
            steps = Steps(counter)
            with _watched(steps):
                pipeline.quantize(
                    model, Path(directory) / "out", data, bits=2.25, linear_bits=16, show_progress=False, **calibration
                )
    print()
    _show_run(work, steps)


if __name__ == "__main__":
    main()
