"""Evaluation of a 16-bit model or a quantised checkpoint: perplexity, distance to another model, bytes.

    result = evaluate("mixtral-2.5bit", ["wikitext.txt"], against="mixtral")
    result.geometric_mean_perplexity, result.mean_kl, result.average_bits["experts"]

Everything is computed in float32 with dequantised weights, one layer in memory at a time. With activations="int8" the
experts' inputs go through the kernels' activation quantisation, which makes the results those of every kernel up to
float32 rounding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vllm_mcmoe.calibration.common.device import choose_device
from vllm_mcmoe.calibration.common.progress import progress
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import CheckpointWeights, open_weights
from vllm_mcmoe.calibration.evaluate.experts_forward import experts_forward, layer_rules, round_activations
from vllm_mcmoe.calibration.measure.sensitivity import token_kl
from vllm_mcmoe.calibration.model.folder import ModelFolder, find_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import DEFAULT_LENGTH, DEFAULT_SEQUENCES, TokenSequences, load_calibration_data
from vllm_mcmoe.calibration.model.weights import WeightSource
from vllm_mcmoe.errors import PruningError, UnsupportedModelError
from vllm_mcmoe.pruning import LayerPruning, PruningRules, pruned_fraction, resolve_target

Activations = Literal["int8", "float"]

# What llama-perplexity shows of KL, too: the mean says little of the few tokens that a model gets badly wrong.
KL_QUANTILES = {"median": 0.5, "99%": 0.99, "99.9%": 0.999}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured.

    model, against     the directories or names on the hub compared, or what is served where, "NAME at URL"
    activations        "int8" or "float", of the experts; always "float" for a 16-bit model; "served" where a server
                       computes them
    tokens             predicted tokens
    perplexity_by_file file name -> perplexity
    geometric_mean_perplexity   over the files, each counting alike
    token_perplexity   over all tokens together
    mean_kl            KL(against || model), nats per token
    kl_over            None: the whole vocabulary; else what of a served distribution it was computed from, which makes
                       it a lower bound
    kl_quantiles       {"median", "99%", "99.9%"}: of the tokens' KL
    top1_agreement     share of positions where both models' most likely token is the same
    perplexity_ratio   token_perplexity over that of `against`
    perplexity_ratio_error   its standard error, tokens taken as independent, as llama-perplexity does
    expert_bytes, total_bytes   bytes of the tensors on disk
    average_bits       {"experts", "model"}: bits per weight on disk, scales and zeros included
    pruned             fraction of expert activations that online pruning dropped

    Those that compare (mean_kl to perplexity_ratio_error) are None without against; bytes, bits and pruned are None for
    a model that a server has.
    """

    model: Path | str
    against: Path | str | None
    activations: Literal[Activations, "served"]
    tokens: int
    perplexity_by_file: dict[str, float]
    geometric_mean_perplexity: float
    token_perplexity: float
    mean_kl: float | None = None
    kl_over: str | None = None
    kl_quantiles: dict[str, float] | None = None
    top1_agreement: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    expert_bytes: int | None = None
    total_bytes: int | None = None
    average_bits: dict[str, float] | None = None
    pruned: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "model": str(self.model), "against": self.against and str(self.against)}

    def distance(self, name: str | Path) -> str:
        """For people: how far it is from `against`, which there must be and which is called so."""
        quantiles = ", ".join(f"{share} {value:.4f}" for share, value in self.kl_quantiles.items())
        over = "" if self.kl_over is None else f" over {self.kl_over} (a lower bound)"
        return (
            f"KL to {name}{over} {self.mean_kl:.4f} nats per token ({quantiles}), same first choice on "
            f"{self.top1_agreement:.1%} of the tokens, perplexity {self.perplexity_ratio:.4f} ± "
            f"{self.perplexity_ratio_error:.4f} times as high."
        )


