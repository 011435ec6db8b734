"""Which tokens should pruning spare, and can they be found without attention maps?

    python benchmarks/token_protection.py --model CHECKPOINT [--json FILE]

The paper (MC-MoE, section 3.3) keeps both experts of the 2% of the tokens with the highest importance: the L1 norm of
the hidden state times the mean attention the token receives. While serving, a MoE layer sees neither. For every
estimator below the table shows how many of the true top 2% it finds, and what the model loses when its own top 2% are
spared, at the same pruned fraction (thresholds on w_r / w_0 at the same quantile in every layer, nothing renormalised).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vllm_mcmoe.calibration.evaluate.checkpoint_weights import open_weights
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.kernels.reference.pruning import by_weight, drop

REFERENCE = Path(__file__).parent / "reference_model"
PROTECTED = 0.02

# x: float32 [N, hidden], the experts' input; weights: float32 [N, k], largest first. -> [N], large = important
ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "L1 norm": lambda x, weights: x.abs().sum(-1),
    "small L1 norm": lambda x, weights: -x.abs().sum(-1),
    "peak over RMS (massive activation)": lambda x, weights: x.abs().amax(-1) / x.square().mean(-1).sqrt(),
    "router confidence": lambda x, weights: weights[:, 0] / weights.sum(-1),
    "router doubt": lambda x, weights: -weights[:, 0] / weights.sum(-1),
}


@dataclass
class Row:
    """recall: share of the true top 2% that the estimator's top 2% contains, mean over layers."""

    estimator: str
    recall: float | None
    pruned: float
    perplexity: float
    mean_kl: float


@dataclass
class LayerTokens:
    """A layer's N tokens: x [N, hidden], weights [N, k] largest first, importance [N], position [N] in the sequence,
    and the L1 norm [N] of the hidden state that the importance is made of."""

    x: torch.Tensor
    weights: torch.Tensor
    importance: torch.Tensor
    position: torch.Tensor
    hidden_norm: torch.Tensor


class ProtectedRatio(torch.nn.Module):
    """Thresholds on w_1 / w_0 that spare the tokens of a mask, given in the order the tokens come."""

    def __init__(self, threshold: float, protected: torch.Tensor):
        super().__init__()
        self.threshold, self.protected, self.position = threshold, protected, 0
        self.counts = torch.zeros(2, dtype=torch.int64)

    def forward(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = by_weight(topk_weights, topk_ids)
        spared = self.protected[self.position : self.position + len(x), None]
        self.position += len(x)
        keep = spared | (weights[:, 1:] >= self.threshold * weights[:, :1])
        return drop(weights, ids, keep, torch.tensor(0.0), self.counts)


def collect(model: LayerwiseModel, tokens: torch.Tensor) -> dict[str, LayerTokens]:
    """True importances with eager attention, which returns its maps."""
    model.module.set_attn_implementation("eager")
    names, result = model.description.moe_layers, {}
    length = tokens.shape[1]
    after = torch.arange(length, 0, -1)  # L - j queries see token j
    with torch.no_grad():
        hidden = model.embed(tokens)
        for index in range(model.num_layers):
            with model.loaded_layer(index) as layer:
                received, calls = [], []
                hook = layer.module.self_attn.register_forward_hook(
                    lambda module, args, output, received=received: received.append(output[1].mean(1).sum(1))
                )

                def record(x, ids, weights, calls=calls, experts=layer.module.mlp.experts):
                    calls.append((x, weights.float().sort(-1, descending=True).values))
                    return type(experts).forward(experts, x, ids, weights)

                norms = torch.cat([batch.abs().sum(-1) for batch in hidden])
                with layer.experts_forward(record):
                    hidden = [layer(batch) for batch in hidden]
                hook.remove()
            result[names[index]] = LayerTokens(
                x=torch.cat([x for x, _ in calls]),
                weights=torch.cat([weights for _, weights in calls]),
                importance=(norms * torch.cat(received) / after).flatten(),
                position=torch.arange(length).repeat(len(tokens)),
                hidden_norm=norms.flatten(),
            )
    return result


def top(scores: torch.Tensor) -> torch.Tensor:
    """bool [N], the PROTECTED share with the highest scores."""
    return scores >= scores.sort().values[-max(1, round(PROTECTED * len(scores)))]


def linear_estimator(layer: LayerTokens) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Ridge regression of the log importance on the experts' input."""
    x = torch.cat((layer.x, torch.ones(len(layer.x), 1)), dim=-1).double()
    gram = x.t() @ x
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram, x.t() @ layer.importance.log().double()).float()
    return lambda x, weights: x @ solution[:-1] + solution[-1]


