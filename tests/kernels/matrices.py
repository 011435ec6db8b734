"""Random quantised experts, and what a layer of them is called with."""

import torch

from vllm_mcmoe.kernels.expert_function import ACTIVATIONS, GPT_OSS, SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import GROUP_SIZE, PackedMatrix, pack_codes

# Every kind of function: with and without a gate, and each parameter by itself.
FUNCTIONS = [
    *(ExpertFunction(activation, gated) for activation in ACTIVATIONS for gated in (True, False)),
    GPT_OSS,
    ExpertFunction(limit=0.05),
    ExpertFunction(alpha=1.702),
    ExpertFunction(beta=1.0),
]


def random_matrix(
    bits: int, out_features: int, in_features: int, generator: torch.Generator, stored_zeros: bool = True
) -> PackedMatrix:
    """Uniform codes, scales of 0.01 to 0.02 and unrounded zeros inside the range of the codes, or none."""
    groups = (out_features, in_features // GROUP_SIZE)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, generator=generator) + 1) / 100
    zeros = torch.rand(groups, generator=generator) * ((1 << bits) - 1)
    return PackedMatrix(
        bits, pack_codes(codes, bits), scales.half(), zeros.half() if stored_zeros and bits > 1 else None
    )


def random_layer(
    gate_up_bits: list[int],
    down_bits: list[int],
    hidden: int,
    intermediate: int,
    seed: int = 0,
    function: ExpertFunction = SILU,
    stored_zeros: bool = True,
) -> dict:
    """Keyword arguments of `prepare` for one layer."""
    generator = torch.Generator().manual_seed(seed)
    rows = function.factor * intermediate
    return {
        "gate_up": [random_matrix(bits, rows, hidden, generator, stored_zeros) for bits in gate_up_bits],
        "down": [random_matrix(bits, hidden, intermediate, generator, stored_zeros) for bits in down_bits],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "gate_up_bits": gate_up_bits,
        "down_bits": down_bits,
        "function": function,
        "stored_zeros": stored_zeros,
    }


def random_biases(experts: int, hidden: int, intermediate: int, function: ExpertFunction = SILU) -> dict:
    """Keyword arguments of `set_biases`, of about the size of what the matrices of random_layer give."""
    generator = torch.Generator().manual_seed(5)
    return {
        "gate_up": torch.randn(experts, function.factor * intermediate, generator=generator),
        "down": torch.randn(experts, hidden, generator=generator),
    }


def random_call(
    tokens: int, hidden: int, experts: int, top_k: int, *, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [tokens, hidden], topk_weights and topk_ids [tokens, top_k] with distinct experts per token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, ids = scores.topk(top_k, dim=-1)
    return x, weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)
