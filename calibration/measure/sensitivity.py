"""How much the model's output distribution depends on each MoE layer's output, token by token.

For token t and a MoE layer's output y_t, g_t = dL/dy_t, where L is the sum over all positions of -log p(label) and the
labels are sampled from the model's own predictions. Then the expectation of (g_t . d)^2 is d^T F d with F the Fisher
information of the model's distribution, and a small change dy of the layer's output costs, to second order,

    KL(before || after) = 1/2 sum_t (g_t . dy_t)^2        (products across tokens have expectation near zero)

One forward sweep keeps every layer's input; one backward sweep recomputes each layer with its graph. So only one
layer's weights and graph are in memory at a time, besides the hidden states: tokens x hidden x 4 bytes per layer, in
memory or on disk. From disk a later run takes up the sweeps where an earlier one was cut off.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from vllm_mcmoe.calibration.common.progress import Log, progress
from vllm_mcmoe.calibration.measure.expert_tokens import MoeInputs, MoeInputsRecorder
from vllm_mcmoe.calibration.model.activations import (
    SCRATCH,
    Activations,
    ActivationStore,
    ArrayWriter,
    Rows,
    Storage,
    fits_in_memory,
)
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer, LayerwiseModel

# Arrays of [tokens, hidden] that exist at once besides one per layer boundary: gradients above and below a layer,
# experts' inputs, gradients at the experts' outputs.
OTHER_ARRAYS = 4

FLOAT_BYTES = 4  # activations are float32

# Elements of the logits computed at once (256 MB; softmax, its sums and the gradient take as much again each).
LOGITS_AT_ONCE = 1 << 26


class LayerWatcher(Protocol):
    """Who measures something else than experts in the same sweep."""

    def wants(self, layer: int) -> bool:
        """Whether it is to see all tokens go through this decoder layer."""

    def watching(self, number: int, layer: DecoderLayer) -> AbstractContextManager[None]:
        """Holds while they do, forwards and backwards."""

    @property
    def wants_outputs(self) -> bool:
        """Whether it is to see the last layer's."""

    def see_outputs(self, hidden: Activations) -> None:
        """hidden: the last layer's output, before any layer is watched."""


@dataclass(frozen=True)
class MoeTrace:
    """One MoE layer while its weights are loaded, seen on all N calibration tokens; all of it but the layer in host
    memory.

    name            the layer's name
    layer           the loaded decoder layer, usable until the next trace is asked for
    inputs          what the experts are called with
    router_probs    float32 [N, experts], the router's scores of all experts: softmax, or sigmoid in some families
    gradients       float32 [N, hidden], g_t above, a tensor or rows on disk; None in a forward-only sweep
    gradient_norms  float32 [N], |g_t|^2; None in a forward-only sweep
    output_peak     largest |value| of the decoder layer's output hidden states, and
    output_median   their median |value|, over a sample of tokens
    """

    name: str
    layer: DecoderLayer
    inputs: MoeInputs
    router_probs: torch.Tensor
    gradients: Rows | None
    gradient_norms: torch.Tensor | None
    output_peak: float
    output_median: float


def activation_bytes(layers: int, tokens: int, hidden: int, with_gradients: bool) -> int:
    """The most that a run keeps at once of float32 [tokens, hidden] arrays."""
    arrays = OTHER_ARRAYS + (layers + 1 if with_gradients else 0)
    return arrays * tokens * hidden * FLOAT_BYTES


def choose_store(
    storage: Storage, model: LayerwiseModel, tokens: int, with_gradients: bool, directory: Path, log: Log
) -> ActivationStore:
    """A store in memory or in the directory; "auto" takes memory if the sweeps' activations fit there."""
    size = activation_bytes(model.num_layers, tokens, model.description.hidden, with_gradients)
    if storage == "memory" or (storage == "auto" and fits_in_memory(size, model.layer_bytes())):
        return ActivationStore()
    log(f"Activations are kept on disk: up to {size / 1e9:.1f} GB in {directory}.")
    return ActivationStore(directory)