def evaluate(
    model: str | Path | ModelFolder,
    data: Sequence[str | Path],
    *,
    against: str | Path | ModelFolder | None = None,
    activations: Activations = "int8",
    pruning: str | float | Mapping[str, LayerPruning] = "on",
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    device: str | torch.device = "auto",
    log: Callable[[str], None] = lambda message: None,
    show_progress: bool = True,
) -> Evaluation:
    """Evaluate a model on text.

    model        a directory or a name on the hub, as find_model takes it
    data         as load_sequences takes it; one file is one domain
    against      another model or checkpoint of the same vocabulary, the reference of KL and top-1 agreement
    activations  of the quantised experts, here and in `against`
    pruning      of model, never of `against`: "on" as it would be served, "off", a fraction of the expert activations
                 by the checkpoint's own rule, or a rule for every MoE layer by its name, which is moved to the device
    device       what computes, as choose_device takes it; hidden states of the text stay in host memory

    Raises DeviceError, HubError, UnsupportedModelError, FormatError, PruningError or DataError before any long work.
    """
    device = choose_device(device, log)
    weights = open_weights(find_model(model, log=log))
    pruners = pruners_of(weights, pruning)
    reference = None if against is None else open_weights(find_model(against, log=log))
    check_vocabularies({str(each.model.folder): each.model.config.vocab_size for each in (weights, reference) if each})
    text = load_calibration_data(weights.model, data, sequences, length, log)
    subject = FinalStates(weights, device, text.tokens, activations, show_progress, pruners)
    base = None if reference is None else FinalStates(reference, device, text.tokens, activations, show_progress)
    return _evaluation(subject, base, text, activations)


def evaluate_pruning(
    checkpoint: str | Path,
    data: Sequence[str | Path],
    targets: Sequence[float],
    *,
    activations: Activations = "int8",
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    device: str | torch.device = "auto",
    log: Callable[[str], None] = lambda message: None,
    show_progress: bool = True,
) -> list[Evaluation]:
    """evaluate(checkpoint, data, against=checkpoint, pruning=target) for every target, running the unpruned model once.

    Raises as evaluate does.
    """
    device = choose_device(device, log)
    weights = open_weights(checkpoint)
    pruners = {target: pruners_of(weights, target) for target in targets}
    text = load_calibration_data(weights.model, data, sequences, length, log)
    options = (weights, device, text.tokens, activations, show_progress)
    unpruned = FinalStates(*options)
    evaluations = []
    for target in targets:
        subject = FinalStates(*options, pruners[target]) if target else unpruned
        evaluations.append(_evaluation(subject, unpruned, text, activations))
    return evaluations


def _evaluation(
    subject: "FinalStates", base: "FinalStates | None", text: TokenSequences, activations: Activations
) -> Evaluation:
    losses, distance = _compare(subject, base, text.tokens)
    return Evaluation(
        model=subject.weights.model.folder.given,
        against=None if base is None else base.weights.model.folder.given,
        **perplexities(losses, text),
        **about_directory(subject.weights, activations, subject.pruners),
        **distance,
    )


def check_vocabularies(sizes: Mapping[str, int]) -> None:
    """sizes: of the vocabularies of models that are to be compared. Raises UnsupportedModelError unless all are one."""
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} has a vocabulary of {size} tokens" for name, size in sizes.items())
        raise UnsupportedModelError(f"{found}; only models of one vocabulary can be compared.")


def perplexities(losses: torch.Tensor, text: TokenSequences) -> dict[str, Any]:
    """What Evaluation says of losses alone. losses: float32 [sequences, length - 1], of the next tokens."""
    by_file = _mean_loss_by_file(losses, text)
    return {
        "tokens": losses.numel(),
        "perplexity_by_file": {name: _exp_or_inf(loss) for name, loss in by_file.items()},
        "geometric_mean_perplexity": _exp_or_inf(sum(by_file.values()) / len(by_file)),
        "token_perplexity": _exp_or_inf(float(losses.mean())),
    }


def about_directory(
    weights: WeightSource, activations: Activations, pruners: Mapping[str, LayerPruning]
) -> dict[str, Any]:
    """What Evaluation says of a model that is a directory, when it has run."""
    expert_bytes, total_bytes, average_bits = _sizes_of(weights)
    return {
        "activations": activations if isinstance(weights, CheckpointWeights) else "float",
        "expert_bytes": expert_bytes,
        "total_bytes": total_bytes,
        "average_bits": average_bits,
        "pruned": pruned_fraction(pruners.values()),
    }


def pruners_of(weights: WeightSource, request: str | float | Mapping[str, LayerPruning]) -> Mapping[str, LayerPruning]:
    """The rule of every MoE layer; empty for a model that has none and need not have one."""
    if isinstance(request, Mapping):
        return request
    config = weights.config.pruning if isinstance(weights, CheckpointWeights) else None
    if config is not None:
        weights.model.folder.fetch(config.file_name)
        rules = PruningRules.load(weights.model.path, config)
        return layer_rules(rules, weights.model, resolve_target(config, request))
    if request in ("on", "off"):
        return {}
    raise PruningError(f"{weights.model.folder} has no pruning rule for the target {request}; run `mcmoe prune` first.")


