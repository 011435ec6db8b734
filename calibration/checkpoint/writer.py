"""The files of a checkpoint directory: one shard of tensors per decoder layer and one for the rest, their index, and
what is taken over from the original."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_mcmoe.calibration.common.files import naming, write_atomically
from vllm_mcmoe.calibration.model.folder import CONFIG_FILE, WEIGHT_SUFFIXES
from vllm_mcmoe.calibration.model.weight_files import INDEX_FILE
from vllm_mcmoe.checkpoint import SCALES, matrix_tensors
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import SMALLEST_EXPONENT, StoredMatrix

REPORT_FILE, PLAN_FILE, FACTORS_FILE, MODEL_CARD = (
    "quantization_report.json",
    "plan.json",
    "factors.json",
    "README.md",
)
WIDTH_MAP, PRUNING_REPORT = "expert_widths.svg", "pruning_report.json"

# Of the original directory, besides its weights.
NOT_COPIED = (CONFIG_FILE, MODEL_CARD, REPORT_FILE, PLAN_FILE, FACTORS_FILE, INDEX_FILE, "pytorch_model.bin.index.json")


def shard_name(number: int, shards: int) -> str:
    """As transformers names them; number counts from 0."""
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


class Shard:
    """Tensors of one file, in host memory until write()."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> dict[str, int]:
        """Tensor name -> bytes."""
        return {name: tensor.nbytes for name, tensor in self._tensors.items()}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """tensor: on any device. Raises FormatError for a name added twice."""
        if name in self._tensors:
            raise FormatError(f"tensor {name} would be written twice.")
        self._tensors[name] = tensor.cpu().contiguous()

    def add_matrix(self, name: str, matrix: StoredMatrix, version: int) -> None:
        """One quantised matrix of an expert, in this version of the format. Raises FormatError for scales that it
        cannot hold precisely."""
        smallest = torch.finfo(torch.float16).smallest_normal if version == 1 else 2.0**SMALLEST_EXPONENT
        below = int((matrix.scales < smallest).sum())
        if below or not torch.isfinite(matrix.scales).all():
            raise FormatError(
                f"{name}.{SCALES}: {below} of {matrix.scales.numel()} scales lie below the smallest that the format "
                f"has, {smallest:.1e}, or some are not finite; such weights would lose precision unnoticed."
            )
        for suffix, tensor in matrix_tensors(matrix.to("cpu"), version).items():
            self.add(f"{name}.{suffix}", tensor)

    def write(self, path: Path) -> None:
        """Atomically. Raises OSError naming the file, for example on a full disk."""
        write_atomically(path, lambda temporary: save_file(self._tensors, temporary, metadata={"format": "pt"}))


def write_index(directory: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """shards: file name -> tensor name -> bytes. Raises FormatError for a tensor in two files."""
    weight_map: dict[str, str] = {}
    for file_name, tensors in shards.items():
        for name in tensors:
            if name in weight_map:
                raise FormatError(f"tensor {name} would be written twice.")
            weight_map[name] = file_name
    total = sum(sum(tensors.values()) for tensors in shards.values())
    write_document(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_document(path: Path, document: Any) -> None:
    """JSON for people."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    with naming(path):
        path.write_text(text, encoding="utf-8")


def side_files(model_dir: Path) -> list[Path]:
    """Tokenizer, generation settings, chat template and the like: every plain file that is no weight."""
    return [
        path
        for path in sorted(model_dir.iterdir())
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in NOT_COPIED
    ]


def copy_side_files(model_dir: Path, directory: Path) -> None:
    for path in side_files(model_dir):
        with naming(directory / path.name):
            shutil.copy2(path, directory / path.name)
