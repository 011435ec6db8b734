"""A published model's full shape, quantised, served by `vllm serve` here: start, memory, tokens per second.

    python benchmarks/full_size.py mixtral-8x7b CHECKPOINT [--bits 2.5] [--codes trellis] [--pruned 0.3] [--json FILE]

CHECKPOINT is written by benchmarks/synthetic_checkpoint.py where it does not exist. Decoding reads every weight of the
layers, the output head and the chosen experts once per step: those bytes over the bandwidth measured with the same
threads, just before and after, are the bound that the speed is compared to. With several streams a step reads the
experts that any of them chose, on average those of an even, independent routing.

The first start finds no cache, neither vLLM's nor the plugin's: both are in CHECKPOINT.cache, which is emptied before.
The starts after it, one per fraction pruned, find what it left.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cpu_moe import Bandwidth
from openai import OpenAI
from server_start import Memory, Start, read_memory, read_start
from synthetic_checkpoint import SHAPES, Shape, write_checkpoint

from vllm_mcmoe.calibration.model.weight_files import TensorFiles
from vllm_mcmoe.kernels.packing import KINDS
from vllm_mcmoe.local_server import serve
from vllm_mcmoe.start_cache import CACHE_VARIABLE

CONCURRENCY = (1, 4)
DECODE_PROMPT, NEW_TOKENS = 16, 32
PREFILL_PROMPT = 512
MAX_LENGTH, KV_CACHE_BYTES = 1024, 1 << 29
GB = 1e9
EMBEDDING = "model.embed_tokens.weight"  # of which a step reads a row per token


@dataclass
class Decoding:
    """bound: tokens per second if the bytes of a step were all it had to read, at the measured bandwidth."""

    concurrency: int
    tokens_per_second: float
    step_bytes: float
    bound: float

    @property
    def share(self) -> float:
        return self.tokens_per_second / self.bound


@dataclass
class Served:
    pruned: float
    start: Start
    memory: Memory
    decoding: list[Decoding]
    prefill_tokens_per_second: float


def step_bytes(checkpoint: Path, shape: Shape, tokens: int, pruned: float) -> float:
    """Bytes of weights that a decode step of `tokens` tokens reads."""
    always = experts = 0
    for name, info in TensorFiles(checkpoint).info.items():
        if f".{shape.experts}." in name:
            experts += info.nbytes
        elif name != EMBEDDING:
            always += info.nbytes
    chosen = shape.config["num_experts_per_tok"] * (1 - pruned) / shape.num_experts
    return always + experts * (1 - (1 - chosen) ** tokens)


_PROMPTS = itertools.count()


def _prompt(tokens: int) -> str:
    """Words of the synthetic tokenizer, another text every time, so that no prefix is cached."""
    first = next(_PROMPTS)
    return " ".join(f"w{2 + (7919 * first + 104729 * i) % 30000}" for i in range(tokens))


def complete(client: OpenAI, model: str, prompt_tokens: int, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and the times at which tokens arrived."""
    start, arrived = time.perf_counter(), []
    stream = client.completions.create(
        model=model,
        prompt=_prompt(prompt_tokens),
        max_tokens=new_tokens,
        temperature=1.0,  # random weights repeat themselves when decoded greedily, and route alike
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for event in stream:
        if event.choices:
            arrived.append(time.perf_counter())
    return arrived[0] - start, arrived


def decode_tokens_per_second(client: OpenAI, model: str, concurrency: int) -> float:
    """All streams' tokens between the last stream's first token and the first stream's last."""
    with ThreadPoolExecutor(concurrency) as pool:
        runs = list(pool.map(lambda _: complete(client, model, DECODE_PROMPT, NEW_TOKENS)[1], range(concurrency)))
    begin, end = max(run[0] for run in runs), min(run[-1] for run in runs)
    return sum(begin < moment <= end for run in runs for moment in run) / (end - begin)


def measured(bandwidth: Bandwidth) -> list[float]:
    time.sleep(1)  # the engine's threads spin for a while after a request
    return [bandwidth.measure() for _ in range(5)]


@dataclass
class Server:
    """How servers are started here. cache: vLLM's folder for what a start leaves to the next, ours in it."""

    checkpoint: Path
    cache: Path
    threads: int
    options: Sequence[str]

    @contextmanager
    def started(self, pruned: float) -> Iterator[tuple[OpenAI, Start]]:
        fixed = {
            "max-model-len": MAX_LENGTH,
            "max-num-seqs": max(CONCURRENCY),
            "max-num-batched-tokens": PREFILL_PROMPT,  # vLLM passes as many through the model before it is ready
            "kv-cache-memory-bytes": KV_CACHE_BYTES,
            "hf-overrides": json.dumps({"mcmoe_pruning": pruned or "off"}),
        }
        options = [part for name, value in fixed.items() for part in (f"--{name}", str(value))] + list(self.options)
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}",
            "VLLM_CACHE_ROOT": str(self.cache),
            CACHE_VARIABLE: str(self.cache / "mcmoe"),
        }
        log_file, began = Path(tempfile.gettempdir()) / "full_size_server.log", time.time()
        print(f"Starting vllm serve {' '.join(options)}; log: {log_file}", flush=True)
        with serve(self.checkpoint, options, log_file=log_file, environment=environment) as url:
            start = read_start(log_file, began, time.time())
            yield OpenAI(base_url=url, api_key="none", timeout=600), start


