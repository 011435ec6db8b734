"""`mcmoe demo`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_mcmoe.cli.console import messages


def demo(
    bits: Annotated[float, typer.Option(help="Average bits of an expert weight, scales and zeros included.")] = 2.5,
    out: Annotated[Path, typer.Option(help="Where the quantised model and the logs go.")] = Path("mcmoe-demo"),
) -> None:
    """Quantise the embedded reference model, serve it with vLLM, and compare it with the original.

    Needs vLLM, and takes about four minutes on two cores.
    """
    from vllm_mcmoe.doctor import require_serving

    with messages.status("looking whether this environment can serve"):
        require_serving()
    from vllm_mcmoe.demo import run

    run(bits, out)
