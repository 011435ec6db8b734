"""What an expert computes between its projections: one description, for calibration and for every backend.

    with a gate      h = activation(g) * (u + beta)      g = min(gate, limit),  u = clamp(up, -limit, limit)
    without          h = activation(up)

where silu is g * sigmoid(alpha * g). gpt-oss has limit 7, alpha 1.702 and beta 1; models that call themselves silu and
have a limit have alpha 1 and beta 0. Every activation is 0 at 0, so that rows that exist for padding only stay 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class ExpertFunction:
    """activation  one of ACTIVATIONS
    gated       whether experts have a gate beside up
    limit       of gate from above and of up's magnitude; None for none
    alpha       slope within silu's sigmoid
    beta        added to up

    limit, alpha and beta belong to silu with a gate. Raises ValueError for an unknown activation, for these beside
    another, and for a limit that is not positive.
    """

    activation: str = "silu"
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"no activation {self.activation!r}; supported: {', '.join(ACTIVATIONS)}")
        if self.has_parameters and (self.activation != "silu" or not self.gated):
            raise ValueError(f"limit, alpha and beta belong to silu with a gate, not to {self}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit is {self.limit}, expected a positive number")

    @property
    def has_parameters(self) -> bool:
        return (self.limit, self.alpha, self.beta) != (None, 1.0, 0.0)

    @property
    def factor(self) -> int:
        """Rows of gate_up per row of the intermediate: 2 with a gate, which comes first, 1 without."""
        return 2 if self.gated else 1

    def __str__(self) -> str:
        parameters = f"(limit={self.limit}, alpha={self.alpha}, beta={self.beta})" if self.has_parameters else ""
        return f"{self.activation}{parameters}{'' if self.gated else ' without a gate'}"

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: float [..., factor * I], gate first -> [..., I] of the same dtype."""
        if not self.gated:
            return ACTIVATIONS[self.activation](gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        if not self.has_parameters:
            return ACTIVATIONS[self.activation](gate).mul_(up)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * (up + self.beta)


SILU = ExpertFunction()
GPT_OSS = ExpertFunction(limit=7.0, alpha=1.702, beta=1.0)
