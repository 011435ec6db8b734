"""`mcmoe push`: a checkpoint to the hub."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_mcmoe.cli.console import log


def push(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A quantised checkpoint.", show_default=False)
    ],
    name: Annotated[
        str,
        typer.Argument(
            metavar="ORG/NAME", help="Of the repository on the hub; made if there is none.", show_default=False
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that only you, or ORG, can see.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to; made if there is none.", show_default="main")
    ] = None,
) -> None:
    """Upload a checkpoint to the Hugging Face hub, with its model card.

    Needs `hf auth login`, or HF_TOKEN, with permission to write. What is there already is not uploaded again: the same
    command goes on after an upload that was interrupted, and brings up to date what `mcmoe prune` has changed.

    Example: `mcmoe push mixtral-2.5bit/ me/Mixtral-8x7B-mcmoe-2.5bit`
    """
    from vllm_mcmoe.calibration.push import push as upload

    address = upload(checkpoint, name, private=private, revision=revision, log=log)
    branch = f" --revision {revision}" if revision else ""
    log(f"Uploaded: {address}. Serve it: vllm serve {name}{branch}")
