"""Tells the operator what online pruning really drops: a log line, and counters for Prometheus.

The layers of a model count together on their device while they run, and the first of them copies what they counted to
the host; a thread reads that now and then, so that serving never waits.
vLLM has no way for a quantization method to add metrics of its own, but it serves those that any of its processes
writes in prometheus_client's multi-process mode: with PROMETHEUS_MULTIPROC_DIR set to an empty directory, `/metrics`
has `mcmoe_expert_activations_total` and `mcmoe_pruned_expert_activations_total`.
"""

import os
import threading
import time
import weakref

from vllm.logger import init_logger

from vllm_mcmoe.pruning import ActivationCounts

logger = init_logger("vllm.mcmoe")

SECONDS = 10.0  # as often as vLLM reports its throughput


class PruningMonitor:
    """Adds up the counts of the models it watches; one per process. seconds: between two reports."""

    def __init__(self, seconds: float = SECONDS):
        self._models: weakref.WeakSet[ActivationCounts] = weakref.WeakSet()
        self._seconds = seconds
        self._thread: threading.Thread | None = None
        self._reported = (0, 0)
        self._counters = _prometheus_counters()

    def watch(self, model: ActivationCounts) -> None:
        """Count this model in, for as long as somebody holds its counts, and start reporting."""
        self._models.add(model)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mcmoe-pruning-monitor", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(self._seconds)
            self.report()

    def report(self) -> None:
        """Log and export what was seen and dropped since the last report; nothing where nothing ran."""
        counts = [model.host.tolist() for model in list(self._models)]
        seen, dropped = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        new_seen, new_dropped = seen - self._reported[0], dropped - self._reported[1]
        since = "since the last report" if any(self._reported) else "so far, vLLM's warm-up included"
        self._reported = (seen, dropped)
        if new_seen <= 0:  # nothing ran, or an engine went away
            return
        share = 100 * new_dropped / new_seen
        logger.info("Expert pruning: %.1f%% of %d expert activations dropped %s.", share, new_seen, since)
        for counter, increase in zip(self._counters, (new_seen, new_dropped), strict=False):
            counter.inc(max(increase, 0))


def _prometheus_counters() -> tuple:
    """Counters that vLLM's /metrics will show; none without multi-process mode, where it could not see them."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return ()
    from prometheus_client import Counter

    return (
        Counter("mcmoe_expert_activations", "Experts selected by the router, summed over tokens and layers"),
        Counter("mcmoe_pruned_expert_activations", "Those of them that online pruning did not compute"),
    )
