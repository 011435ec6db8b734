"""Tensors of a Hugging Face model, read by name, one at a time, from its safetensors files.

Of a model on the hub a file is fetched when the first of its tensors is read; before that its header is all there is.
"""

import json
import math
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_mcmoe.calibration.model.folder import ModelFolder
from vllm_mcmoe.errors import FormatError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
ELEMENT_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, from the header of its file. dtype is safetensors' own name, e.g. "BF16"; offset is that of
    its first byte in the file, None where that is yet to be fetched."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ELEMENT_BYTES[self.dtype]


class TensorFiles:
    """The safetensors files of a model.

    info   tensor name -> TensorInfo, of every tensor
    files  the files, in name order
    """

    def __init__(self, folder: Path | ModelFolder):
        """Reads headers only. Raises FormatError: no safetensors files, one missing or broken, an index that names
        a tensor its file lacks; HubError where they cannot be had."""
        self.folder = folder if isinstance(folder, ModelFolder) else ModelFolder(Path(folder))
        self.directory = self.folder.path
        self.files, promised = _list_files(self.folder)
        self.info: dict[str, TensorInfo] = {}
        missing = [path for path in self.files if not path.is_file()]
        elsewhere = dict(zip(missing, self.folder.read_headers(list(map(self._name, missing))), strict=True))
        for path in self.files:
            if path not in elsewhere:
                self.info.update(_read_header(path))
                continue
            for name, tensor in elsewhere[path].tensors.items():
                self.info[name] = TensorInfo(path, tensor.dtype, tuple(tensor.shape), None)
        for name, file in promised.items():
            if name not in self.info:
                raise FormatError(f"{self.directory / INDEX_FILE}: tensor {name} is not in {file}, as it says.")
        self._fetching = threading.Lock()

    def _name(self, path: Path) -> str:
        """Of a file, as the index has it."""
        return os.path.relpath(path, self.directory)

    def read(self, name: str, index: tuple[int, ...] = (), rows: slice = slice(None)) -> torch.Tensor:
        """The tensor as stored, or tensor[index][rows] of it, which lies in one piece. rows: without a step.

        Raises FormatError if there is none of that name, HubError where its file cannot be fetched.
        """
        info = self.info.get(name)
        if info is None:
            raise FormatError(f"{self.directory}: tensor {name} is missing from its safetensors files.")
        if info.offset is None:
            self._fetch(info.file)
            info = self.info[name]
        # Not through safetensors, which parses a header of thousands of tensors anew for each file it opens, and whose
        # open files keep in memory what was read.
        shape, first = info.shape, 0
        for position in index:
            shape = shape[1:]
            first += position * math.prod(shape)
        if rows != slice(None):
            start, stop, _ = rows.indices(shape[0])
            first += start * math.prod(shape[1:])
            shape = (stop - start, *shape[1:])
        return _read_tensor(info, name, first, shape)

    def _fetch(self, path: Path) -> None:
        with self._fetching:  # several threads read
            self.folder.fetch(self._name(path))
            header = _read_header(path)
            for name, info in self.info.items():
                if info.file != path or info.offset is not None:
                    continue
                found = header.get(name)
                if found is None or (found.dtype, found.shape) != (info.dtype, info.shape):
                    raise FormatError(
                        f"{path}: {name} is not what the hub said before; remove the file, and try again."
                    )
                self.info[name] = found


def _read_tensor(info: TensorInfo, name: str, first: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What lies in a tensor's file from its element number `first` on."""
    if info.dtype not in DTYPES:
        raise FormatError(f"{info.file}: tensor {name} has dtype {info.dtype}; known: {', '.join(DTYPES)}.")
    tensor = torch.empty(shape, dtype=DTYPES[info.dtype])
    if tensor.numel():
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + first * tensor.itemsize)
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            while view and (count := file.readinto(view)):
                view = view[count:]
        if view:
            raise FormatError(f"{info.file}: ends inside of tensor {name}; it was cut short since it was opened.")
    return tensor


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file. Raises FormatError where safetensors would not read it."""
    try:
        safe_open(path, framework="pt").__exit__(None, None, None)  # checks the header, and the file's size by it
    except (SafetensorError, OSError) as error:  # a file cut short is among the former
        raise FormatError(f"{path}: cannot be read as safetensors: {error}. Is the download complete?") from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: TensorInfo(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _list_files(folder: ModelFolder) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and the index's promise of tensor name -> file name (empty without an index)."""
    directory = folder.path
    if not folder.has(INDEX_FILE):
        if not folder.has(SINGLE_FILE):
            raise FormatError(f"{folder}: neither {INDEX_FILE} nor {SINGLE_FILE} there.")
        return [directory / SINGLE_FILE], {}
    index_path = folder.fetch(INDEX_FILE)
    try:
        promised = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        plain = isinstance(promised, dict) and all(isinstance(name, str) for name in promised.values())
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{index_path}: not a safetensors index: {error!r}") from None
    if not plain:
        raise FormatError(f"{index_path}: not a safetensors index: weight_map must map names of tensors to files.")
    return [directory / name for name in sorted(set(promised.values()))], promised
