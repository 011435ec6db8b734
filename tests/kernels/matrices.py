"""Random quantised experts, and what a layer of them is called with."""

from collections.abc import Sequence

import torch

from vllm_mcmoe.kernels.expert_function import ACTIVATIONS, GPT_OSS, SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import GROUP_SIZE, Code, PackedMatrix, StoredMatrix, pack_codes
from vllm_mcmoe.kernels.trellis import TrellisMatrix, pack_trellis

# Every kind of function: with and without a gate, and each parameter by itself.
FUNCTIONS = [
    *(ExpertFunction(activation, gated) for activation in ACTIVATIONS for gated in (True, False)),
    GPT_OSS,
    ExpertFunction(limit=0.05),
    ExpertFunction(alpha=1.702),
    ExpertFunction(beta=1.0),
]


def as_code(code: int | Code) -> Code:
    """A number is the width of a scalar code."""
    return code if isinstance(code, Code) else Code(code)


def random_matrix(
    code: int | Code, out_features: int, in_features: int, generator: torch.Generator, stored_zeros: bool = True
) -> StoredMatrix:
    """Uniform codes, scales of 0.01 to 0.02 and unrounded zeros inside the range of the codes, or none."""
    code = as_code(code)
    bits, groups = code.bits, (out_features, in_features // GROUP_SIZE)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scales = ((torch.rand(groups, generator=generator) + 1) / 100).half()
    zeros = (torch.rand(groups, generator=generator) * ((1 << bits) - 1)).half()
    if code.kind == "trellis":
        return TrellisMatrix(bits, pack_trellis(codes, bits), scales)
    return PackedMatrix(bits, pack_codes(codes, bits), scales, zeros if code.has_zeros(stored_zeros) else None)


def random_layer(
    gate_up: Sequence[int | Code],
    down: Sequence[int | Code],
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
        "gate_up": [random_matrix(code, rows, hidden, generator, stored_zeros) for code in gate_up],
        "down": [random_matrix(code, hidden, intermediate, generator, stored_zeros) for code in down],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "gate_up_codes": list(map(as_code, gate_up)),
        "down_codes": list(map(as_code, down)),
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
