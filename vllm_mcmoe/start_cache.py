"""Repacked experts on disk: the next start of a checkpoint maps them instead of reading and repacking its tensors.

    $VLLM_MCMOE_CACHE/{checkpoint's folder}-{digest of its path}/{digest of its files}/{layer}-{digest of key}.records

A layer's file is used where its key is this layer's: path of the checkpoint, names, sizes and modification times of its
shards and index, the part of the layer that this rank holds, widths, sizes, versions of format and layout. Nothing else
in config.json enters the records, so a new pruning rule keeps them. `kernels/cpu/records_file.py` has the file's format
and how damage is noticed.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from vllm import envs
from vllm.logger import init_logger

from vllm_mcmoe.checkpoint import FORMAT_VERSION
from vllm_mcmoe.expert_weights import LayerWeights
from vllm_mcmoe.kernels.cpu import (
    LAYOUT_VERSION,
    PARTIAL_SUFFIX,
    CpuExperts,
    RecordsError,
    record_sizes,
    remove_abandoned,
)

logger = init_logger("vllm.mcmoe")

CACHE_VARIABLE = "VLLM_MCMOE_CACHE"
RECORDS_SUFFIX = ".records"
RESERVE_BYTES = 1 << 30  # what the cache leaves free on its disk, for others


def cache_root() -> Path | None:
    """The folder VLLM_MCMOE_CACHE names, `mcmoe` in vLLM's own cache where it is unset, None where it is "off"."""
    setting = os.environ.get(CACHE_VARIABLE)
    if setting == "off":
        return None
    return Path(setting).expanduser() if setting else Path(envs.VLLM_CACHE_ROOT) / "mcmoe"


