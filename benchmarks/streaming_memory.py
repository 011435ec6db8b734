"""Quantise a model several times larger than the memory allowed, and say what it took.

    python benchmarks/streaming_memory.py                        # 48 layers, 4.9 GB in bf16, within 1.2 GB
    python benchmarks/streaming_memory.py --layers 24            # half the layers: half the time, the same memory
    python benchmarks/streaming_memory.py --layers 2 --limit 0 --recipe mcmoe   # the time, beside what is predicted

Writes a random Mixtral layer by layer, then measures it with gradients and quantises it, in a process whose private
memory the kernel limits (RLIMIT_DATA: an allocation beyond it fails; it counts address space, so malloc is told not to
keep what was freed). Weights are rounded to nearest, at one width, to make it minutes instead of hours; GPTQ adds some
eight copies of one expert's largest matrix and six of its Hessian (--recipe uniform, or mcmoe, shows it). The CPU time
is printed beside what `mcmoe plan-resources` predicts.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

from vllm_mcmoe.calibration.checkpoint.writer import shard_name, write_index
from vllm_mcmoe.calibration.common.memory import peak_resident_bytes
from vllm_mcmoe.calibration.evaluate.times import predict_times
from vllm_mcmoe.calibration.matrix.gptq import GPTQOptions
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.calibration.recipes import RECIPES, Effort, Recipe

REFERENCE = Path(__file__).parent / "reference_model"
QUICK = dataclasses.replace(
    RECIPES["mcmoe"],
    name="quick",
    widths=(2,),
    error_quantizer="rtn",
    gptq=GPTQOptions(compensate=False, mse_search=False),
)
HEAD_SIZE = 64


def write_random_mixtral(directory: Path, layers: int, hidden: int, intermediate: int, experts: int) -> Path:
    """A Mixtral in bf16, weights drawn layer by layer; tokenizer and vocabulary of the reference model."""
    directory.mkdir(parents=True)
    heads = hidden // HEAD_SIZE
    config = MixtralConfig(
        architectures=["MixtralForCausalLM"],
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    (directory / "config.json").write_text(config.to_json_string())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(REFERENCE / "tiny-mixtral" / name, directory / name)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, columns**-0.5, generator=generator)

    shards = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = shard_name(number, layers + 1)
        save_file(tensors, directory / name, metadata={"format": "pt"})
        shards[name] = {key: tensor.nbytes for key, tensor in tensors.items()}

    for index in range(layers):
        prefix = f"model.layers.{index}"
        tensors = {
            f"{prefix}.{norm}.weight": torch.ones(hidden).bfloat16()
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for projection, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            tensors[f"{prefix}.self_attn.{projection}_proj.weight"] = matrix(rows, hidden)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = matrix(experts, hidden)
        for expert in range(experts):
            base = f"{prefix}.block_sparse_moe.experts.{expert}"
            for projection, shape in (
                ("w1", (intermediate, hidden)),
                ("w2", (hidden, intermediate)),
                ("w3", (intermediate, hidden)),
            ):
                tensors[f"{base}.{projection}.weight"] = matrix(*shape)
        write(index, tensors)
    outer = {"model.embed_tokens.weight": matrix(4096, hidden), "lm_head.weight": matrix(4096, hidden)}
    write(layers, {**outer, "model.norm.weight": torch.ones(hidden).bfloat16()})
    write_index(directory, shards)
    return directory


def quantize_within(limit: int | None, model: Path, out: Path, recipe: str | Recipe = QUICK, **options) -> int:
    """Quantise; returns the most bytes that were resident. limit: of private memory, None for none."""
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    data = sorted((REFERENCE / "corpus").glob("*.calibration.txt"))
    quantize(model, out, data, recipe=_named(recipe), bits=2.25, linear_bits=16, **options)
    return peak_resident_bytes()


def _named(recipe: str | Recipe) -> str | Recipe:
    return QUICK if recipe == QUICK.name else recipe


def predicted(model: Path, recipe: str, effort: Effort, **options) -> float:
    """Seconds of one thread."""
    torch.set_num_threads(1)
    times = predict_times(model, recipe=_named(recipe), linear_bits=16, **options)[effort]
    print(", ".join(f"{step} {seconds:.1f} s" for step, seconds in times.items()))
    return sum(times.values())


def _report(sender, *arguments, **options) -> None:
    started = time.process_time()
    peak = quantize_within(*arguments, **options)
    sender.send((peak, time.process_time() - started))


def quantize_apart(limit: int | None, model: Path, out: Path, **options) -> tuple[int, float]:
    """quantize_within in a process of its own: what it returns, and the CPU time. Raises RuntimeError when that
    fails."""
    if limit is not None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # read by the new process's glibc
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, limit, model, out), kwargs=options)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"quantising {model} within {limit} bytes failed") from None
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--limit", type=float, default=1.2, help="GB of private memory; 0 for no limit")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--activations", choices=("memory", "disk"), default="disk")
    parser.add_argument("--recipe", choices=(QUICK.name, "uniform", "mcmoe"), default=QUICK.name)
    parser.add_argument("--effort", choices=("fast", "normal", "best"), default="normal")
    parser.add_argument("--directory", type=Path, help="for model and checkpoint; a temporary one if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        shape = (options.layers, options.hidden, options.intermediate, options.experts)
        model = write_random_mixtral(Path(directory) / "model", *shape)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        limit = int(options.limit * 1e9) or None
        calibration = {key: getattr(options, key) for key in ("sequences", "length", "activations", "recipe", "effort")}
        started = time.monotonic()
        peak, cpu_seconds = quantize_apart(
            limit, model, Path(directory) / "out", show_progress=False, log=print, **calibration
        )
        seconds = time.monotonic() - started
        forecast = predicted(model, **{key: calibration[key] for key in ("recipe", "effort", "sequences", "length")})
    layer = 2 * (size - 2 * 2 * 4096 * options.hidden) / options.layers
    activations = (options.layers + 5) * options.sequences * options.length * options.hidden * 4
    result = {
        "model_gb": round(size / 1e9, 2),
        "layer_float32_gb": round(layer / 1e9, 3),
        "activations_gb": round(activations / 1e9, 3),
        "limit_gb": options.limit,
        "peak_resident_gb": round(peak / 1e9, 3),
        "model_over_peak": round(size / peak, 2),
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds, 1),
        "predicted_cpu_seconds": round(forecast, 1),
        "seconds_per_layer": round(seconds / options.layers, 1),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
