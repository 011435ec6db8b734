"""Random experts and routings for the tests of the Triton kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.kernels.matrices import random_matrix
from vllm_mcmoe.kernels.expert_function import SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import Code, StoredMatrix


@dataclass(frozen=True)
class Layer:
    """One MoE layer in checkpoint layout."""

    gate_up: list[StoredMatrix]
    down: list[StoredMatrix]
    hidden_size: int
    intermediate_size: int
    function: ExpertFunction = SILU
    stored_zeros: bool = True

    def announced(self) -> dict:
        """The keyword arguments of `prepare` that describe the matrices."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "gate_up_codes": [matrix.code for matrix in self.gate_up],
            "down_codes": [matrix.code for matrix in self.down],
            "function": self.function,
            "stored_zeros": self.stored_zeros,
        }


def random_layer(
    codes: Sequence[int | Code],
    hidden_size: int,
    intermediate_size: int,
    seed: int = 0,
    function: ExpertFunction = SILU,
    stored_zeros: bool = True,
) -> Layer:
    """Down projections take the codes in reverse, so that an expert's two codes differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = function.factor * intermediate_size
    gate_up = [random_matrix(code, rows, hidden_size, generator, stored_zeros) for code in codes]
    down = [random_matrix(code, hidden_size, intermediate_size, generator, stored_zeros) for code in reversed(codes)]
    return Layer(gate_up, down, hidden_size, intermediate_size, function, stored_zeros)


def random_tokens(
    tokens: int, hidden_size: int, experts: int, top_k: int, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [tokens, hidden_size] in dtype, topk_weights float32 and topk_ids int32 [tokens, top_k]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    scores = torch.softmax(torch.randn(tokens, experts, generator=generator), dim=-1)
    topk_weights, topk_ids = scores.topk(top_k)
    return x, topk_weights, topk_ids.int()
