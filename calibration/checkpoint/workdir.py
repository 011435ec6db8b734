"""A directory of finished work beside the output, so that a run that was killed can be continued.

Work on OUT lives in OUT.partial until OUT is complete:

    arguments.json     what the run is of; another run's work is refused
    UNIT.json          one finished unit of work: its document and the checksums of its files
    checkpoint/        becomes OUT, in one rename, when nothing is missing
    untuned/           the checkpoint before norms are tuned, where that is done
    activations/       hidden states and gradients, where they are kept on disk

A unit is finished when its UNIT.json is there, which is written last and atomically. So a process killed at any moment
leaves units that are whole and units that are missing, nothing in between; a unit damaged later is noticed by its
checksums and done again.

    with working_on(out, arguments, log=log) as work:
        if work.load("layer-3") is None:
            ...
            work.save("layer-3", document, [work.checkpoint / "model-00004-of-00033.safetensors"])
        work.publish()
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_mcmoe.calibration.common.files import flush_to_disk, read_sealed, sha256_of, write_sealed
from vllm_mcmoe.calibration.common.progress import Log
from vllm_mcmoe.errors import FormatError, WorkDirectoryError

SUFFIX = ".partial"
ARGUMENTS, LOCK = "arguments.json", "lock"
CHECKPOINT, UNTUNED, ACTIVATIONS = "checkpoint", "untuned", "activations"
COMPLETE = "complete"  # the unit saved when the checkpoint has everything and only lacks its name


class WorkDirectory:
    """See the module's text. Made by working_on.

    path         OUT.partial
    checkpoint   what will be OUT, where that is a directory
    untuned      what it is made from, where it is tuned
    activations  for an ActivationStore on disk
    """

    def __init__(self, out: Path, log: Log):
        self.out = out
        self.path = work_path(out)
        self.checkpoint = self.path / CHECKPOINT
        self.untuned = self.path / UNTUNED
        self.activations = self.path / ACTIVATIONS
        self._log = log

    def load(self, unit: str) -> Any | None:
        """The document of a finished unit; None when it is not finished, or when it or a file of it was changed."""
        path = self._unit_path(unit)
        try:
            content = read_sealed(path)
            for name, digest in content["files"].items():
                if sha256_of(self.path / name) != digest:
                    raise ValueError(name)
        except FileNotFoundError as error:
            if path.exists():
                self._log(f"{error.filename} is gone; what it was part of is done again.")
            return None
        except ValueError:
            self._log(f"{path} or a file of it is damaged; what it is part of is done again.")
            return None
        return content["document"]

    def save(self, unit: str, document: Any, files: Sequence[Path] = ()) -> None:
        """Finish a unit. document: for JSON; files: complete and on the disk, inside the work directory."""
        digests = {str(file.relative_to(self.path)): sha256_of(file) for file in files}
        write_sealed(self._unit_path(unit), {"document": document, "files": digests})

    def publish(self) -> None:
        """Give the checkpoint its name and remove the work directory.

        Raises FormatError when the output directory has been filled meanwhile.
        """
        if self.checkpoint.exists():
            check_output(self.out)
            for path in self.checkpoint.iterdir():
                flush_to_disk(path)
            flush_to_disk(self.checkpoint)
            os.replace(self.checkpoint, self.out)  # replaces an empty directory
            flush_to_disk(self.out.parent)
        self.remove()

    def clear(self) -> None:
        """Forget all work. What says that OUT is complete, and whose work this was, goes last."""
        last = [self._unit_path(COMPLETE), self.path / ARGUMENTS]
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in last and path.name != LOCK:
                path.unlink()
        for path in last:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        self.clear()
        (self.path / LOCK).unlink()
        self.path.rmdir()

    @property
    def has_units(self) -> bool:
        return any(path.name != ARGUMENTS for path in self.path.glob("*.json"))

    @property
    def is_stale(self) -> bool:
        """It says OUT is complete, but somebody has removed OUT since."""
        return self._unit_path(COMPLETE).exists() and not self.checkpoint.exists() and not self.out.exists()

    def _unit_path(self, unit: str) -> Path:
        return self.path / f"{unit}.json"

    def prepare(self) -> None:
        """Remove what a killed process left unfinished in the checkpoint: all but shards is made anew."""
        if self.checkpoint.exists() and not self._unit_path(COMPLETE).exists():
            for path in self.checkpoint.iterdir():
                if path.suffix != ".safetensors":
                    path.unlink()


def work_path(out: Path) -> Path:
    return out.with_name(out.name + SUFFIX)


def check_output(out: Path) -> None:
    """Raises FormatError when the directory exists and has anything in it, unless that is a finished checkpoint whose
    work directory is yet to be removed."""
    if (work_path(out) / f"{COMPLETE}.json").exists() and not (work_path(out) / CHECKPOINT).exists():
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FormatError(f"{out} exists and is not an empty directory; choose another output or remove it first.")


@contextmanager
def working_on(
    out: str | Path, arguments: Mapping[str, Any], *, restart: bool = False, log: Log = lambda message: None
) -> Iterator[WorkDirectory]:
    """The work directory of OUT, with whatever an earlier run of the same arguments has finished there.

    arguments  everything the result depends on, for JSON; differences are named by these keys
    restart    forget earlier work

    After an error or an interrupt finished units stay; a directory without any is removed.

    Raises WorkDirectoryError for work of other arguments or of a running process.
    """
    work = WorkDirectory(Path(os.path.abspath(out)), log)
    work.path.mkdir(parents=True, exist_ok=True)
    with _locked(work.path / LOCK):
        if restart or not work.has_units or work.is_stale:
            work.clear()
        try:
            _check_arguments(work.path / ARGUMENTS, arguments)
            if work.has_units:
                log(f"Continuing the work in {work.path}.")
            work.prepare()
            yield work
        except BaseException as error:
            if not work.path.exists():
                raise
            if not work.has_units:
                work.remove()
            elif not isinstance(error, WorkDirectoryError):
                log(f"What is finished is kept in {work.path}; the same command goes on from there.")
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when the process dies, however it dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkDirectoryError(
                f"{path.parent}: another process is working there; wait for it, or choose another output."
            ) from None
        yield


def _check_arguments(path: Path, arguments: Mapping[str, Any]) -> None:
    """Note the arguments of new work, or compare them with those of the work that is there."""
    arguments = json.loads(json.dumps(arguments))
    try:
        earlier = read_sealed(path)
    except FileNotFoundError:
        write_sealed(path, arguments)
        return
    except ValueError:
        raise WorkDirectoryError(f"{path} is damaged; remove {path.parent} or pass --restart to start over.") from None
    differing = [key for key in {**earlier, **arguments} if earlier.get(key) != arguments.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {earlier.get(key)}, is {arguments.get(key)}" for key in differing)
        raise WorkDirectoryError(
            f"{path.parent} holds the unfinished work of another run: {changes}. Repeat that run to finish it, or "
            f"remove {path.parent} or pass --restart to start over."
        )
