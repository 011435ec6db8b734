"""Activations of all calibration tokens, in memory or on disk.

Every array is float32 [tokens, width], written once, batch by batch, then read batch by batch or row by row. Batches
may come from any device; arrays are in host memory or files, and what is read from them is in host memory. One of them
is tokens x width x 4 bytes: 4.3 GB for 128 x 2048 tokens of Mixtral-8x7B, and measuring keeps one per layer.

    store = ActivationStore(directory)                       # or ActivationStore() for memory
    hidden = store.collect("hidden-1", (layer(batch) for batch in hidden))
    for batch in hidden: ...                                 # [sequences, length, width]
    hidden.rows[index]                                       # [len(index), width]

On disk a named array outlives the process: it has a checksum, and find() gives it back to the next run. Either way the
numbers are the same bit for bit.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np
import torch

from vllm_mcmoe.calibration.common.files import flush_to_disk, naming, read_sealed, sha256_of, write_sealed
from vllm_mcmoe.calibration.common.memory import available_memory

Storage = Literal["auto", "memory", "disk"]

# What a run takes besides two layers and its activations: the interpreter with its libraries (0.7 GB), embeddings or
# lm_head in float32 (1.1 GB for 32000 x 8192), one batch's intermediates.
OTHER_BYTES = 2 << 30

SCRATCH = "scratch-"  # names of arrays that only the running process needs


class Rows(Protocol):
    """float32 [tokens, width]; a torch.Tensor is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor: ...


@dataclass
class Activations:
    """rows: of all batches one after another. shapes: of each batch, its last dimension the width."""

    rows: Rows
    shapes: list[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[torch.Tensor]:
        start = 0
        for shape in self.shapes:
            stop = start + math.prod(shape[:-1])
            yield self.rows[start:stop].view(shape)
            start = stop


@dataclass
class DiskRows:
    """Rows in a file of raw float32. Reading leaves nothing of it mapped, so resident memory is what was asked for."""

    path: Path
    count: int
    width: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.count)
            rows = torch.empty(stop - start, self.width)
            with self.path.open("rb", buffering=0) as file:
                file.seek(start * self.width * 4)
                _read_into(file, rows)
            return rows
        mapped = np.memmap(self.path, np.float32, "c", shape=(self.count, self.width))
        return torch.from_numpy(mapped)[index]


def _read_into(file: IO[bytes], rows: torch.Tensor) -> None:
    target = memoryview(rows.numpy()).cast("B")
    while target:  # one system call reads at most 2 GB
        read = file.readinto(target)
        if not read:
            raise OSError(None, "ends early: it was changed while it was in use", file.name)
        target = target[read:]


class ArrayWriter(Protocol):
    """Takes an array batch by batch."""

    def append(self, batch: torch.Tensor) -> None:
        """batch: float32 [..., width], of any length, on any device."""

    def finish(self) -> Activations: ...


class _MemoryWriter:
    def __init__(self, tokens: int):
        self._tokens, self._filled = tokens, 0
        self._rows: torch.Tensor | None = None
        self._shapes: list[tuple[int, ...]] = []

    def append(self, batch: torch.Tensor) -> None:
        if self._rows is None:
            self._rows = torch.empty(self._tokens, batch.shape[-1])
        rows = batch.cpu().reshape(-1, batch.shape[-1])
        self._rows[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)
        self._shapes.append(tuple(batch.shape))

    def finish(self) -> Activations:
        return Activations(self._rows, self._shapes)


class _DiskWriter:
    """Writes NAME.f32, and for arrays that are to outlive the process NAME.json, without which NAME.f32 is nothing."""

    def __init__(self, path: Path, durable: bool):
        self._path, self._durable = path, durable
        self._digest = hashlib.sha256()
        self._shapes: list[tuple[int, ...]] = []
        with naming(path):
            self._file = path.open("wb", buffering=0)

    def append(self, batch: torch.Tensor) -> None:
        data = memoryview(batch.cpu().contiguous().numpy()).cast("B")
        if self._durable:
            self._digest.update(data)
        with naming(self._path):
            while data:
                data = data[self._file.write(data) :]
        self._shapes.append(tuple(batch.shape))

    def finish(self) -> Activations:
        self._file.close()
        if self._durable:
            flush_to_disk(self._path)
            seal = {"sha256": self._digest.hexdigest(), "shapes": self._shapes}
            write_sealed(self._path.with_suffix(".json"), seal)
        return _on_disk(self._path, self._shapes)


def _on_disk(path: Path, shapes: list[tuple[int, ...]]) -> Activations:
    tokens = sum(math.prod(shape[:-1]) for shape in shapes)
    return Activations(DiskRows(path, tokens, shapes[0][-1]), shapes)


class ActivationStore:
    """Makes, keeps and drops arrays by name; in memory without a directory.

    Names that start with SCRATCH are neither flushed to the disk nor found again.
    """

    def __init__(self, directory: Path | None = None):
        self._directory = directory
        if directory is not None:
            directory.mkdir(exist_ok=True)

    def create(self, name: str, tokens: int) -> ArrayWriter:
        """A writer for an array of that many rows; an older one of that name is gone."""
        if self._directory is None:
            return _MemoryWriter(tokens)
        self.drop(name)
        return _DiskWriter(self._path(name), durable=not name.startswith(SCRATCH))

    def collect(self, name: str, batches: Iterable[torch.Tensor], tokens: int) -> Activations:
        """Store what an iterator yields, holding one batch at a time."""
        writer = self.create(name, tokens)
        for batch in batches:
            writer.append(batch)
        return writer.finish()

    def find(self, name: str) -> Activations | None:
        """An array of an earlier run, if it is whole; a damaged one counts as missing."""
        if self._directory is None:
            return None
        path = self._path(name)
        try:
            seal = read_sealed(path.with_suffix(".json"))
            if sha256_of(path) != seal["sha256"]:
                return None
            return _on_disk(path, [tuple(shape) for shape in seal["shapes"]])
        except (OSError, ValueError):
            return None

    def drop(self, name: str) -> None:
        """Free the disk space of an array; memory is freed with the last reference."""
        if self._directory is not None:
            self._path(name).with_suffix(".json").unlink(missing_ok=True)
            self._path(name).unlink(missing_ok=True)

    def drop_all(self) -> None:
        if self._directory is not None:
            for path in self._directory.iterdir():
                path.unlink()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.f32"


def fits_in_memory(activation_bytes: int, layer_bytes: int) -> bool:
    """Whether a run may keep its activations in memory: two float32 layers, the activations and OTHER_BYTES must not
    exceed what is available now."""
    return activation_bytes + 2 * layer_bytes + OTHER_BYTES <= available_memory()
