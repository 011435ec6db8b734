"""`mcmoe demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    bits: Annotated[float, typer.Option(help="Average bits of an expert weight, scales and zeros included.")] = 2.5,
    out: Annotated[Path, typer.Option(help="Where the quantised model and the logs go.")] = Path("build/demo"),
) -> None:
    """Quantise the embedded reference model, serve it with vLLM, and compare it with the original.

    Runs from a source checkout, needs vLLM, takes a few minutes on two cores.
    """
    from vllm_mcmoe.demo import run

    run(bits, out)