def protections(
    calibration: dict[str, LayerTokens], evaluation: dict[str, LayerTokens], length: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Name -> layer -> bool [N] of the evaluation tokens: those an estimator spares, by its calibrated threshold."""
    found: dict[str, dict[str, torch.Tensor]] = {
        "none": {},
        "true importance (needs attention)": {},
        "authors' code": {},
    }
    for name, layer in evaluation.items():
        found["none"][name] = torch.zeros(len(layer.x), dtype=torch.bool)
        found["true importance (needs attention)"][name] = top(layer.importance)
        found["authors' code"][name] = top(layer.hidden_norm / (length - layer.position))
        fitted = linear_estimator(calibration[name])
        for label, estimate in (ESTIMATORS | {"linear in the hidden state": fitted}).items():
            scores = estimate(calibration[name].x, calibration[name].weights)
            threshold = scores.sort().values[-max(1, round(PROTECTED * len(scores)))]
            found.setdefault(label, {})[name] = estimate(layer.x, layer.weights) >= threshold
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE / "tiny-mixtral")
    parser.add_argument(
        "--calibration", type=Path, nargs="+", default=sorted(REFERENCE.glob("corpus/*.calibration.txt"))
    )
    parser.add_argument("--evaluation", type=Path, nargs="+", default=sorted(REFERENCE.glob("corpus/*.evaluation.txt")))
    parser.add_argument("--fraction", type=float, default=0.25, help="of the expert activations, to prune")
    parser.add_argument("--sequences", type=int, default=80)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = LayerwiseModel(open_weights(options.model))
    if model.description.top_k != 2:
        parser.error("the paper defines its rule for two experts per token")
    texts = [
        load_calibration_data(model.description, files, options.sequences, options.length, print)
        for files in (options.calibration, options.evaluation)
    ]
    calibration, evaluation = (collect(model, text.tokens) for text in texts)
    spared = protections(calibration, evaluation, texts[1].tokens.shape[1])
    truth = spared["true importance (needs attention)"]
    rows = []
    print(f"| {'spared 2%':36} | recall | pruned | perplexity | KL to unpruned |\n|---|---|---|---|---|")
    for label, masks in spared.items():
        layers = {
            name: ProtectedRatio(_threshold(evaluation[name], mask, options.fraction), mask)
            for name, mask in masks.items()
        }
        result = evaluate(
            options.model,
            options.evaluation,
            against=options.model,
            pruning=layers,
            sequences=options.sequences,
            length=options.length,
            show_progress=False,
        )
        hits = [(mask & truth[name]).sum() / truth[name].sum() for name, mask in masks.items()]
        recall = None if label == "none" else float(torch.stack(hits).mean())
        rows.append(Row(label, recall, result.pruned, result.geometric_mean_perplexity, result.mean_kl))
        shown = "" if recall is None else f"{recall:.0%}"
        print(f"| {label:36} | {shown} | {result.pruned:.3f} | {rows[-1].perplexity:.3f} | {rows[-1].mean_kl:.5f} |")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _threshold(layer: LayerTokens, spared: torch.Tensor, fraction: float) -> float:
    """The ratio below which exactly this fraction of the layer's activations lies, spared tokens not counted."""
    ratios = (layer.weights[:, 1] / layer.weights[:, 0]).masked_fill(spared, torch.inf)
    return float(ratios.sort().values[round(2 * fraction * len(ratios))])


if __name__ == "__main__":
    main()
