"""The kernel contract in plain torch: what every backend computes, written to be read and compared against.

    y[t, n] = sum_g a_scale[t, g] * w_scale[n, g] * (sum_k level[n, k] * a_code[t, k] - zero[n, g] * sum_k a_code[t, k])

A level is the code itself of scalar codes, and what a trellis code decodes to (kernels/trellis.py).
The sums over the k of one group of 128 are exact integers; only the scaling is rounded, so backends agree to float32
rounding. Slow, on any device: it is the oracle of the tests, and `ReferenceExperts` serves a model with it.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Self

import torch

from vllm_mcmoe.kernels.expert_function import SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import GROUP_SIZE, Code, StoredMatrix

INT8_MAX = 127  # codes stay symmetric: -128 is never used, so negating an activation negates its code


def quantize_activations(x: torch.Tensor, group_size: int = GROUP_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to int8 per token and per group: scale = max|x| / 127, code = round-half-even(x / scale).

    x: float [T, K], K divisible by the group size -> (int8 codes [T, K], float32 scales [T, K/group_size]).
    A group of zeros has scale 0 and codes 0. Raises ValueError when K is not divisible by the group size.
    """
    tokens, features = x.shape
    if features % group_size:
        raise ValueError(f"activation width {features} is not divisible by the group size {group_size}")
    groups = x.float().reshape(tokens, features // group_size, group_size)
    scales = groups.abs().amax(dim=-1) / INT8_MAX
    divisors = torch.where(scales > 0, scales, 1.0)
    codes = torch.round(groups / divisors.unsqueeze(-1)).to(torch.int8)
    return codes.reshape(tokens, features), scales


def linear_int8(x: torch.Tensor, matrix: StoredMatrix) -> torch.Tensor:
    """One quantised linear map on int8 activations. x: float [T, K] -> float32 [T, N]."""
    a_codes, a_scales = quantize_activations(x)
    grouped = (-1, matrix.in_features // GROUP_SIZE, GROUP_SIZE)
    # float64 holds these sums of at most 128 * 255 * 127 exactly and has a fast matmul on every device
    a = a_codes.reshape(grouped).double()  # [T, G, 128]
    w = matrix.levels().reshape(grouped).double()  # [N, G, 128]
    products = torch.einsum("tgk,ngk->tng", a, w).float()  # [T, N, G], exact
    sums = a.sum(dim=-1).float()  # [T, G], exact
    centred = products - matrix.float_zeros() * sums.unsqueeze(1)
    return torch.einsum("tng,ng,tg->tn", centred, matrix.scales.float(), a_scales)


def linear_float(x: torch.Tensor, matrix: StoredMatrix) -> torch.Tensor:
    """The same map on unquantised activations, to measure what int8 costs. x: float [T, K] -> float32 [T, N]."""
    return x.float() @ matrix.dequantize().T


def fused_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: Sequence[StoredMatrix],
    down: Sequence[StoredMatrix],
    *,
    function: ExpertFunction = SILU,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activations: Literal["int8", "float"] = "int8",
) -> torch.Tensor:
    """out[t] = sum_j topk_weights[t, j] * down_e(function(gate_up_e(x[t]))),  e = topk_ids[t, j].

    x: float [T, H]; topk_weights: float [T, J]; topk_ids: integer [T, J], negative contributes nothing.
    gate_up[e]: [2I, H], gate rows first, or [I, H] of a function without a gate; down[e]: [H, I]. gate_up_bias and
    down_bias: float32 [E, 2I or I] and [E, H], added to what the two matrices give. Returns [T, H] in x.dtype; sums are
    float32.
    """
    linear = linear_int8 if activations == "int8" else linear_float
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        if expert < 0:
            continue
        tokens, slots = torch.where(topk_ids == expert)
        projected = linear(x[tokens], gate_up[expert])  # [n, 2I or I]
        if gate_up_bias is not None:
            projected += gate_up_bias[expert]
        expert_out = linear(function(projected), down[expert])  # [n, H]
        if down_bias is not None:
            expert_out += down_bias[expert]
        routing_weight = topk_weights[tokens, slots].float()
        out.index_add_(0, tokens, routing_weight.unsqueeze(-1) * expert_out)
    return out.to(x.dtype)


class ReferenceExperts(torch.nn.Module):
    """The experts of one layer, computed by `fused_experts`; interchangeable with the fast backends.

    gate_up, down: lists of StoredMatrix, in checkpoint layout, each of its own code.
    """

    def __init__(self, gate_up: Sequence[StoredMatrix], down: Sequence[StoredMatrix], function: ExpertFunction):
        super().__init__()
        self.gate_up, self.down, self.function = list(gate_up), list(down), function
        self.register_buffer("gate_up_bias", None, persistent=False)
        self.register_buffer("down_bias", None, persistent=False)

    @classmethod
    def prepare(
        cls,
        gate_up: Iterable[StoredMatrix],
        down: Iterable[StoredMatrix],
        *,
        hidden_size: int,
        intermediate_size: int,
        gate_up_codes: Sequence[Code],
        down_codes: Sequence[Code],
        function: ExpertFunction = SILU,
        stored_zeros: bool = True,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Collect the experts on `device`. Raises ValueError where a matrix is not what was announced."""
        shapes = ((function.factor * intermediate_size, hidden_size), (hidden_size, intermediate_size))
        collected = []
        for name, matrices, codes, shape in zip(
            ("gate_up", "down"), (gate_up, down), (gate_up_codes, down_codes), shapes, strict=True
        ):
            experts = [matrix.to(device) for matrix in matrices]
            if len(experts) != len(codes):
                raise ValueError(f"{name}: {len(codes)} codes were given for {len(experts)} experts")
            for expert, (matrix, code) in enumerate(zip(experts, codes, strict=True)):
                check_matrix(f"{name} of expert {expert}", matrix, code, shape, stored_zeros)
            collected.append(experts)
        return cls(*collected, function)

    def set_biases(self, gate_up: torch.Tensor, down: torch.Tensor | None) -> None:
        """gate_up: float32 [E, 2I or I], gate first; down: float32 [E, H], None where another rank adds it."""
        device = self.gate_up[0].qweight.device
        self.gate_up_bias = gate_up.to(device)
        self.down_bias = None if down is None else down.to(device)

    def forward(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: [T, H], topk_weights and topk_ids: [T, J], expert_map as for local_ids -> [T, H] in x.dtype."""
        topk_ids = local_ids(topk_ids, expert_map)
        return fused_experts(
            x,
            topk_weights,
            topk_ids,
            self.gate_up,
            self.down,
            function=self.function,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
        )


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """topk_ids [T, J] with the numbers experts have on this rank, -1 for those of other ranks.

    expert_map: int32 [global experts], the number of each on this rank, -1 elsewhere; None where they are the same.
    """
    if expert_map is None:
        return topk_ids
    local = expert_map[topk_ids.clamp(min=0).long()]
    return torch.where(topk_ids >= 0, local.to(topk_ids.dtype), topk_ids)


def check_matrix(name: str, matrix: StoredMatrix, code: Code, shape: tuple[int, int], stored_zeros: bool) -> None:
    """Raises ValueError when a matrix has not the code and [out, in] shape that were announced for it, or has zeros
    where none were. stored_zeros: whether scalar codes of more than 1 bit have them."""
    found = (matrix.out_features, matrix.in_features)
    if matrix.code != code or found != shape:
        raise ValueError(f"{name}: expected {code} and shape {list(shape)}, found {matrix.code} and {list(found)}")
    if (matrix.zeros is not None) != code.has_zeros(stored_zeros):
        raise ValueError(f"{name}: zeros were {'' if stored_zeros else 'not '}announced; they must be as announced")
