"""What a run depends on, as short values under readable keys: two runs with equal ones write the same bytes.

Bytes are equal on one machine's CPU with one number of threads; another machine's matrix products round differently.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_mcmoe import __version__
from vllm_mcmoe.calibration.checkpoint.writer import side_files
from vllm_mcmoe.calibration.common.device import multiplies_in_bfloat16
from vllm_mcmoe.calibration.common.files import sha256_of
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.text import TokenSequences, find_data_files
from vllm_mcmoe.calibration.model.weight_files import TensorFiles
from vllm_mcmoe.calibration.recipes import Recipe

SHOWN_DIGITS = 16  # of a SHA-256: enough to tell any two files apart, short enough for an error message


def identity_of_run(
    device: torch.device, description: MoeModel, files: TensorFiles, tokens: TokenSequences, recipe: Recipe
) -> dict[str, str]:
    """What every run depends on, besides its own arguments."""
    return {
        **identity_of_program(),
        **identity_of_device(device),
        **identity_of_products(device, description, recipe),
        **identity_of_model(description, files),
        **identity_of_tokens(tokens),
        **identity_of_recipe(recipe),
    }


def identity_of_program() -> dict[str, str]:
    return {"vllm-mcmoe": __version__, "torch": torch.__version__}


def identity_of_device(device: torch.device) -> dict[str, str]:
    """The kind of device: its last bits differ from another's, so work begun on one is not finished on the other. CPUs
    have no entry, so that unfinished work from before there was a choice is continued on them."""
    return {} if device.type == "cpu" else {"device other than the CPU": device.type}


def identity_of_products(device: torch.device, description: MoeModel, recipe: Recipe) -> dict[str, str]:
    """CPUs that have no faster bfloat16 have no entry."""
    rounded = recipe.bfloat16_products and multiplies_in_bfloat16(device, description.hidden)
    return {"operands of products": "bfloat16"} if rounded else {}


def identity_of_model(description: MoeModel, files: TensorFiles) -> dict[str, str]:
    """config.json and files that are copied by content; weights by header, size and time of change, since reading
    them all takes minutes. Of a model on the hub the commit says it all."""
    if description.folder.revision is not None:
        return {"model": f"{description.folder}, commit {description.folder.revision}"}
    identity = {}
    for path in [description.path / "config.json", *side_files(description.path)]:
        identity[f"model file {path.name}"] = sha256_of(path)[:SHOWN_DIGITS]
    for path in files.files:
        status = path.stat()
        header = _header_digest(path)
        identity[f"model file {path.name}"] = f"{header}, {status.st_size} bytes, changed at {status.st_mtime_ns} ns"
    return identity


def _header_digest(path: Path) -> str:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return hashlib.sha256(file.read(length)).hexdigest()[:SHOWN_DIGITS]


def identity_of_tokens(sequences: TokenSequences) -> dict[str, str]:
    """Of what was drawn from the data by the tokenizer, the file names included because factors.json has them."""
    names = ", ".join(path.name for path in sequences.files)
    digest = hashlib.sha256(sequences.tokens.numpy().tobytes()).hexdigest()[:SHOWN_DIGITS]
    return {"calibration tokens": f"{list(sequences.tokens.shape)} from {names}: {digest}"}


def identity_of_recipe(recipe: Recipe) -> dict[str, str]:
    return {f"recipe's {field.name}": repr(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}


def identity_of_files(key: str, paths: Sequence[str | Path] | None) -> dict[str, str]:
    """One entry, of all files' names and contents."""
    if paths is None:
        return {key: "none"}
    return {key: ", ".join(f"{path.name} {sha256_of(path)[:SHOWN_DIGITS]}" for path in find_data_files(paths))}


def identity_of_document(key: str, document: Any | None) -> dict[str, str]:
    """document: a dataclass, factors or a plan."""
    if document is None:
        return {key: "none"}
    text = json.dumps(dataclasses.asdict(document), sort_keys=True)
    return {key: hashlib.sha256(text.encode()).hexdigest()[:SHOWN_DIGITS]}


def identity_of_tensors(key: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """One entry, of all names and contents."""
    digest = None
    for name, tensor in tensors:
        digest = digest or hashlib.sha256()
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return {key: digest.hexdigest()[:SHOWN_DIGITS] if digest else "none"}
