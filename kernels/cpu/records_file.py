"""One layer's records in a file that is mapped into memory: shared by processes, and there at the next start.

    8 bytes     b"mcmoerec"
    8 bytes     bytes of the header, little-endian
    32 bytes    the header's sha256
    header      JSON: {"key": ..., "buffers": {name: [{"bytes": ..., "sha256": ...}, ...]}}, one entry per matrix
    ...         per buffer, from a multiple of 4096: its matrices, one after the other

`key` says what the records were made from, in the words of whoever writes them; a reader names the one it wants. A file
is filled under another name and gets its own when it is complete and flushed. From then on nobody writes to it: who has
mapped it may go on when it is replaced or deleted.
"""

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import secrets
import struct
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from vllm_mcmoe.kernels.cpu.threads import thread_pool

MAGIC = b"mcmoerec"
PARTIAL_SUFFIX = ".partial"  # of files being filled
_PREFIX = struct.Struct("<8sQ32s")
_PAGE = 4096
_NO_DIGEST = "0" * 64
_LONGEST_HEADER = 1 << 26  # in a damaged file the length may be anything
_START_WRITEBACK = 2  # SYNC_FILE_RANGE_WRITE

Sizes = Mapping[str, Sequence[int]]  # buffer -> bytes of each of its matrices


class RecordsError(ValueError):
    """A records file that is damaged, or was made from something else. Says what was found, not where."""


class _Layout:
    """Where things are in the file of a key and sizes; digests have a fixed length, so it does not depend on them."""

    def __init__(self, key: Mapping[str, Any], sizes: Sizes):
        self.key = json.loads(json.dumps(key))  # as it will be read back
        self.sizes = {name: list(of_buffer) for name, of_buffer in sizes.items()}
        self.matrices: dict[str, list[tuple[int, int]]] = {}  # buffer -> (offset in the file, bytes)
        none = {name: [_NO_DIGEST] * len(of_buffer) for name, of_buffer in self.sizes.items()}
        end = len(self.header(none))
        for name, of_buffer in self.sizes.items():
            end = -(-end // _PAGE) * _PAGE
            self.matrices[name] = []
            for size in of_buffer:
                self.matrices[name].append((end, size))
                end += size
        self.file_bytes = end

    def header(self, digests: Mapping[str, Sequence[str]]) -> bytes:
        buffers = {
            name: [{"bytes": size, "sha256": digest} for size, digest in zip(of_buffer, digests[name], strict=True)]
            for name, of_buffer in self.sizes.items()
        }
        text = json.dumps({"key": self.key, "buffers": buffers}, indent=1).encode()
        return _PREFIX.pack(MAGIC, len(text), hashlib.sha256(text).digest()) + text

    def is_header(self, header: bytes, digests: Mapping[str, Sequence[str]]) -> bool:
        """Whether this is the header of this key and sizes, with these digests."""
        counts = {name: len(of_buffer) for name, of_buffer in self.sizes.items()}
        return counts == {name: len(of_buffer) for name, of_buffer in digests.items()} and header == self.header(
            digests
        )

    def tensors(self, mapping: mmap.mmap) -> dict[str, torch.Tensor]:
        """Every buffer, uint8 [bytes], in the mapping's memory."""
        with warnings.catch_warnings():  # torch has no tensors that refuse writing; the kernel's page tables do
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return {
                name: torch.frombuffer(mapping, dtype=torch.uint8, offset=matrices[0][0], count=sum(self.sizes[name]))
                for name, matrices in self.matrices.items()
            }


def map_records(path: Path, key: Mapping[str, Any], sizes: Sizes) -> dict[str, torch.Tensor]:
    """A file's buffers, uint8 [bytes] each, read-only, after every byte has been checked.

    Raises OSError where the file cannot be read, RecordsError where it is not the complete, undamaged file of this key.
    """
    layout = _Layout(key, sizes)
    with open(path, "rb") as file:
        stored = _read_digests(file, layout)
        found = os.fstat(file.fileno()).st_size
        if found != layout.file_bytes:
            raise RecordsError(f"it has {found} bytes, expected {layout.file_bytes}")
        mapping = _map_read_only(file.fileno())
    mapping.madvise(mmap.MADV_WILLNEED)
    view = memoryview(mapping)

    def damage(place: tuple[str, int]) -> str | None:
        name, index = place
        offset, size = layout.matrices[name][index]
        intact = hashlib.sha256(view[offset : offset + size]).hexdigest() == stored[name][index]
        return None if intact else f"the checksum of {name}, matrix {index}, does not match: its bytes have changed"

    places = [(name, index) for name, matrices in layout.matrices.items() for index in range(len(matrices))]
    with thread_pool() as pool:
        for problem in pool.map(damage, places):
            if problem:
                raise RecordsError(problem)
    return layout.tensors(mapping)


def _read_digests(file: BinaryIO, layout: _Layout) -> dict[str, list[str]]:
    """The checksums of every buffer's matrices, from the header. Raises RecordsError."""
    prefix = file.read(_PREFIX.size)
    magic, length, digest = _PREFIX.unpack(prefix.ljust(_PREFIX.size, b"\0"))
    if magic != MAGIC:
        raise RecordsError(f"it begins with {magic!r}, expected {MAGIC!r}")
    text = file.read(min(length, _LONGEST_HEADER))
    if hashlib.sha256(text).digest() != digest:
        raise RecordsError("its header does not match the header's checksum")
    buffers = json.loads(text)["buffers"]
    digests = {name: [matrix["sha256"] for matrix in matrices] for name, matrices in buffers.items()}
    if not layout.is_header(prefix + text, digests):
        raise RecordsError("it was made from another checkpoint, for another part of one, or by another version")
    return digests


def _map_read_only(descriptor: int) -> mmap.mmap:
    return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)


