"""Every architecture that is served here, over two ranks: what docs/architectures.md says of them.

    python -m tests.vllm_mcmoe.two_ranks [KIND ...]      # or make two-ranks; a minute and a half each

Not part of the tests: what ranks do is tested below the engine (test_expert_weights.py) and with engines of one
architecture (test_serving.py). The models are those of the tests, with experts of at least two groups of 128, which is
what two tensor parallel ranks share.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from tests.conftest import REFERENCE_MODEL
from tests.tiny_models import SIZES, TINY_MODELS, make_tiny
from tests.vllm_mcmoe.engines import Job, score_in_one_process
from tests.vllm_mcmoe.serving import TWO_RANKS, prompts_from
from tests.vllm_mcmoe.test_architectures import (
    IN_BFLOAT16,
    OPTIONS,
    QUICK,
    RELEASED_IN,
    SERVED,
    WITHOUT_GATE,
    cycled_plan,
    expected_of,
)
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.pipeline import quantize

PARALLELISMS = {"tensor parallel": {}, "expert parallel": {"enable_expert_parallel": True}}
TWO_GROUPS = 256
# Not those whose check is lifted, or that are lent a torchvision, in one process only.
ONE_PROCESS = (*WITHOUT_GATE, "qwen3.5", "qwen3.5-vision", "qwen3-vl", "gemma4-vision")
KINDS = [kind for kind in SERVED if kind not in ONE_PROCESS]


def wide_enough(kind: str) -> dict[str, int]:
    """What to change in a tiny model whose experts are one group wide."""
    sizes = SIZES | TINY_MODELS[kind].sizes
    key = "moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"
    return {key: TWO_GROUPS} if sizes[key] <= TWO_GROUPS // 2 else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", default=KINDS, help=f"of {', '.join(KINDS)}")
    corpus = REFERENCE_MODEL / "corpus"
    calibration, evaluation = (sorted(corpus.glob(f"*.{part}.txt")) for part in ("calibration", "evaluation"))
    tokenizer = REFERENCE_MODEL / "tiny-mixtral"
    for kind in parser.parse_args().kinds:
        with tempfile.TemporaryDirectory() as name:
            folder, out = Path(name), Path(name) / "out"
            model = RELEASED_IN.get(kind, Path)(make_tiny(kind, folder / "model", tokenizer, **wide_enough(kind)))
            options = {"recipe": QUICK, "linear_bits": 16, "sequences": 8, "length": 64, "show_progress": False}
            quantize(model, out, calibration, plan=cycled_plan(describe_model(model)), **options)
            dtype = "bfloat16" if kind in IN_BFLOAT16 else "float32"
            for parallelism, more in PARALLELISMS.items():
                engine = (
                    {"dtype": dtype, "max_model_len": 128, "tensor_parallel_size": 2} | OPTIONS.get(kind, {}) | more
                )
                jobs = {kind: Job(str(out), engine, TWO_RANKS)}
                scored = score_in_one_process(jobs, prompts_from(tokenizer, evaluation[:3]), folder)[kind]
                expected = expected_of(out, scored, int8_linears=kind not in IN_BFLOAT16)
                difference = (torch.cat([logprobs for _, logprobs in scored]) - expected).abs()
                found = f"largest {difference.max():.3f}, mean {difference.mean():.4f}"
                print(f"{kind}, two ranks, {parallelism}: {found} in {dtype}", flush=True)


if __name__ == "__main__":
    main()
