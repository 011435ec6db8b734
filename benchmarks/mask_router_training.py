"""Does a mask router need Gumbel noise? Predicted cost of what trained routers drop, on text they have not seen.

    python benchmarks/mask_router_training.py [--model CHECKPOINT]

    ratio               w_r / w_0 alone, the same quantile in every layer
    closed form         `mcmoe prune --method otp`: the loss integrated over all sparsity weights (docs/method.md)
    + Gumbel            then as long again with masks sampled with Gumbel noise, temperature 1 to 0.1
    + straight-through  the same with hard masks in the forward pass
    Gumbel              masks sampled from the start

Nats per token of pairs dropped at 10, 20, ... of all expert activations, to second order, thresholds on this text.
"""

import argparse
import math
from pathlib import Path

import torch

from vllm_mcmoe.calibration.evaluate.checkpoint_weights import open_weights
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.calibration.prune import otp
from vllm_mcmoe.calibration.prune.costs import RoutedTokens, drop_costs, routed_tokens
from vllm_mcmoe.calibration.prune.otp import MaskRouter, train_mask_router

REFERENCE = Path(__file__).parent / "reference_model"
FRACTIONS = (0.1, 0.2, 0.3, 0.4)
NO_RENORMALIZATION = torch.tensor(0.0)


def closed_form(tokens: RoutedTokens, costs: torch.Tensor, experts: int) -> MaskRouter:
    router = MaskRouter(tokens, costs, experts, seed=0)
    with torch.no_grad():
        for name, tensor in train_mask_router(tokens, costs, experts).items():
            getattr(router, name).copy_(tensor)
    return router


def train_sampled(router: MaskRouter, tokens: RoutedTokens, costs: torch.Tensor, hard: bool) -> MaskRouter:
    """cost (1 - m) / lambda + m with a relaxed mask m; lambda is drawn anew for every token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        scores = router(tokens.x, tokens.weights, tokens.ids).flatten().sort().values
    low, high = scores[len(scores) // 50], scores[-len(scores) // 50]
    optimizer = torch.optim.AdamW(router.parameters(), lr=otp.LEARNING_RATE / 3, weight_decay=otp.WEIGHT_DECAY)
    for step in range(otp.STEPS):
        temperature = 0.1 ** (step / otp.STEPS)
        batch = torch.randint(len(costs), (otp.BATCH_TOKENS,), generator=generator)
        log_lambda = low + (high - low) * torch.rand(otp.BATCH_TOKENS, 1, generator=generator)
        uniform = torch.rand(otp.BATCH_TOKENS, costs.shape[1], generator=generator).clamp(1e-6, 1 - 1e-6)
        margin = router(tokens.x[batch], tokens.weights[batch], tokens.ids[batch]) - log_lambda
        mask = torch.sigmoid((margin + temperature * uniform.logit()) / temperature)
        if hard:
            mask = (mask > 0.5).float() + mask - mask.detach()
        relative = (costs[batch] / log_lambda.exp()).clamp(max=30)  # without it, single tokens ruin the router
        loss = ((1 - mask) * relative + mask).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), otp.LARGEST_STEP)
        optimizer.step()
    return router


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpus = REFERENCE / "corpus"
    parser.add_argument("--model", type=Path, default=REFERENCE / "tiny-mixtral")
    parser.add_argument("--calibration", type=Path, nargs="+", default=sorted(corpus.glob("*.calibration.txt")))
    parser.add_argument("--evaluation", type=Path, nargs="+", default=sorted(corpus.glob("*.evaluation.txt")))
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    model = LayerwiseModel(open_weights(options.model))
    experts, share = model.description.num_experts, model.description.top_k / (model.description.top_k - 1)
    text = [
        load_calibration_data(model.description, files, options.sequences, options.length, print).tokens
        for files in (options.calibration, options.evaluation)
    ]
    seen, unseen = ({t.name: t for t in routed_tokens(model, tokens, show_progress=False)} for tokens in text)
    scores: dict[str, list[torch.Tensor]] = {}
    costs = []
    for name, tokens in seen.items():
        target = drop_costs(tokens, NO_RENORMALIZATION)
        held_out = unseen[name]
        costs.append(drop_costs(held_out, NO_RENORMALIZATION).flatten())
        routers = {
            "closed form": closed_form(tokens, target, experts),
            "+ Gumbel": train_sampled(closed_form(tokens, target, experts), tokens, target, hard=False),
            "+ straight-through": train_sampled(closed_form(tokens, target, experts), tokens, target, hard=True),
            "Gumbel": train_sampled(MaskRouter(tokens, target, experts, seed=0), tokens, target, hard=False),
        }
        ranks = held_out.ratios.flatten().argsort().argsort()  # quantiles: comparable between layers
        scores.setdefault("ratio", []).append(ranks.float())
        for label, router in routers.items():
            with torch.no_grad():
                scores.setdefault(label, []).append(router(held_out.x, held_out.weights, held_out.ids).flatten())
    print("| training | " + " | ".join(f"{fraction:.0%}" for fraction in FRACTIONS) + " |")
    print("|---" * (len(FRACTIONS) + 1) + "|")
    all_costs, tokens_seen = torch.cat(costs), text[1].numel()
    for label, layers in scores.items():
        cumulative = all_costs[torch.cat(layers).argsort()].double().cumsum(0) / tokens_seen
        dropped = [cumulative[math.floor(fraction * share * len(all_costs)) - 1].item() for fraction in FRACTIONS]
        print(f"| {label} | " + " | ".join(f"{cost:.5f}" for cost in dropped) + " |")


if __name__ == "__main__":
    main()
