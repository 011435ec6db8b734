"""Files that are either whole or not there, and errors that say which file it was."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_HASHED_AT_ONCE = 1 << 20


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing inside the block become OSError with the file's name, which write() and safetensors leave
    out: a full disk is to say where."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    except SafetensorError as error:
        raise OSError(None, f"cannot be written: {error}", str(path)) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary) makes the content; the file gets its name when it is on the disk. A failure leaves nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path):
            write(temporary)
            temporary.chmod(0o666 & ~_umask())  # safetensors and tempfile make files that nobody else may read
            flush_to_disk(temporary)
            os.replace(temporary, path)
            flush_to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """What this process leaves out of the permissions of new files; it can only be asked by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, document: Any) -> None:
    """Atomically; numbers come back from json.loads as they were."""
    text = json.dumps(document, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_sealed(path: Path, document: Any) -> None:
    """write_json of a document that read_sealed will know from a changed one."""
    write_json(path, {"document": document, "sha256": _digest(document)})


def read_sealed(path: Path) -> Any:
    """The document of write_sealed. Raises FileNotFoundError, and ValueError for a file that was changed since."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        intact = _digest(content["document"]) == content["sha256"]
    except (KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} was changed since it was written")
    return content["document"]


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
