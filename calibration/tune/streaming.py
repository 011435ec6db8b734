"""Gradient of the KL divergence between a quantised model and its original, for tensors of all layers at once.

One forward sweep keeps every layer's input; one backward sweep recomputes each layer with its graph. So only one
layer's weights and graph are in memory at a time, besides the hidden states of the tokens it is asked for.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch

from vllm_mcmoe.calibration.measure.sensitivity import LOGITS_AT_ONCE, token_kl
from vllm_mcmoe.calibration.model.activations import SCRATCH, Activations, ActivationStore
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer, ExpertsForward, LayerwiseModel
from vllm_mcmoe.calibration.tune.tunables import PARTS, Tunable


def final_states(model: LayerwiseModel, tokens: torch.Tensor, store: ActivationStore, name: str) -> Activations:
    """float32 [tokens, hidden], the last layer's output, kept in the store under that name. tokens: int64
    [sequences, length]."""
    model.note_layer_arguments(tokens.shape[1])
    hidden = store.collect(_inputs(0), model.embedded_batches(tokens), tokens.numel())
    with torch.no_grad():
        for index in range(model.num_layers):
            last = index == model.num_layers - 1
            with model.loaded_layer(index) as layer:
                target = name if last else _inputs(index + 1)
                hidden = store.collect(target, map(layer, hidden), tokens.numel())
            store.drop(_inputs(index))
    return hidden


def mean_kl(
    model: LayerwiseModel, tokens: torch.Tensor, expected: Iterator[torch.Tensor], store: ActivationStore
) -> float:
    """KL(original || model), nats per token. tokens: int64 [sequences, length]; expected: the original's final states
    of every sequence, float32 [length, hidden]."""
    name, total = f"{SCRATCH}final", 0.0
    with torch.no_grad():
        for batch in final_states(model, tokens, store, name):
            for rows in batch:
                for found, wanted in _paired(model, rows, next(expected)):
                    total += float(_kl(model, found, wanted).double().sum())
    store.drop(name)
    model.release_head()
    return total / tokens.numel()


def kl_gradients(
    model: LayerwiseModel,
    tokens: torch.Tensor,
    expected: Iterator[torch.Tensor],
    tunables: Mapping[str, Tunable],
    store: ActivationStore,
) -> tuple[float, dict[str, torch.Tensor]]:
    """mean_kl, and its gradient: name -> float32 in host memory, without what nothing depends on.

    model   its source are TunedWeights, at whose values the gradient is taken, as if they were not rounded
    """
    model.note_layer_arguments(tokens.shape[1])
    count = tokens.numel()
    inputs = [store.collect(_inputs(0), model.embedded_batches(tokens), count)]
    with torch.no_grad():
        for index in range(model.num_layers):
            with model.loaded_layer(index) as layer:
                inputs.append(store.collect(_inputs(index + 1), map(layer, inputs[-1]), count))
    kl: list[float] = []
    gradients = store.collect(_gradients(model.num_layers), _output_gradients(model, inputs.pop(), expected, kl), count)
    store.drop(_inputs(model.num_layers))
    found: dict[str, torch.Tensor] = {}
    for index in range(model.num_layers)[::-1]:
        with model.loaded_layer(index) as layer:
            of_layer = {name: tunable for name, tunable in tunables.items() if tunable.layer == index}
            batches = _backward(layer, of_layer, inputs.pop(), gradients, found)
            gradients = store.collect(_gradients(index), batches, count)
        store.drop(_inputs(index))
        store.drop(_gradients(index + 1))
    store.drop(_gradients(0))
    for name, gradient in found.items():
        gradient /= count
        if tunables[name].parameter in PARTS:  # of factors on top of those that the weights have
            gradient /= model.source.values[name]
    return sum(kl) / count, found


def _backward(
    layer: DecoderLayer,
    tunables: Mapping[str, Tunable],
    inputs: Activations,
    gradients: Activations,
    found: dict[str, torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Gradient at a layer's input from the one at its output, batch by batch; at the end those of its tunables, summed
    over all batches, are in `found`."""
    factors = {  # of experts' rows
        tunable.parameter: torch.ones_like(tunable.value, device=layer.device, requires_grad=True)
        for tunable in tunables.values()
        if tunable.parameter in PARTS
    }
    tuned = {}
    for name, tunable in tunables.items():
        of_rows = tunable.parameter in PARTS
        tuned[name] = factors[tunable.parameter] if of_rows else layer.module.get_parameter(tunable.parameter)
    for tensor in tuned.values():
        tensor.requires_grad_(True)
    experts = layer.experts_forward(_with_factors(layer, factors)) if factors else nullcontext()
    with experts:
        for batch, gradient in zip(inputs, gradients, strict=True):
            batch = batch.detach().to(layer.device).requires_grad_()
            with torch.enable_grad():
                output = layer(batch)
            output.backward(gradient.to(layer.device))
            yield batch.grad
    for name, tensor in tuned.items():
        if tensor.grad is not None:
            found[name] = tensor.grad.cpu()
        tensor.grad = None
        tensor.requires_grad_(False)


def _with_factors(layer: DecoderLayer, factors: Mapping[str, torch.Tensor]) -> ExpertsForward:
    """The layer's experts, the rows of whose matrices are multiplied. factors: part -> float32 [experts, rows]."""

    def forward(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number in topk_ids.unique().tolist():
            index, slot = (topk_ids == number).nonzero(as_tuple=True)
            expert = layer.expert(number)
            projected = x[index] @ expert.gate_up.t() * factors["gate_up"][number]
            if expert.gate_up_bias is not None:
                projected = projected + expert.gate_up_bias
            y = expert.activated(projected) @ expert.down.t() * factors["down"][number]
            if expert.down_bias is not None:
                y = y + expert.down_bias
            out.index_add_(0, index, y * topk_weights[index, slot, None])
        return out

    return forward


def _output_gradients(
    model: LayerwiseModel, hidden: Activations, expected: Iterator[torch.Tensor], kl: list[float]
) -> Iterator[torch.Tensor]:
    """Gradient of the summed KL at the last layer's output, batch by batch; the sums are added to `kl`."""
    for batch in hidden:
        parts = []
        for rows in batch:
            for found, wanted in _paired(model, rows, next(expected)):
                found = found.detach().requires_grad_()
                with torch.enable_grad():
                    loss = _kl(model, found, wanted).sum()
                loss.backward()
                kl.append(float(loss.detach()))
                parts.append(found.grad)
        yield torch.cat(parts).view(batch.shape)
    model.release_head()


def _paired(
    model: LayerwiseModel, rows: torch.Tensor, expected: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of one sequence, few enough for their logits to be in memory."""
    at_once = max(1, LOGITS_AT_ONCE // model.description.config.vocab_size)
    return zip(rows.split(at_once), expected.split(at_once), strict=True)


def _kl(model: LayerwiseModel, found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """token_kl of two final states [n, hidden] under the model's norm and head, which are the original's -> [n]."""
    with torch.no_grad():
        wanted = model.logits(expected).log_softmax(-1)
    return token_kl(wanted, model.logits(found).log_softmax(-1))


def _inputs(index: int) -> str:
    return f"{SCRATCH}tuning-inputs-{index:05d}"


def _gradients(index: int) -> str:
    return f"{SCRATCH}tuning-gradients-{index:05d}"
