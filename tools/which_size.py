"""Which model fits which memory, as the README shows it: the most bits an expert's weight can have.

    python -m tools.which_size [--memory 8 12 16 24] [--kv-tokens 16384]

From config.json alone, as `mcmoe plan-resources MODEL --size` computes it: the output head and all linears at 4 bits,
KV cache besides, and a tenth of the memory left to activations and vLLM. "4+": experts at 4 bits, all else at 16 fit.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.released_configs import RELEASED, write_config
from vllm_mcmoe.calibration.allocate.bits import written_bits
from vllm_mcmoe.calibration.evaluate.resources import USABLE_SHARE, plan_resources
from vllm_mcmoe.calibration.recipes import RECIPES
from vllm_mcmoe.errors import PlanError

MEMORY, KV_TOKENS = (8, 12, 16, 24, 48, 80), 16384
MOST_BITS = written_bits(4, RECIPES["mcmoe"].format_version)
LEAST_BITS = 1.5  # below, half of the experts' matrices have a single bit
MODELS = (
    "LFM2-8B-A1B",
    "gpt-oss-20b",
    "Gemma-4-26B-A4B",
    "Qwen3-30B-A3B",
    "GLM-4.7-Flash",
    "Qwen3.6-35B-A3B",
    "Mixtral-8x7B",
    "Qwen3-Next-80B-A3B",
    "GLM-4.5-Air",
    "gpt-oss-120b",
    "Qwen3-235B-A22B",
    "Hy3",
)


def main() -> None:
    options = _arguments()
    print(f"| model | 16 bits, GB | {' | '.join(f'{size} GB' for size in options.memory)} |")
    print(f"|---|---:|{'---:|' * len(options.memory)}", flush=True)
    for name in MODELS:
        print(row(name, options.memory, options.kv_tokens), flush=True)


def row(name: str, memory: Sequence[int] = MEMORY, kv_tokens: int = KV_TOKENS) -> str:
    """A model's line of the table. memory: sizes in GB; kv_tokens: of all requests that are served at once."""
    return f"| {name} | {' | '.join(_cells(name, memory, kv_tokens))} |"


def _cells(name: str, memory: Sequence[int], kv_tokens: int) -> Iterator[str]:
    """GB in 16 bits, then the bits in each memory, empty below LEAST_BITS."""
    with TemporaryDirectory() as directory:
        model = write_config(Path(directory), RELEASED[name])
        largest = plan_resources(model, bits=MOST_BITS, linear_bits=16, kv_tokens=kv_tokens)
        yield f"{2 * largest.parameters.total / 1e9:.0f}"
        for size in memory:
            left = round(USABLE_SHARE * size * 1e9) - largest.serving.kv_bytes
            yield "4+" if left >= largest.serving.checkpoint_bytes else _bits_in(model, left)


def _bits_in(model: Path, size: int) -> str:
    try:
        bits = plan_resources(model, size=size).bits
    except PlanError:  # the smallest checkpoint is larger
        return ""
    return f"{bits:.1f}" if bits >= LEAST_BITS else ""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which model fits which memory.")
    parser.add_argument("--memory", type=int, nargs="+", default=MEMORY, help="sizes in GB")
    parser.add_argument("--kv-tokens", type=int, default=KV_TOKENS, help="of all requests that are served at once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
