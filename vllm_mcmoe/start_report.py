"""Tells the operator what serves an mcmoe checkpoint: a line of log per engine, and a gauge for Prometheus.

The gauge, `mcmoe_engine_info`, is 1 and has the same facts as labels. As with the counters of pruning_monitor.py,
vLLM's `/metrics` shows it where PROMETHEUS_MULTIPROC_DIR is set.
"""

import functools
import os
from collections import Counter
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.logger import init_logger

import vllm_mcmoe
from vllm_mcmoe.checkpoint import CheckpointConfig, describe_kinds
from vllm_mcmoe.graph_cache import choices

logger = init_logger("vllm.mcmoe")

LABELS = (
    "version",
    "expert_bits",
    "expert_widths",
    "expert_codes",
    "linear_widths",
    "backend",
    "instruction_set",
    "linears",
    "pruning",
)


@dataclass(frozen=True)
class StartReport:
    """pruning: the fraction of expert activations to drop, None where the checkpoint has no rule."""

    checkpoint: CheckpointConfig
    pruning: float | None

    def tell(self, config: VllmConfig, backend: str, device: torch.device) -> None:
        """To be called in every rank once its experts are loaded; the engine's first rank logs."""
        facts = self._facts(config, backend, device)
        if is_global_first_rank():
            logger.info("%s", self._line(facts))
        gauge = _gauge()
        if gauge is not None:
            gauge.labels(**facts).set(1)

    def _facts(self, config: VllmConfig, backend: str, device: torch.device) -> dict[str, str]:
        average = self.checkpoint.average_bits.get("experts")
        return {
            "version": vllm_mcmoe.__version__,
            "expert_bits": "unknown" if average is None else f"{average:.2f}",
            "expert_widths": _expert_widths(self.checkpoint),
            "expert_codes": describe_kinds(self.checkpoint.codes),
            "linear_widths": _linear_widths(self.checkpoint),
            "backend": backend,
            "instruction_set": _instruction_set(backend, device),
            "linears": "+".join(choices(config, "linears")) or "vllm",
            "pruning": self._pruning(),
        }

    def _pruning(self) -> str:
        if self.checkpoint.pruning is None:
            return "no rule"
        return f"{self.checkpoint.pruning.method} {100 * self.pruning:g}%" if self.pruning else "off"

    def _line(self, facts: dict[str, str]) -> str:
        return (
            f"vllm-mcmoe {facts['version']}: {len(self.checkpoint.experts)} MoE layers, {facts['expert_bits']} bits "
            f"per expert weight (widths {facts['expert_widths']}; codes {facts['expert_codes']}), {facts['backend']} "
            f"kernels, {facts['instruction_set']}; other linears of {facts['linear_widths']} bits by "
            f"{facts['linears']}; pruning of expert activations: {facts['pruning']}."
        )


def _expert_widths(checkpoint: CheckpointConfig) -> str:
    """ "2: 60%, 3: 40%", of the matrices."""
    counts = Counter(code.bits for code in checkpoint.codes)
    return ", ".join(f"{width}: {count / counts.total():.0%}" for width, count in sorted(counts.items()))


def _linear_widths(checkpoint: CheckpointConfig) -> str:
    """ "4", or "4, 8" where there are several."""
    groups = (checkpoint.linear or {}).get("config_groups", {}).values()
    return ", ".join(map(str, sorted({group["weights"]["num_bits"] for group in groups}))) or "16"


def _instruction_set(backend: str, device: torch.device) -> str:
    """What the kernels of a backend are compiled for on this device."""
    if backend == "cpu":
        from vllm_mcmoe.kernels.cpu import select_isa

        return select_isa()
    if backend == "triton":
        from vllm_mcmoe.kernels.triton.tiles import describe_device

        return describe_device(device).architecture
    return "torch"


@functools.cache
def _gauge():
    """This process's, or None without multi-process mode, where vLLM could not see it."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return None
    from prometheus_client import Gauge

    text = "1; the labels say what the plugin serves, and by what"
    return Gauge("mcmoe_engine_info", text, LABELS, multiprocess_mode="max")  # of all ranks, which say the same
