"""`mcmoe demo`: the whole path on the embedded reference model, with a real vLLM server on localhost."""

import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from openai import OpenAI
from rich.table import Table
from rich.text import Text

from vllm_mcmoe.calibration.evaluate.scores import Evaluation, evaluate
from vllm_mcmoe.calibration.pipeline import quantize
from vllm_mcmoe.local_server import serve
from vllm_mcmoe.reporting import console

REFERENCE_MODEL = Path(__file__).parent / "reference_model"  # in a checkout, a link to benchmarks/reference_model
SEQUENCES, LENGTH = 128, 256  # the reference model was trained at a context of 256 tokens

PROMPTS = {
    "scripture": "And the LORD said unto Moses,",
    "drama": "KING HENRY. What news, my lord, from",
    "manual": "The following example shows how to use the",
    "german": "BEZEICHNUNG\n",
    "python": "class Server:\n    def __init__(self",
}
COMPLETION_TOKENS = 40
TIMED_ROUNDS = 3
# Eager, because compiling would double a demo's start-up for a model whose layers take microseconds.
SERVER_OPTIONS = ("--enforce-eager", "--max-model-len", str(LENGTH), "--max-num-seqs", "8")


@dataclass(frozen=True)
class Served:
    """What one server answered: completions by prompt name, decode speed of one stream in tokens per second."""

    completions: dict[str, str]
    tokens_per_second: float


def run(bits: float, out: Path) -> None:
    """Quantise, evaluate, serve and compare; results go to the terminal, files to `out`."""
    model, corpus = REFERENCE_MODEL / "tiny-mixtral", REFERENCE_MODEL / "corpus"
    checkpoint = out / f"tiny-mixtral-{bits:g}bit"
    shutil.rmtree(checkpoint, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)  # this model's matrices are too small to share: with two it takes twice as long
    console.rule(f"1. Quantise the experts to {bits:g} bits")
    calibration = sorted(corpus.glob("*.calibration.txt"))
    quantize(model, checkpoint, calibration, bits=bits, sequences=SEQUENCES, length=LENGTH, log=console.print)

    console.rule("2. Evaluate on text that was used for neither training nor calibration")
    held_out = sorted(corpus.glob("*.evaluation.txt"))
    before = evaluate(model, held_out, sequences=SEQUENCES, length=LENGTH)
    after = evaluate(checkpoint, held_out, against=model, sequences=SEQUENCES, length=LENGTH)

    console.rule("3. Serve both with vLLM (about a minute each)")
    served_before = _ask_server(model, out / "server-bf16.log")
    served_after = _ask_server(checkpoint, out / "server-mcmoe.log")

    _print_completions(served_before, served_after, bits)
    _print_figures(before, after, served_before, served_after, bits)
    console.print(f"Serve it yourself: vllm serve {checkpoint} {' '.join(SERVER_OPTIONS)}", soft_wrap=True)


def _ask_server(model: Path, log_file: Path) -> Served:
    with (
        console.status(f"starting vllm serve {model.name} (log: {log_file})"),
        serve(model, SERVER_OPTIONS, log_file=log_file) as url,
    ):
        client = OpenAI(base_url=url, api_key="none")
        completions = {name: _complete(client, model, prompt, COMPLETION_TOKENS)[0] for name, prompt in PROMPTS.items()}
        # More rounds, timed, after the first has warmed everything up. Of each prompt two lengths: their difference is
        # the decoding alone, whatever a request costs besides.
        rounds = [
            [_complete(client, model, prompt, tokens)[1] for prompt in PROMPTS.values() for _ in range(TIMED_ROUNDS)]
            for tokens in (1, COMPLETION_TOKENS)
        ]
        seconds = statistics.median(rounds[1]) - statistics.median(rounds[0])
        speed = (COMPLETION_TOKENS - 1) / seconds
    console.print(f"{model.name}: {len(PROMPTS)} prompts answered over HTTP, {speed:.0f} tokens per second")
    return Served(completions, speed)


def _complete(client: OpenAI, model: Path, prompt: str, tokens: int) -> tuple[str, float]:
    """A greedy continuation of so many tokens, and the seconds it took."""
    start = time.perf_counter()
    answer = client.completions.create(
        model=str(model), prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text, time.perf_counter() - start


def _print_completions(before: Served, after: Served, bits: float) -> None:
    table = Table(title="Completions (greedy)", show_lines=True)
    table.add_column("prompt", ratio=1)
    table.add_column("bf16", ratio=2)
    table.add_column(f"{bits:g} bits", ratio=2)
    for name, prompt in PROMPTS.items():
        table.add_row(Text(prompt), Text(before.completions[name]), Text(after.completions[name]))
    console.print(table)


def _print_figures(before: Evaluation, after: Evaluation, served: Served, served_after: Served, bits: float) -> None:
    table = Table(title="Before and after")
    table.add_column("")
    table.add_column("bf16", justify="right")
    table.add_column(f"{bits:g} bits", justify="right")
    table.add_row(
        "perplexity, geometric mean over domains",
        f"{before.geometric_mean_perplexity:.2f}",
        f"{after.geometric_mean_perplexity:.2f}",
    )
    table.add_row("KL to bf16, nats per token", "0", f"{after.mean_kl:.4f}")
    table.add_row("expert bytes", f"{before.expert_bytes:,}", f"{after.expert_bytes:,}")
    table.add_row("model bytes", f"{before.total_bytes:,}", f"{after.total_bytes:,}")
    for kind in ("experts", "model"):
        table.add_row(f"bits per weight, {kind}", f"{before.average_bits[kind]:.2f}", f"{after.average_bits[kind]:.2f}")
    table.add_row(
        "tokens per second, one stream", f"{served.tokens_per_second:.0f}", f"{served_after.tokens_per_second:.0f}"
    )
    console.print(table)
    console.print(
        "This model's experts fit in the cache, so its speed says little: `make bench-cpu` in the project's sources "
        "measures real sizes.",
        style="dim",
    )
