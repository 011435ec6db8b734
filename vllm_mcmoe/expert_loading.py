"""How the experts of a model get ready in this process: mapped from the start cache, or repacked; one line of log."""

import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_mcmoe.expert_weights import LayerWeights
from vllm_mcmoe.kernels import experts_class
from vllm_mcmoe.kernels.packing import Code
from vllm_mcmoe.memory import release_freed_memory
from vllm_mcmoe.pruning import ActivationCounts
from vllm_mcmoe.start_cache import CACHE_VARIABLE, StartCache, cache_root

logger = init_logger("vllm.mcmoe")

CACHED_LOAD_FORMATS = ("auto", "hf", "safetensors")  # those that read the checkpoint's own files
GB = 1e9
WORTH_REPORTING = 1.0  # second; kernels that Triton's cache has take less


class ExpertLoading:
    """The MoE layers of one model. vLLM builds all of them, loads tensors, then finishes one layer after the other.

    A layer that is not cached is repacked as soon as its last tensor has been loaded, so that the checkpoint's layout
    of the whole model is never in memory at once.
    """

    def __init__(self, config: VllmConfig, backend: str):
        self.config = config
        self.backend = backend
        self.cache, self.no_cache = _open_cache(config, backend)
        self._experts: dict[str, nn.Module] = {}  # of the layers that are ready and not finished
        self._activation_counts: ActivationCounts | None = None
        self._begun = self._finished = 0
        self._mapped = self._written = self._repacked = 0
        self._seconds = 0.0
        self._bytes = 0

    @property
    def complete(self) -> bool:
        return 0 < self._begun == self._finished

    def begin(self, weights: LayerWeights) -> None:
        """Look into the cache; where the layer is not there, let `weights` keep what it will be offered."""
        self._begun += 1
        with self._timed():
            experts = None if self.cache is None else self.cache.find(weights)
        if experts is not None:
            self._mapped += 1
            self._experts[weights.layer_name] = experts
        elif self.config.load_config.load_format == "dummy":
            weights.allocate()  # vLLM fills parameters without calling their loaders
        else:
            weights.on_complete = lambda: self._repack(weights)

    def finish(self, weights: LayerWeights) -> nn.Module:
        """The layer's experts, ready to run, when all its tensors have been loaded. The last layer reports."""
        if weights.layer_name not in self._experts:
            self._repack(weights)
        experts = self._experts.pop(weights.layer_name)
        if weights.gate_up_bias is not None:
            experts.set_biases(weights.gate_up_bias, weights.down_bias)
        self._seconds += weights.loading_seconds
        self._bytes += sum(buffer.nbytes for buffer in experts.buffers())
        self._finished += 1
        if self.complete:
            self._report()
        return experts

    def compile_kernels(
        self,
        experts: nn.Module,
        codes: Collection[Code],
        top_k: int,
        dtype: torch.dtype,
        expert_map: torch.Tensor | None,
    ) -> None:
        """What a request would otherwise wait for; nothing on CPUs, whose kernels are compiled as experts are packed.

        codes: of all layers' experts. dtype: of the hidden states. The layers of a model share their kernels, so the
        first one takes the time.
        """
        if self.backend != "triton":
            return
        begin = time.perf_counter()
        experts.compile_kernels(codes=codes, top_k=top_k, dtype=dtype, expert_map=expert_map)
        seconds = time.perf_counter() - begin
        if seconds > WORTH_REPORTING:
            found = ", ".join(map(str, sorted(codes)))
            logger.info("Kernels for experts of %s took %.1f s to compile; Triton keeps them.", found, seconds)

    def activation_counts(self, device: torch.device) -> ActivationCounts:
        """What all pruned layers of this model count together; they are on one device."""
        if self._activation_counts is None:
            self._activation_counts = ActivationCounts(device)
        return self._activation_counts

    def _repack(self, weights: LayerWeights) -> None:
        with self._timed():
            experts = None if self.cache is None else self.cache.write(weights)
            if experts is not None:
                self._written += 1
            else:
                self._repacked += 1
                experts = experts_class(self.backend).prepare(
                    weights.gate_up.matrices(),
                    weights.down.matrices(),
                    hidden_size=weights.hidden_size,
                    intermediate_size=weights.intermediate_size,
                    gate_up_codes=weights.gate_up.codes,
                    down_codes=weights.down.codes,
                    function=weights.function,
                    stored_zeros=weights.stored_zeros,
                    device=weights.device,
                )
            weights.release()
            release_freed_memory()
        self._experts[weights.layer_name] = experts

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def _report(self) -> None:
        done = []
        if self._mapped:
            done.append(f"{self._mapped} mapped")
        if self._written:
            done.append(f"{self._written} repacked and written")
        if self._repacked:
            why = self.cache.problem if self.cache is not None else self.no_cache
            done.append(f"{self._repacked} repacked and not cached ({why})")
        logger.info(
            "Experts of %d MoE layers, %.2f GB, took %.1f s: %s.%s",
            self._begun,
            self._bytes / GB,
            self._seconds,
            ", ".join(done),
            "" if self.cache is None else f" Cache: {self.cache.root}; {CACHE_VARIABLE}=off switches it off.",
        )


_current: ExpertLoading | None = None


def expert_loading(config: VllmConfig, backend: str) -> ExpertLoading:
    """Of the model that is being built under this config; a process may load several, one after the other."""
    global _current
    if _current is None or _current.config is not config or _current.complete:
        _current = ExpertLoading(config, backend)
    return _current


def _open_cache(config: VllmConfig, backend: str) -> tuple[StartCache | None, str]:
    """The cache, or None and why there is none."""
    if backend != "cpu":
        return None, f"the {backend} backend has no start cache"
    load_format = config.load_config.load_format
    if load_format not in CACHED_LOAD_FORMATS:
        return None, f"--load-format {load_format}"
    speculative = config.speculative_config
    if speculative is not None and speculative.draft_model_config.model != config.model_config.model:
        return None, "a draft model is loaded under the same config"
    if not hasattr(os, "posix_fallocate"):
        return None, "this operating system cannot reserve disk space"
    root = cache_root()
    if root is None:
        return None, f"{CACHE_VARIABLE} is off"
    model, download_dir = config.model_config, config.load_config.download_dir
    return StartCache(root, lambda: checkpoint_directory(model.model, model.revision, download_dir)), ""


def checkpoint_directory(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Where vLLM's loader reads this model from, None where it has not been downloaded yet."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (OSError, ValueError):
        return None