@dataclass(frozen=True)
class CheckpointFiles:
    """What tells a checkpoint from another, or from itself before it was written again.

    directory  resolved
    files      (name, bytes, modification time in ns) of its index and shards
    """

    directory: Path
    files: tuple[tuple[str, int, int], ...]

    @classmethod
    def find(cls, directory: Path | None) -> Self | None:
        """None where some are missing: of a model on the hub, vLLM downloads them after it has built the layers."""
        if directory is None:
            return None
        names = [SAFE_WEIGHTS_NAME]
        try:
            if (directory / SAFE_WEIGHTS_INDEX_NAME).exists():
                index = json.loads((directory / SAFE_WEIGHTS_INDEX_NAME).read_text())
                names = [SAFE_WEIGHTS_INDEX_NAME, *sorted(set(index["weight_map"].values()))]
            stats = [(name, (directory / name).stat()) for name in names]
        except (OSError, ValueError, KeyError):  # vLLM says what is wrong with the checkpoint
            return None
        return cls(directory.resolve(), tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


class StartCache:
    """One checkpoint's entries during one start of one process.

    problem   why nothing is read or written any more; empty while all is well
    """

    def __init__(self, root: Path, checkpoint_directory: Callable[[], Path | None]):
        """checkpoint_directory: where the checkpoint is, None as long as it is not here."""
        self.root = root
        self.problem = ""
        self._checkpoint_directory = checkpoint_directory
        self._files = CheckpointFiles.find(checkpoint_directory())
        self._bytes_not_found = 0
        self._may_write = False

    def find(self, weights: LayerWeights) -> CpuExperts | None:
        """A layer's experts from the cache, None where it does not have them, or has them damaged."""
        experts = self._map(weights)
        if experts is None:
            sizes = record_sizes(**_sizes(weights), factor=weights.function.factor)
            self._bytes_not_found += sum(map(sum, sizes.values()))
        return experts

    def write(self, weights: LayerWeights) -> CpuExperts | None:
        """Repacks a layer's experts into the cache and maps them from there; None where that is not possible.

        To be called when the layer's tensors have been loaded, and `find` has been called for all layers.
        """
        if not self.problem:
            self._check_unchanged()
        if not self.problem and not self._may_write:
            self._prepare_writing()
        if self.problem:
            return None
        experts = self._map(weights)  # another process may have written it by now
        if experts is not None:
            return experts
        path, key = self._entry(weights)
        matrices = weights.gate_up.matrices(), weights.down.matrices()
        try:
            return CpuExperts.prepare(*matrices, **_sizes(weights), function=weights.function, file=path, key=key)
        except OSError as error:
            self._give_up(f"{path} cannot be written: {error.strerror or error}")
            return None

    def _map(self, weights: LayerWeights) -> CpuExperts | None:
        if self._files is None or self.problem:
            return None
        path, key = self._entry(weights)
        try:
            return CpuExperts.from_file(path, key, **_sizes(weights), function=weights.function)
        except FileNotFoundError:
            return None
        except RecordsError as error:
            logger.warning("%s is not used and will be written again: %s.", path, error)
            with suppress(OSError):  # else it is warned of twice; in a read-only folder it is
                path.unlink()
        except OSError as error:
            self._give_up(f"{path} cannot be read: {error.strerror or error}")
        return None

    def _check_unchanged(self) -> None:
        before, self._files = self._files, CheckpointFiles.find(self._checkpoint_directory())
        if self._files is None:
            self._give_up("the checkpoint's files were not found")
        elif before not in (None, self._files):
            self._give_up(f"{self._files.directory} has changed while it was being loaded")

    def _prepare_writing(self) -> None:
        folder = self._folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder)
            remove_abandoned(folder)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            return self._give_up(f"{folder} cannot be written: {error.strerror or error}")
        if free < self._bytes_not_found + RESERVE_BYTES:
            return self._give_up(
                f"{folder} has {free / 1e9:.1f} GB free; {self._bytes_not_found / 1e9:.1f} GB and a reserve of "
                f"{RESERVE_BYTES / 1e9:.1f} GB are needed"
            )
        self._may_write = True

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        logger.warning(
            "Repacked experts are not cached: %s. Serving goes on without the cache. %s names another folder, or is "
            '"off".',
            problem,
            CACHE_VARIABLE,
        )

    def _folder(self) -> Path:
        """Of this checkpoint as it is now; its siblings are of what it was before, or of another version's layout."""
        directory = self._files.directory
        contents = _digest([self._files.files, FORMAT_VERSION, LAYOUT_VERSION])
        return self.root / f"{directory.name}-{_digest(str(directory))}" / contents

    def _entry(self, weights: LayerWeights) -> tuple[Path, dict[str, Any]]:
        """A layer's file and key."""
        groups = weights.intermediate_groups
        key = {
            "checkpoint": str(self._files.directory),
            "files": self._files.files,
            "layer": weights.layer_name,
            "experts": weights.shard.expert_ids,
            "intermediate_groups": [groups.start, groups.stop],
            **_sizes(weights),
            "format_version": FORMAT_VERSION,
            "layout_version": LAYOUT_VERSION,
        }
        layer = re.sub(r"[^\w.-]", "_", weights.layer_name)[-100:]
        return self._folder() / f"{layer}-{_digest(key)}{RECORDS_SUFFIX}", key


def _sizes(weights: LayerWeights) -> dict[str, Any]:
    return {
        "hidden_size": weights.hidden_size,
        "intermediate_size": weights.intermediate_size,
        "gate_up_codes": weights.gate_up.codes,
        "down_codes": weights.down.codes,
        "stored_zeros": weights.stored_zeros,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _remove_stale(folder: Path) -> None:
    """Delete the entries beside this folder. Servers that have mapped them keep what they mapped."""
    for stale in folder.parent.iterdir():
        if stale == folder or not stale.is_dir():
            continue
        for pattern in (f"*{RECORDS_SUFFIX}", f"*{PARTIAL_SUFFIX}"):
            for file in stale.glob(pattern):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # something else is in there
            stale.rmdir()
        logger.info("Removed %s: repacked experts of an earlier state of the checkpoint.", stale)