def measure_first_start(server: Server, pruned: float) -> tuple[Start, Memory]:
    """Memory after a request of enough tokens that every expert has been used."""
    shutil.rmtree(server.cache, ignore_errors=True)
    with server.started(pruned) as (client, start):
        complete(client, str(server.checkpoint), 4 * DECODE_PROMPT, 1)
        return start, read_memory()


def measure(server: Server, shape: Shape, pruned: float, rounds: int) -> Served:
    bandwidth, model = Bandwidth(), str(server.checkpoint)
    with server.started(pruned) as (client, start):
        decode_tokens_per_second(client, model, 1)  # warm-up
        decoding = []
        for concurrency in CONCURRENCY:
            speeds, bandwidths = [], measured(bandwidth)
            for _ in range(rounds):
                speeds.append(decode_tokens_per_second(client, model, concurrency))
                bandwidths += measured(bandwidth)
            size = step_bytes(server.checkpoint, shape, concurrency, pruned)
            bound = concurrency * statistics.median(bandwidths) / size
            decoding.append(Decoding(concurrency, statistics.median(speeds), size, bound))
        prefill = [PREFILL_PROMPT / complete(client, model, PREFILL_PROMPT, 1)[0] for _ in range(rounds)]
        memory = read_memory()
    return Served(pruned, start, memory, decoding, statistics.median(prefill))


def report_start(title: str, start: Start, memory: Memory) -> None:
    print(f"\n### {title}: ready after {start.seconds:.0f} s\n")
    print("| part | s |\n|---|---:|")
    for part, seconds in start.parts.items():
        print(f"| {part} | {seconds:.0f} |")
    print(
        f"\n{start.experts}\n{memory.private / GB:.2f} GB private, {memory.files / GB:.2f} GB in mapped files; ", end=""
    )
    print(f"{memory.peak / GB:.2f} GB resident at most.", flush=True)


def report(served: Served) -> None:
    report_start(f"{served.pruned:.0%} of the expert activations pruned", served.start, served.memory)
    print(f"Prefill of {PREFILL_PROMPT} tokens: {served.prefill_tokens_per_second:.1f} tokens/s.\n")
    print("| streams | tokens/s | GB read per step | bound, tokens/s | share |\n|---|---|---|---|---|")
    for row in served.decoding:
        cells = row.concurrency, f"{row.tokens_per_second:.2f}", f"{row.step_bytes / GB:.2f}", f"{row.bound:.2f}"
        print("| " + " | ".join(map(str, cells)) + f" | {row.share:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bits", type=float, default=2.5, help="of a checkpoint that is to be written")
    parser.add_argument("--codes", choices=KINDS, default="scalar", help="likewise")
    parser.add_argument("--linear-bits", type=int, choices=(4, 8, 16), default=4, help="likewise, of attention")
    parser.add_argument("--layers", type=int, help="likewise, fewer than the model has")
    parser.add_argument("--pruned", type=float, nargs="*", default=[0.0], help="fractions; a server each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments, options = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    if not (arguments.checkpoint / "config.json").exists():
        write_checkpoint(
            arguments.checkpoint,
            shape,
            layers=arguments.layers,
            bits=arguments.bits,
            linear_bits=arguments.linear_bits,
            kind=arguments.codes,
        )
    cache = arguments.checkpoint.with_name(f"{arguments.checkpoint.name}.cache").resolve()
    server = Server(arguments.checkpoint, cache, arguments.threads, options)
    start, memory = measure_first_start(server, arguments.pruned[0])
    report_start("First start", start, memory)
    results = []
    for pruned in arguments.pruned:
        served = measure(server, shape, pruned, arguments.rounds)
        report(served)
        results.append(asdict(served))
    if arguments.json:
        first = {"start": asdict(start), "memory": asdict(memory)}
        arguments.json.write_text(json.dumps({"first_start": first, "served": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
