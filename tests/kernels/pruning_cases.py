"""Random calls of prune_experts, and what a result means whatever the order of its pairs."""

import torch

EXPERTS = 12
HIDDEN = 32


def random_call(
    tokens: int, top_k: int, rank: int = 8, ids_dtype: torch.dtype = torch.int32, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """The arguments of prune_experts: unsorted weights, a tenth of the ids -1 with a weight that must not count.

    Thresholds and scores are centred on about the same value, so that a part of the experts is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.empty(tokens, top_k, dtype=torch.int64)
    for token in range(tokens):
        ids[token] = torch.randperm(EXPERTS, generator=generator)[:top_k]
    ids[torch.rand(tokens, top_k, generator=generator) < 0.1] = -1
    return (
        torch.randn(tokens, HIDDEN, generator=generator),
        torch.rand(tokens, top_k, generator=generator),
        ids.to(ids_dtype),
        torch.randn(top_k - 1, generator=generator),
        torch.randn(2, top_k - 1, generator=generator),
        torch.randn(EXPERTS, generator=generator),
        torch.randn(rank, HIDDEN, generator=generator) * HIDDEN**-0.5,
        torch.randn(EXPERTS, rank, generator=generator),
        torch.tensor(0.4),
        torch.tensor([1000, 100]),
    )


def by_expert(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [T, k] with each token's ids ascending, and weight 0 for -1, as no kernel reads that weight."""
    ids, order = ids.sort(dim=-1)
    return torch.where(ids >= 0, weights.gather(-1, order), 0.0), ids
