"""Writing a checkpoint directory: shard by shard, and all or nothing.

Tensors go to a temporary directory beside the target, which gets its name only when everything is written; a run that
fails or is interrupted leaves nothing behind.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_mcmoe.calibration.tensors import INDEX_FILE
from vllm_mcmoe.checkpoint import QWEIGHT, SCALES, ZEROS
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import PackedMatrix

SHARD_BYTES = 4 << 30  # about what transformers writes; vLLM loads shards one after another

# Weights in any format, and what other tools derive from them: not copied from the original directory.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
NOT_COPIED = ("config.json", "README.md", INDEX_FILE, "pytorch_model.bin.index.json")


def check_output(out_dir: Path) -> None:
    """Raises FormatError when the directory exists and has anything in it."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FormatError(f"{out_dir} exists and is not an empty directory; choose another output or remove it first.")


class CheckpointWriter:
    """Collects tensors into shards of SHARD_BYTES; finish() writes the index. Use through writing_checkpoint.

    nbytes   tensor name -> bytes, of everything added
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES):
        self.directory = directory
        self.nbytes: dict[str, int] = {}
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Raises FormatError for a name added twice."""
        if name in self.nbytes:
            raise FormatError(f"tensor {name} would be written twice.")
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.nbytes[name] = tensor.nbytes

    def add_matrix(self, name: str, matrix: PackedMatrix) -> None:
        """Write one quantised matrix of an expert. Raises FormatError for scales fp16 cannot hold precisely."""
        smallest = torch.finfo(torch.float16).smallest_normal
        below = int((matrix.scales < smallest).sum())
        if below or not torch.isfinite(matrix.scales).all():
            raise FormatError(
                f"{name}.{SCALES}: {below} of {matrix.scales.numel()} scales lie below fp16's smallest normal "
                f"{smallest:.1e}, or some are not finite; such weights would lose precision unnoticed."
            )
        self.add(f"{name}.{QWEIGHT}", matrix.qweight)
        self.add(f"{name}.{SCALES}", matrix.scales)
        if matrix.zeros is not None:
            self.add(f"{name}.{ZEROS}", matrix.zeros)

    def add_json(self, name: str, document: Any) -> None:
        self.add_text(name, json.dumps(document, indent=2) + "\n")

    def add_text(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text, encoding="utf-8")

    def copy_side_files(self, model_dir: Path) -> None:
        """Tokenizer, generation settings, chat template and the like: every plain file that is no weight."""
        for path in sorted(model_dir.iterdir()):
            if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in NOT_COPIED:
                shutil.copy2(path, self.directory / path.name)

    def _flush(self) -> None:
        # The final name says how many shards there are, which is not known yet.
        save_file(self._pending, self._shard_path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _shard_path(self, number: int) -> Path:
        return self.directory / f"shard-{number}.safetensors"

    def finish(self) -> None:
        """Write what is pending, give the shards their names and write the index."""
        if self._pending:
            self._flush()
        weight_map = {}
        for number, names in enumerate(self._shards):
            file_name = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._shard_path(number).rename(self.directory / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {"metadata": {"total_size": sum(self.nbytes.values())}, "weight_map": weight_map}
        self.add_json(INDEX_FILE, index)


@contextmanager
def writing_checkpoint(out_dir: Path, shard_bytes: int = SHARD_BYTES) -> Iterator[CheckpointWriter]:
    """A writer whose directory becomes out_dir at the end of the block, or is removed if the block raises.

    Raises FormatError when out_dir has anything in it, before and after the block.
    """
    out_dir = Path(out_dir)
    check_output(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's directories are private; a model directory is not
        writer = CheckpointWriter(temporary, shard_bytes)
        yield writer
        writer.finish()
        check_output(out_dir)
        temporary.replace(out_dir)  # replaces an empty directory
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
