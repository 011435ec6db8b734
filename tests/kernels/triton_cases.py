"""Random experts and routings for the tests of the Triton kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_mcmoe.kernels.expert_function import SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import GROUP_SIZE, PackedMatrix, pack_codes


def random_matrix(
    bits: int, out_features: int, in_features: int, generator: torch.Generator, stored_zeros: bool = True
) -> PackedMatrix:
    """Codes over the whole range, scales of the size of real ones, zeros with a fraction, or none."""
    groups = in_features // GROUP_SIZE
    codes = torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8, generator=generator)
    scales = torch.rand(out_features, groups, generator=generator) * 0.02 + 0.01
    zeros = torch.rand(out_features, groups, generator=generator) * ((1 << bits) - 1)
    return PackedMatrix(
        bits, pack_codes(codes, bits), scales.half(), zeros.half() if stored_zeros and bits > 1 else None
    )


@dataclass(frozen=True)
class Layer:
    """One MoE layer in checkpoint layout."""

    gate_up: list[PackedMatrix]
    down: list[PackedMatrix]
    hidden_size: int
    intermediate_size: int
    function: ExpertFunction = SILU
    stored_zeros: bool = True

    def announced(self) -> dict:
        """The keyword arguments of `prepare` that describe the matrices."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "gate_up_bits": [matrix.bits for matrix in self.gate_up],
            "down_bits": [matrix.bits for matrix in self.down],
            "function": self.function,
            "stored_zeros": self.stored_zeros,
        }


def random_layer(
    bits: Sequence[int],
    hidden_size: int,
    intermediate_size: int,
    seed: int = 0,
    function: ExpertFunction = SILU,
    stored_zeros: bool = True,
) -> Layer:
    """Down projections take the widths in reverse, so that an expert's two widths differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = function.factor * intermediate_size
    gate_up = [random_matrix(b, rows, hidden_size, generator, stored_zeros) for b in bits]
    down = [random_matrix(b, hidden_size, intermediate_size, generator, stored_zeros) for b in reversed(bits)]
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
