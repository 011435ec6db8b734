"""Tensors of a Hugging Face model directory, read by name, one at a time, from its safetensors files."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_mcmoe.errors import FormatError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "F32": 4, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, from the header of its file. dtype is safetensors' own name, e.g. "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ELEMENT_BYTES[self.dtype]


class TensorFiles:
    """The safetensors files of a model directory.

    info   tensor name -> TensorInfo, of every tensor
    files  the files, in name order
    """

    def __init__(self, directory: Path):
        """Reads headers only. Raises FormatError: no safetensors files, one missing or broken, an index that names
        a tensor its file lacks."""
        self.directory = Path(directory)
        self.files, promised = _list_files(self.directory)
        self.info: dict[str, TensorInfo] = {}
        for path in self.files:
            with _open(path) as handle:
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    header = handle.get_slice(name)
                    self.info[name] = TensorInfo(path, header.get_dtype(), tuple(header.get_shape()))
        for name, file in promised.items():
            if name not in self.info:
                raise FormatError(f"{self.directory / INDEX_FILE}: tensor {name} is not in {file}, as it says.")

    def read(self, name: str, part: tuple[slice, ...] = ()) -> torch.Tensor:
        """The tensor as stored, or a part of it, in memory of its own. Raises FormatError if there is none of that
        name."""
        info = self.info.get(name)
        if info is None:
            raise FormatError(f"{self.directory}: tensor {name} is missing from its safetensors files.")
        # safetensors maps the file; whatever was read would stay resident for as long as the handle is open.
        with _open(info.file) as handle:
            return (handle.get_slice(name)[part] if part else handle.get_tensor(name)).clone()


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:  # a file cut short is among the former
        raise FormatError(f"{path}: cannot be read as safetensors: {error}. Is the download complete?") from None


def _list_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and the index's promise of tensor name -> file name (empty without an index)."""
    index_path = directory / INDEX_FILE
    if not index_path.is_file():
        single = directory / SINGLE_FILE
        if not single.is_file():
            raise FormatError(f"{directory}: neither {INDEX_FILE} nor {SINGLE_FILE} there.")
        return [single], {}
    try:
        promised = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        plain = isinstance(promised, dict) and all(isinstance(name, str) for name in promised.values())
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{index_path}: not a safetensors index: {error!r}") from None
    if not plain:
        raise FormatError(f"{index_path}: not a safetensors index: weight_map must map names of tensors to files.")
    files = [directory / name for name in sorted(set(promised.values()))]
    for path in files:
        if not path.is_file():
            raise FormatError(f"{path}: named in {INDEX_FILE} but missing. Is the download complete?")
    return files, promised
