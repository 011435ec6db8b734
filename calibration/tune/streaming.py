"""Gradient of the KL divergence between a quantised model and its original, for tensors of all layers at once.

One forward sweep keeps every layer's input; one backward sweep recomputes each layer with its graph. So only one
layer's weights and graph are in memory at a time, besides the hidden states of the tokens it is asked for.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vllm_mcmoe.calibration.measure.sensitivity import LOGITS_AT_ONCE, token_kl
from vllm_mcmoe.calibration.model.activations import SCRATCH, Activations, ActivationStore
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer, LayerwiseModel
from vllm_mcmoe.calibration.tune.tunables import Tunable


def final_states(model: LayerwiseModel, tokens: torch.Tensor, store: ActivationStore, name: str) -> Activations:
    """float32 [tokens, hidden], what the output head is given, kept in the store under that name. tokens: int64
    [sequences, length]."""
    model.reload_final_norm()
    model.note_layer_arguments(tokens.shape[1])
    hidden = store.collect(_inputs(0), model.embedded_batches(tokens), tokens.numel())
    with torch.no_grad():
        for index in range(model.num_layers):
            last = index == model.num_layers - 1
            with model.loaded_layer(index) as layer:
                outputs = map(layer, hidden)
                if last:
                    hidden = store.collect(name, map(model.head_inputs, outputs), tokens.numel())
                else:
                    hidden = store.collect(_inputs(index + 1), outputs, tokens.numel())
            store.drop(_inputs(index))
    return hidden


def mean_kl(
    model: LayerwiseModel,
    original: LayerwiseModel,
    tokens: torch.Tensor,
    expected: Iterator[torch.Tensor],
    store: ActivationStore,
) -> float:
    """KL(original || model), nats per token. tokens: int64 [sequences, length]; expected: the original's final states
    of every sequence, float32 [length, hidden]."""
    name, total = f"{SCRATCH}final", 0.0
    with torch.no_grad():
        for batch in final_states(model, tokens, store, name):
            for rows in batch:
                for found, wanted in _paired(model, rows, next(expected)):
                    total += float(_kl(model, original, found, wanted).double().sum())
    store.drop(name)
    _release_heads(model, original)
    return total / tokens.numel()


def kl_gradients(
    model: LayerwiseModel,
    original: LayerwiseModel,
    tokens: torch.Tensor,
    expected: Iterator[torch.Tensor],
    tunables: Mapping[str, Tunable],
    store: ActivationStore,
) -> tuple[float, dict[str, torch.Tensor]]:
    """mean_kl, and its gradient: name -> float32 in host memory, without what nothing depends on.

    model   its source are TunedWeights, at whose values the gradient is taken, as if they were not rounded
    """
    model.reload_final_norm()
    model.note_layer_arguments(tokens.shape[1])
    count = tokens.numel()
    inputs = [store.collect(_inputs(0), model.embedded_batches(tokens), count)]
    with torch.no_grad():
        for index in range(model.num_layers):
            with model.loaded_layer(index) as layer:
                inputs.append(store.collect(_inputs(index + 1), map(layer, inputs[-1]), count))
    kl: list[float] = []
    found: dict[str, torch.Tensor] = {}
    batches = _output_gradients(model, original, _of_layer(tunables, None), inputs.pop(), expected, found, kl)
    gradients = store.collect(_gradients(model.num_layers), batches, count)
    store.drop(_inputs(model.num_layers))
    for index in range(model.num_layers)[::-1]:
        with model.loaded_layer(index) as layer:
            batches = _backward(layer, _of_layer(tunables, index), inputs.pop(), gradients, found)
            gradients = store.collect(_gradients(index), batches, count)
        store.drop(_inputs(index))
        store.drop(_gradients(index + 1))
    store.drop(_gradients(0))
    for gradient in found.values():
        gradient /= count
    return sum(kl) / count, found


def _of_layer(tunables: Mapping[str, Tunable], index: int | None) -> dict[str, Tunable]:
    return {name: tunable for name, tunable in tunables.items() if tunable.layer == index}


@contextmanager
def _with_gradients(
    module: nn.Module, tunables: Mapping[str, Tunable], found: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Within the block the module's tunables have gradients, whose sums are in `found` after it."""
    tuned = {name: module.get_parameter(tunable.parameter) for name, tunable in tunables.items()}
    for tensor in tuned.values():
        tensor.requires_grad_(True)
    yield
    for name, tensor in tuned.items():
        if tensor.grad is not None:
            found[name] = tensor.grad.cpu()
        tensor.grad = None
        tensor.requires_grad_(False)


def _output_gradients(
    model: LayerwiseModel,
    original: LayerwiseModel,
    tunables: Mapping[str, Tunable],
    hidden: Activations,
    expected: Iterator[torch.Tensor],
    found: dict[str, torch.Tensor],
    kl: list[float],
) -> Iterator[torch.Tensor]:
    """Gradient of the summed KL at the last layer's output, batch by batch; the sums are added to `kl`. At the end
    those of the final norm's tunables are in `found`."""
    with _with_gradients(model.final_norm, tunables, found):
        for batch in hidden:
            parts = []
            for rows in batch:
                for states, wanted in _paired(model, rows, next(expected)):
                    states = states.detach().requires_grad_()
                    with torch.enable_grad():
                        loss = _kl(model, original, model.head_inputs(states), wanted).sum()
                    loss.backward()
                    kl.append(float(loss.detach()))
                    parts.append(states.grad)
            yield torch.cat(parts).view(batch.shape)
    _release_heads(model, original)


def _backward(
    layer: DecoderLayer,
    tunables: Mapping[str, Tunable],
    inputs: Activations,
    gradients: Activations,
    found: dict[str, torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Gradient at a layer's input from the one at its output, batch by batch; at the end those of its tunables, summed
    over all batches, are in `found`."""
    with _with_gradients(layer.module, tunables, found):
        for batch, gradient in zip(inputs, gradients, strict=True):
            batch = batch.detach().to(layer.device).requires_grad_()
            with torch.enable_grad():
                output = layer(batch)
            output.backward(gradient.to(layer.device))
            yield batch.grad


def _paired(
    model: LayerwiseModel, rows: torch.Tensor, expected: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of one sequence, few enough for their logits to be in memory."""
    at_once = max(1, LOGITS_AT_ONCE // model.description.config.vocab_size)
    return zip(rows.split(at_once), expected.split(at_once), strict=True)


def _kl(model: LayerwiseModel, original: LayerwiseModel, found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """token_kl of final states [n, hidden], each under its own model's head -> [n]."""
    with torch.no_grad():
        wanted = original.head_logits(expected).log_softmax(-1)
    return token_kl(wanted, model.head_logits(found).log_softmax(-1))


def _release_heads(*models: LayerwiseModel) -> None:
    for model in models:
        model.release_head()


def _inputs(index: int) -> str:
    return f"{SCRATCH}tuning-inputs-{index:05d}"


def _gradients(index: int) -> str:
    return f"{SCRATCH}tuning-gradients-{index:05d}"
