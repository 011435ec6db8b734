"""How much the model's output distribution depends on each MoE layer's output, token by token.

For token t and a MoE layer's output y_t, g_t = dL/dy_t, where L is the sum over all positions of -log p(label) and the
labels are sampled from the model's own predictions. Then the expectation of (g_t . d)^2 is d^T F d with F the Fisher
information of the model's distribution, and a small change dy of the layer's output costs, to second order,

    KL(before || after) = 1/2 sum_t (g_t . dy_t)^2        (products across tokens have expectation near zero)

One forward sweep keeps every layer's input; one backward sweep recomputes each layer with its graph. So only one
layer's weights and graph are in memory at a time, besides the hidden states: tokens x hidden x 4 bytes per layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_mcmoe.calibration.experts import MoeInputs
from vllm_mcmoe.calibration.layerwise import DecoderLayer, LayerwiseModel
from vllm_mcmoe.calibration.progress import progress


@dataclass(frozen=True)
class MoeTrace:
    """One MoE layer while its weights are loaded, seen on all N calibration tokens.

    name            the layer's name
    layer           the loaded decoder layer, usable until the next trace is asked for
    inputs          what the experts are called with
    router_probs    float32 [N, experts], softmax over all experts
    gradients       float32 [N, hidden], g_t above; None in a forward-only sweep
    output_peak     largest |value| of the decoder layer's output hidden states, and
    output_median   their median |value|, over a sample of tokens
    """

    name: str
    layer: DecoderLayer
    inputs: MoeInputs
    router_probs: torch.Tensor
    gradients: torch.Tensor | None
    output_peak: float
    output_median: float


class _Recording:
    """Collects, batch by batch, what goes through a layer's experts."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, ...]] = []
        self.router_probs: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.peak = 0.0
        self.medians: list[float] = []

    def receive_logits(self, logits: torch.Tensor) -> None:
        self.router_probs.append(logits.detach().float().softmax(dim=-1))

    def receive_output(self, output: torch.Tensor) -> None:
        magnitude = output.detach().abs()
        self.peak = max(self.peak, float(magnitude.max()))
        self.medians.append(float(magnitude[0].median()))

    def trace(self, name: str, layer: DecoderLayer) -> MoeTrace:
        inputs = MoeInputs(*(torch.cat(parts) for parts in zip(*self.calls, strict=True)))
        gradients = torch.cat(self.gradients) if self.gradients else None
        median = sum(self.medians) / len(self.medians)
        return MoeTrace(name, layer, inputs, torch.cat(self.router_probs), gradients, self.peak, median)


def _run_recorded(layer: DecoderLayer, batch: torch.Tensor, recording: _Recording) -> torch.Tensor:
    """layer(batch), recording; with autograd on, a hook will record the gradient at the experts' output."""
    experts = layer.module.mlp.experts
    compute = type(experts).forward

    def record(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        recording.calls.append((x.detach(), topk_ids, topk_weights.detach().float()))
        output = compute(experts, x, topk_ids, topk_weights)
        if output.requires_grad:
            output.register_hook(lambda gradient: recording.gradients.append(gradient.detach()))
        return output

    with layer.router_logits(recording.receive_logits), layer.experts_forward(record):
        output = layer(batch)
    recording.receive_output(output)
    return output


def forward_traces(model: LayerwiseModel, tokens: torch.Tensor, *, show_progress: bool = True) -> Iterator[MoeTrace]:
    """Traces without gradients, first layer first. tokens: int64 [sequences, length]."""
    with torch.no_grad():
        hidden = model.embed(tokens)
        for index in progress(range(model.num_layers), "Measuring layers", show=show_progress):
            with model.loaded_layer(index) as layer:
                name = model.description.moe_layers.get(index)
                if name is None:
                    hidden = [layer(batch) for batch in hidden]
                    continue
                recording = _Recording()
                hidden = [_run_recorded(layer, batch, recording) for batch in hidden]
                yield recording.trace(name, layer)


def backward_traces(
    model: LayerwiseModel, tokens: torch.Tensor, *, seed: int = 0, show_progress: bool = True
) -> Iterator[MoeTrace]:
    """Traces with gradients, last layer first. tokens: int64 [sequences, length]; seed: of the sampled labels."""
    layer_inputs = _layer_inputs(model, tokens, show_progress)
    upstream = _output_gradients(model, layer_inputs.pop(), seed)
    for index in progress(range(model.num_layers)[::-1], "Measuring layers", show=show_progress):
        with model.loaded_layer(index) as layer:
            name = model.description.moe_layers.get(index)
            recording = _Recording()
            downstream = []
            for batch, gradient in zip(layer_inputs.pop(), upstream, strict=True):
                batch = batch.detach().requires_grad_()
                with torch.enable_grad():
                    output = layer(batch) if name is None else _run_recorded(layer, batch, recording)
                output.backward(gradient)
                downstream.append(batch.grad)
            upstream = downstream
            if name is not None:
                yield recording.trace(name, layer)


def _layer_inputs(model: LayerwiseModel, tokens: torch.Tensor, show_progress: bool) -> list[list[torch.Tensor]]:
    """Hidden states before every decoder layer and after the last, each in batches."""
    with torch.no_grad():
        inputs = [model.embed(tokens)]
        for index in progress(range(model.num_layers), "Running the model", show=show_progress):
            with model.loaded_layer(index) as layer:
                inputs.append([layer(batch) for batch in inputs[-1]])
    return inputs


def sample_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token per row, from softmax(logits). [n, vocabulary] -> int64 [n].

    By inverting the distribution function: torch.multinomial draws a random number per vocabulary entry and took ten
    times as long.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn).squeeze(1)


def _output_gradients(model: LayerwiseModel, hidden: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Gradient of the sampled loss at the last layer's output, batch by batch."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for batch in hidden:
        batch = batch.detach().requires_grad_()
        with torch.enable_grad():
            logits = model.logits(batch).flatten(0, 1)
            labels = sample_labels(logits.detach(), generator)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        gradients.append(batch.grad)
    return gradients