class _Recording:
    """Collects, batch by batch, what goes through a layer's experts. tokens: in all batches; device: the layer's."""

    def __init__(self, store: ActivationStore, tokens: int, device: torch.device):
        self._store, self._tokens = store, tokens
        self.inputs = MoeInputsRecorder(store, tokens, device)
        self.router_probs: list[torch.Tensor] = []
        self.gradients: ArrayWriter | None = None
        self.gradient_norms: list[torch.Tensor] = []
        self.peak = 0.0
        self.medians: list[float] = []

    def receive_gradient(self, gradient: torch.Tensor) -> None:
        if self.gradients is None:
            self.gradients = self._store.create(f"{SCRATCH}moe-gradients", self._tokens)
        self.gradients.append(gradient.detach())
        self.gradient_norms.append(gradient.detach().square().sum(-1).cpu())

    def receive_output(self, output: torch.Tensor) -> None:
        magnitude = output.detach().abs()
        self.peak = max(self.peak, float(magnitude.max()))
        self.medians.append(float(magnitude[0].median()))

    def trace(self, name: str, layer: DecoderLayer) -> MoeTrace:
        return MoeTrace(
            name=name,
            layer=layer,
            inputs=self.inputs.finish(),
            router_probs=torch.cat(self.router_probs),
            gradients=None if self.gradients is None else self.gradients.finish().rows,
            gradient_norms=None if self.gradients is None else torch.cat(self.gradient_norms),
            output_peak=self.peak,
            output_median=sum(self.medians) / len(self.medians),
        )


