"""Tokens per second of stock vLLM with and without the plugin, on a few layers of a real model's shape.

    python benchmarks/serving.py [--shape mixtral-8x7b] [--layers 2] [--bits 2.5] [--pruned 0.3] [--json FILE]

The engines, bf16, quantised, and quantised with pruning, run at once and take turns, so that a noisy machine disturbs
all alike; medians are printed. Weights are random (synthetic_checkpoint.py), routing spreads over all experts.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from vllm import LLM, SamplingParams, TokensPrompt

PROMPT_TOKENS, NEW_TOKENS = 32, 24
CONCURRENCY = (1, 8)
MONITOR_SECONDS = 10  # between two reports of vllm_mcmoe/pruning_monitor.py


def pruned_fraction(metrics: str) -> float:
    """What the engine reports, warm-up included, once its monitor has looked."""
    time.sleep(MONITOR_SECONDS + 1)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=metrics)
    names = ("mcmoe_pruned_expert_activations_total", "mcmoe_expert_activations_total")
    dropped, seen = (registry.get_sample_value(name) for name in names)
    return dropped / seen


def start_engine(model: Path, **options) -> LLM:
    return LLM(
        str(model),
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=max(CONCURRENCY),
        kv_cache_memory_bytes=256 << 20,
        gpu_memory_utilization=0.05,
        enable_prefix_caching=False,
        **options,
    )


def decode_tokens_per_second(engine: LLM, concurrency: int) -> float:
    """New tokens of all streams per second, prefill excluded by timing a run of one new token."""
    prompts = [
        TokensPrompt(prompt_token_ids=[random.randrange(30000) for _ in range(PROMPT_TOKENS)])
        for _ in range(concurrency)
    ]
    seconds = []
    for tokens in (1, 1 + NEW_TOKENS):
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1, detokenize=False)
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return concurrency * NEW_TOKENS / (seconds[1] - seconds[0])


def main() -> None:
    # Not above: vLLM 0.32 starts its workers by importing this file again, and they fail if that brings in llvmlite
    # (through numba), as vLLM looks for Triton kernels in every loaded module and trips over its library object.
    from synthetic_checkpoint import SHAPES, write_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bits", type=float, default=2.5, help="average bits, scales and zeros included")
    parser.add_argument("--pruned", type=float, default=0.3, help="fraction of the third engine's activations to drop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        shape, quantised = SHAPES[arguments.shape], Path(directory) / "mcmoe"
        write_checkpoint(Path(directory) / "bf16", shape, layers=arguments.layers, bits=None, linear_bits=16)
        write_checkpoint(quantised, shape, layers=arguments.layers, bits=arguments.bits)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        engines = {
            "bf16": start_engine(Path(directory) / "bf16"),
            "mcmoe": start_engine(quantised, hf_overrides={"mcmoe_pruning": "off"}),
            "pruned": start_engine(quantised, hf_overrides={"mcmoe_pruning": arguments.pruned}),
        }
        speeds: dict[str, dict[int, list[float]]] = {name: {c: [] for c in CONCURRENCY} for name in engines}
        for engine in engines.values():
            decode_tokens_per_second(engine, 1)  # warm-up
        for _ in range(arguments.rounds):
            for concurrency in CONCURRENCY:
                for name, engine in engines.items():
                    speeds[name][concurrency].append(decode_tokens_per_second(engine, concurrency))
        print(f"\nThe third engine dropped {pruned_fraction(directory):.1%} of its expert activations.")

    print(
        f"\n{arguments.shape} shape, {arguments.layers} layers, {arguments.bits} bits, median of {arguments.rounds}\n"
    )
    print("| concurrency | " + " | ".join(f"{name} tokens/s" for name in engines) + " | ratios to bf16 |")
    print("|---" * (len(engines) + 2) + "|")
    rows = []
    for concurrency in CONCURRENCY:
        row = {name: statistics.median(speeds[name][concurrency]) for name in engines}
        rows.append({"concurrency": concurrency, **row})
        ratios = ", ".join(f"{speed / row['bf16']:.2f}" for name, speed in row.items() if name != "bf16")
        print(f"| {concurrency} | " + " | ".join(f"{speed:.1f}" for speed in row.values()) + f" | {ratios} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments) | {"json": None}, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
