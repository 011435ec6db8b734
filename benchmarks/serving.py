"""Tokens per second of stock vLLM with and without the plugin, on a synthetic model of a real layer shape.

    python benchmarks/serving.py [--shape mixtral] [--layers 2] [--bits 2.5] [--pruned 0.3] [--rounds 3] [--json FILE]

The engines run at once and take turns, so that a noisy machine disturbs all alike; medians are printed. Weights are
random (`--load-format dummy`): speed depends on their shape and width only, and routing spreads over all experts.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

# vLLM 0.32 starts its workers by importing this file again, and they fail if that brings in llvmlite (through numba:
# vllm_mcmoe.calibration): vLLM looks for Triton kernels in every loaded module and trips over its library object.
from vllm import LLM, SamplingParams, TokensPrompt

from vllm_mcmoe.checkpoint import CheckpointConfig, ExpertBits, tensor_suffixes
from vllm_mcmoe.kernels.packing import GROUP_SIZE, packed_bytes_per_group
from vllm_mcmoe.pruning import PruningRules

PROMPT_TOKENS, NEW_TOKENS = 32, 24
CONCURRENCY = (1, 8)
MASK_ROUTER_RANK = 8  # as mcmoe prune trains them
MONITOR_SECONDS = 10  # between two reports of vllm_mcmoe/pruning_monitor.py


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model's layers."""

    architecture: str
    model_type: str
    expert_prefix: str
    config: dict


SHAPES = {
    "mixtral": Shape(
        "MixtralForCausalLM",
        "mixtral",
        "block_sparse_moe.experts",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        },
    ),
    "qwen3-30b-a3b": Shape(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        "mlp.experts",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "vocab_size": 151936, "norm_topk_prob": True,
        },
    ),
}  # fmt: skip


def mixed_widths(bits: float, experts: int) -> tuple[int, ...]:
    """Widths 1, 2, 3, 4 in turn over the experts, whose written average comes closest to `bits` from below."""
    # float16 scales, and zeros above 1 bit, per group of 128 weights
    written_bits = {
        width: 8 * (packed_bytes_per_group(width) + 2 * (len(tensor_suffixes(width)) - 1)) / GROUP_SIZE
        for width in (1, 2, 3, 4)
    }
    widths = [1] * experts
    for width in (2, 3, 4):
        for expert in range(experts):
            candidate = [*widths[:expert], width, *widths[expert + 1 :]]
            if sum(map(written_bits.get, candidate)) / experts <= bits:
                widths = candidate
    return tuple(widths)


def write_config(directory: Path, shape: Shape, layers: int, bits: float | None, pruned: float = 0.0) -> Path:
    """A model directory without weights; `bits` None is the bf16 model; `pruned` of the activations are dropped."""
    directory.mkdir(parents=True)
    config = {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        **shape.config,
    }
    if bits is not None:
        experts = shape.config.get("num_local_experts") or shape.config["num_experts"]
        widths = mixed_widths(bits, experts)
        names = [f"model.layers.{layer}.{shape.expert_prefix}" for layer in range(layers)]
        widths_by_layer = {name: ExpertBits(widths, widths) for name in names}
        pruning = None
        if pruned:
            top_k, hidden_size = shape.config["num_experts_per_tok"], shape.config["hidden_size"]
            rules = synthetic_rules(names, top_k, experts, hidden_size, pruned)
            (directory / rules.config.file_name).write_bytes(rules.serialize())
            pruning = rules.config
        config["quantization_config"] = CheckpointConfig(widths_by_layer, pruning=pruning).to_dict()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def synthetic_rules(layers: list[str], top_k: int, experts: int, hidden_size: int, target: float) -> PruningRules:
    """Mask routers of real shape that drop some experts wherever they are not a token's first: random weights route to
    all alike, so their share decides the fraction dropped."""
    dropped = round(experts * target * top_k / (top_k - 1))
    layer = {
        "renormalize": torch.tensor(0.2),
        "thresholds": torch.zeros(2, top_k - 1),
        "weight_slopes": torch.zeros(2, top_k - 1),
        "expert_bias": torch.where(torch.arange(experts) < dropped, -1.0, 1.0),
        "projection": torch.zeros(MASK_ROUTER_RANK, hidden_size),
        "expert_features": torch.zeros(experts, MASK_ROUTER_RANK),
    }
    tensors = {f"{name}.{part}": tensor.clone() for name in layers for part, tensor in layer.items()}
    return PruningRules.create("otp", target, top_k, (0.0, 0.5), tensors)


def pruned_fraction(metrics: str) -> float:
    """What the engine reports, warm-up included, once its monitor has looked."""
    time.sleep(MONITOR_SECONDS + 1)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=metrics)
    names = ("mcmoe_pruned_expert_activations_total", "mcmoe_expert_activations_total")
    dropped, seen = (registry.get_sample_value(name) for name in names)
    return dropped / seen


def start_engine(model: Path) -> LLM:
    return LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=max(CONCURRENCY),
        kv_cache_memory_bytes=256 << 20,
        gpu_memory_utilization=0.05,
        enable_prefix_caching=False,
    )


def decode_tokens_per_second(engine: LLM, concurrency: int) -> float:
    """New tokens of all streams per second, prefill excluded by timing a run of one new token."""
    prompts = [
        TokensPrompt(prompt_token_ids=[(7 * stream + 13 * position) % 30000 for position in range(PROMPT_TOKENS)])
        for stream in range(concurrency)
    ]
    seconds = []
    for tokens in (1, 1 + NEW_TOKENS):
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return concurrency * NEW_TOKENS / (seconds[1] - seconds[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bits", type=float, default=2.5, help="average bits, scales and zeros included")
    parser.add_argument("--pruned", type=float, default=0.0, help="fraction of a third engine's activations to drop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        shape = SHAPES[arguments.shape]
        models = {
            "bf16": write_config(Path(directory) / "bf16", shape, arguments.layers, None),
            "mcmoe": write_config(Path(directory) / "mcmoe", shape, arguments.layers, arguments.bits),
        }
        if arguments.pruned:
            path = Path(directory) / "pruned"
            models["pruned"] = write_config(path, shape, arguments.layers, arguments.bits, arguments.pruned)
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        engines = {name: start_engine(model) for name, model in models.items()}
        speeds: dict[str, dict[int, list[float]]] = {name: {c: [] for c in CONCURRENCY} for name in engines}
        for engine in engines.values():
            decode_tokens_per_second(engine, 1)  # warm-up
        for _ in range(arguments.rounds):
            for concurrency in CONCURRENCY:
                for name, engine in engines.items():
                    speeds[name][concurrency].append(decode_tokens_per_second(engine, concurrency))
        if arguments.pruned:
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