class FinalStates:
    """Last hidden states of a model on all sequences, in host memory, and its logits from them, batch by batch."""

    def __init__(
        self,
        weights: WeightSource,
        device: torch.device,
        tokens: torch.Tensor,
        activations: Activations,
        show_progress: bool,
        pruners: Mapping[str, LayerPruning] | None = None,
    ):
        self.model, self.weights, self.pruners = LayerwiseModel(weights, device), weights, pruners or {}
        moe_layers = weights.model.moe_layers
        integer = activations == "int8" and isinstance(weights, CheckpointWeights)
        round_inputs = round_activations if integer else torch.Tensor.float
        with torch.no_grad():
            self.batches = self.model.embed(tokens)
            for index in progress(
                range(self.model.num_layers), f"Running {weights.model.folder.name}", show=show_progress
            ):
                with self.model.loaded_layer(index) as layer:
                    pruner = self.pruners.get(moe_layers.get(index))
                    with layer.experts_forward(experts_forward(layer, round_inputs, pruner)):
                        self.batches = [layer(batch).cpu() for batch in self.batches]

    def log_probs(self, batch: int) -> torch.Tensor:
        """float32 [sequences, length, vocabulary], on the device."""
        return self.model.logits(self.batches[batch]).log_softmax(dim=-1)


def distance_of(kl: torch.Tensor, agreements: int, excess: torch.Tensor) -> dict[str, Any]:
    """What Evaluation says of another model. kl: float32 [positions]; agreements: positions of the same first choice;
    excess: float32 [predicted tokens], by how much their losses are higher than the other model's."""
    quantiles = np.quantile(kl.numpy(), list(KL_QUANTILES.values())).tolist()
    excess = excess.double()
    ratio = _exp_or_inf(float(excess.mean()))
    return {
        "mean_kl": float(kl.double().sum()) / len(kl),
        "kl_quantiles": dict(zip(KL_QUANTILES, quantiles, strict=True)),
        "top1_agreement": agreements / len(kl),
        "perplexity_ratio": ratio,
        # of a mean's exponential, to first order; a single token has no spread
        "perplexity_ratio_error": ratio * float(excess.std()) / len(excess) ** 0.5 if len(excess) > 1 else 0.0,
    }


def _compare(
    subject: FinalStates, base: FinalStates | None, tokens: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Losses float32 [sequences, length - 1] of the next tokens, and what Evaluation says of the other model."""
    losses, base_losses, kl, agreements = [], [], [], 0
    batch_tokens = tokens.split([len(batch) for batch in subject.batches])
    with torch.no_grad():
        for number, labels in enumerate(batch_tokens):
            log_probs = subject.log_probs(number)
            losses.append(next_token_losses(log_probs, labels))
            if base is not None:
                expected = base.log_probs(number)
                base_losses.append(next_token_losses(expected, labels))
                agreements += int((expected.argmax(-1) == log_probs.argmax(-1)).sum())
                kl.append(token_kl(expected, log_probs).flatten().cpu())
    losses = torch.cat(losses)
    if base is None:
        return losses, {}
    return losses, distance_of(torch.cat(kl), agreements, (losses - torch.cat(base_losses)).flatten())


def next_token_losses(log_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [sequences, length - 1], in host memory."""
    next_tokens = tokens[:, 1:, None].to(log_probs.device)
    return -log_probs[:, :-1].gather(2, next_tokens).squeeze(2).cpu()


def _mean_loss_by_file(losses: torch.Tensor, text: TokenSequences) -> dict[str, float]:
    """File name (its whole path where two files have one name) -> nats per token."""
    names = [path.name for path in text.files]
    if len(set(names)) < len(names):
        names = [str(path) for path in text.files]
    return {name: float(losses[text.file_ids == i].mean()) for i, name in enumerate(names)}


def _exp_or_inf(loss: float) -> float:
    """A broken model's perplexity may exceed every float; math.exp would raise."""
    return math.exp(loss) if loss < 700 else math.inf


def _sizes_of(weights: WeightSource) -> tuple[int, int, dict[str, float]]:
    """Bytes of the experts' weights and of all, and average bits per weight, on disk."""
    is_expert, info = weights.model.is_expert_weight, weights.files.info
    expert_bytes = sum(tensor.nbytes for name, tensor in info.items() if is_expert(name))
    total_bytes = sum(tensor.nbytes for tensor in info.values())
    expert_weights = sum(weights.numel(name) for name in weights.names() if is_expert(name))
    all_weights = sum(weights.numel(name) for name in weights.names())
    bits = {"experts": 8 * expert_bytes / expert_weights, "model": 8 * total_bytes / all_weights}
    return expert_bytes, total_bytes, bits