def _run_recorded(layer: DecoderLayer, batch: torch.Tensor, recording: _Recording) -> torch.Tensor:
    """layer(batch), recording; with autograd on, a hook will record the gradient at the experts' output."""
    experts = layer.experts
    compute = type(experts).forward

    def record(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        recording.inputs.record(x, topk_ids, topk_weights)
        output = compute(experts, x, topk_ids, topk_weights)
        if output.requires_grad:
            output.register_hook(recording.receive_gradient)
        return output

    with layer.router_scores(recording.router_probs.append), layer.experts_forward(record):
        output = layer(batch)
    recording.receive_output(output)
    return output


def forward_traces(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    *,
    store: ActivationStore | None = None,
    measured: Collection[str] = (),
    show_progress: bool = True,
) -> Iterator[MoeTrace]:
    """Traces without gradients, first layer first. tokens: int64 [sequences, length].

    store     where activations are kept; memory if not given
    measured  names of layers whose traces are not asked for
    """
    store, count = store or ActivationStore(), tokens.numel()
    missing = [i for i, name in model.description.moe_layers.items() if name not in measured]
    if not missing:
        return
    model.note_layer_arguments(tokens.shape[1])
    # Inputs of the first layer that is missing, or of the nearest below it, may be left from an earlier run.
    start, hidden = missing[0], store.find(_inputs(missing[0]))
    while hidden is None and start > 0:
        start -= 1
        hidden = store.find(_inputs(start))
    if hidden is None:
        hidden = store.collect(_inputs(0), model.embedded_batches(tokens), count)
    for index in progress(range(start, missing[-1] + 1), "Measuring layers", show=show_progress):
        with torch.no_grad(), model.loaded_layer(index) as layer:
            name = model.description.moe_layers.get(index)
            if name is None or name in measured:
                outputs = store.collect(_inputs(index + 1), map(layer, hidden), count)
            else:
                recording = _Recording(store, count, layer.device)
                outputs = store.collect(
                    _inputs(index + 1), (_run_recorded(layer, batch, recording) for batch in hidden), count
                )
                yield recording.trace(name, layer)
                recording = None  # its arrays must not outlive the layer
            store.drop(_inputs(index))
            hidden = outputs


def backward_traces(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    *,
    seed: int = 0,
    store: ActivationStore | None = None,
    measured: Collection[str] = (),
    watcher: LayerWatcher | None = None,
    show_progress: bool = True,
) -> Iterator[MoeTrace]:
    """Traces with gradients, last layer first. tokens: int64 [sequences, length]; seed: of the sampled labels.

    store     where activations are kept; memory if not given
    measured  names of layers whose traces are not asked for
    watcher   sees the layers that it wants, whether or not their traces are asked for
    """
    store = store or ActivationStore()
    moe_layers = model.description.moe_layers
    watched = {index for index in range(model.num_layers) if watcher is not None and watcher.wants(index)}
    needed = watched | {index for index, name in moe_layers.items() if name not in measured}
    outputs_needed = watcher is not None and watcher.wants_outputs
    if not needed and not outputs_needed:
        return
    model.note_layer_arguments(tokens.shape[1])
    end, gradients = (model.num_layers, None) if outputs_needed else _found_gradients(model, store, needed)
    inputs = _layer_inputs(model, tokens, store, end, show_progress)
    if gradients is None:
        if outputs_needed:
            watcher.see_outputs(inputs[-1])
        batches = _output_gradients(model, inputs.pop(), seed)
        gradients = store.collect(_gradients(end), batches, tokens.numel())
    for index in progress(range(end)[::-1], "Measuring layers", show=show_progress):
        with model.loaded_layer(index) as layer:
            name = moe_layers.get(index)
            wanted = name is not None and name not in measured
            recording = _Recording(store, tokens.numel(), layer.device) if wanted else None
            batches = _backward(layer, inputs.pop(), gradients, recording)
            with watcher.watching(index, layer) if index in watched else nullcontext():
                gradients = store.collect(_gradients(index), batches, tokens.numel())
            if recording is not None:
                yield recording.trace(name, layer)
            # Only now are they not needed to do this layer again.
            store.drop(_inputs(index))
            store.drop(_gradients(index + 1))
            recording = batches = None  # their arrays must not outlive the layer


def _inputs(index: int) -> str:
    """Name of the hidden states before a decoder layer."""
    return f"inputs-{index:05d}"


def _gradients(index: int) -> str:
    """Name of the loss gradient at them."""
    return f"gradients-{index:05d}"


def _found_gradients(
    model: LayerwiseModel, store: ActivationStore, needed: Collection[int]
) -> tuple[int, Activations | None]:
    """The lowest layer whose input gradient an earlier run has left, no layer from it on being needed; without one, the
    number of layers."""
    end, found = model.num_layers, None
    for index in range(model.num_layers)[::-1]:
        if index in needed:
            break
        gradients = store.find(_gradients(index))
        if gradients is not None:
            end, found = index, gradients
    return end, found


def _layer_inputs(
    model: LayerwiseModel, tokens: torch.Tensor, store: ActivationStore, end: int, show_progress: bool
) -> list[Activations]:
    """Hidden states before the decoder layers below `end`, and after the last if that is all of them."""
    boundaries = range(end + 1 if end == model.num_layers else end)
    found = [store.find(_inputs(index)) for index in boundaries]
    inputs: list[Activations] = []
    for index in progress(boundaries, "Running the model", show=show_progress and None in found):
        if found[index] is not None:
            inputs.append(found[index])
        elif index == 0:
            inputs.append(store.collect(_inputs(0), model.embedded_batches(tokens), tokens.numel()))
        else:
            with torch.no_grad(), model.loaded_layer(index - 1) as layer:
                inputs.append(store.collect(_inputs(index), map(layer, inputs[-1]), tokens.numel()))
    return inputs


def _backward(
    layer: DecoderLayer, inputs: Activations, gradients: Activations, recording: _Recording | None
) -> Iterator[torch.Tensor]:
    """Loss gradient at a layer's input from the one at its output, batch by batch."""
    for batch, gradient in zip(inputs, gradients, strict=True):
        batch = batch.detach().requires_grad_()
        with torch.enable_grad():
            output = layer(batch) if recording is None else _run_recorded(layer, batch, recording)
        output.backward(gradient.to(layer.device))
        yield batch.grad


def kl_divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Sum over all positions of token_kl, nats."""
    return float(token_kl(expected, found).double().sum())


def token_kl(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) at every position, nats. Both are log-probabilities [..., vocabulary] -> [...]."""
    return (expected.exp() * (expected - found)).sum(-1)


def sample_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token per row, from softmax(logits). [n, vocabulary] -> int64 [n].

    By inverting the distribution function: torch.multinomial draws a random number per vocabulary entry and took ten
    times as long. The random numbers are drawn on the CPU, the same ones for every device.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn).squeeze(1)


def _output_gradients(
    model: LayerwiseModel, hidden: Activations | list[torch.Tensor], seed: int
) -> Iterator[torch.Tensor]:
    """Gradient of the sampled loss at the last layer's output, batch by batch."""
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, LOGITS_AT_ONCE // model.description.config.vocab_size)
    for batch in hidden:
        parts = []
        for rows in batch.flatten(0, -2).split(at_once):
            rows = rows.detach().requires_grad_()
            with torch.enable_grad():
                logits = model.logits(rows)
                labels = sample_labels(logits.detach(), generator)
                torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            parts.append(rows.grad)
        yield torch.cat(parts).view(batch.shape)
    model.release_head()