class RecordsWriter:
    """A file that is being filled. As a context, it takes away what has not been published.

    buffers   uint8 [bytes] each, in the file's memory; not to be used after `publish`
    """

    def __init__(self, path: Path, key: Mapping[str, Any], sizes: Sizes):
        """Makes the folder, and reserves the space. Raises OSError where that fails."""
        self.path = path
        self._layout = _Layout(key, sizes)
        self._digests = {name: [_NO_DIGEST] * len(of_buffer) for name, of_buffer in sizes.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # file systems without locks: remove_abandoned cannot tell, either
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Storing to a mapping cannot fail politely: where the disk is full, it kills the process.
            os.posix_fallocate(self._descriptor, 0, self._layout.file_bytes)
            self._mapping = mmap.mmap(self._descriptor, self._layout.file_bytes)
        except BaseException:
            self.__exit__()
            raise
        self.buffers = self._layout.tensors(self._mapping)

    def matrix(self, name: str, index: int) -> torch.Tensor:
        """Where this matrix goes, uint8 [bytes]."""
        offset, size = self._layout.matrices[name][index]
        return self.buffers[name].narrow(0, offset - self._layout.matrices[name][0][0], size)

    def filled(self, name: str, index: int) -> None:
        """Say that a matrix is in place; any thread may."""
        offset, size = self._layout.matrices[name][index]
        with memoryview(self._mapping) as view:
            self._digests[name][index] = hashlib.sha256(view[offset : offset + size]).hexdigest()
        _start_writing(self._descriptor, offset, size)

    def publish(self) -> dict[str, torch.Tensor]:
        """Flush, give the file its name and map it as `map_records` does; every matrix must have been filled.

        Where another process was faster, this takes that one's file, so that both share memory. Raises OSError.
        """
        os.pwrite(self._descriptor, self._layout.header(self._digests), 0)
        os.fsync(self._descriptor)
        with suppress(OSError, RecordsError):
            return map_records(self.path, self._layout.key, self._layout.sizes)
        os.rename(self._partial, self.path)
        return self._layout.tensors(_map_read_only(self._descriptor))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.buffers, self._mapping = {}, None  # unmaps it
        with suppress(FileNotFoundError):  # published
            os.unlink(self._partial)
        os.close(self._descriptor)


def _start_writing(descriptor: int, offset: int, size: int) -> None:
    """Let the disk begin while the next matrix is repacked; a hint, which only Linux's C libraries know."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(_START_WRITEBACK))


def remove_abandoned(folder: Path) -> list[Path]:
    """Delete files whose writers have died half-way. Who writes holds a lock; the dead hold none."""
    removed = []
    for path in folder.glob(f"*{PARTIAL_SUFFIX}"):
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed.append(path)
    return removed


class PrivateRecords:
    """Stands in for a RecordsWriter where no file is wanted: the process's own memory."""

    def __init__(self, sizes: Sizes):
        self._sizes = sizes
        self._buffers = {name: torch.empty(sum(of_buffer), dtype=torch.uint8) for name, of_buffer in sizes.items()}

    def matrix(self, name: str, index: int) -> torch.Tensor:
        return self._buffers[name].narrow(0, sum(self._sizes[name][:index]), self._sizes[name][index])

    def filled(self, name: str, index: int) -> None:
        pass

    def publish(self) -> dict[str, torch.Tensor]:
        return self._buffers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
