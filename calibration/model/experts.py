"""One expert of a loaded decoder layer, whatever transformers' module looks like inside."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from vllm_mcmoe.kernels.expert_function import ExpertFunction


@dataclass(frozen=True)
class Expert:
    """Views of the layer's weights, float32.

    gate_up       [2I, H], gate rows first, or alternating with up's where `interleaved`; [I, H] without a gate
    down          [H, I]
    gate_up_bias  [2I] or [I], in the order of gate_up's rows; None where experts have no biases
    down_bias     [H] or None
    """

    function: ExpertFunction
    interleaved: bool
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    def intermediate(self, x: torch.Tensor, gate_up: torch.Tensor | None = None) -> torch.Tensor:
        """What the down projection is applied to. x: [n, H]; gate_up: in the place of the expert's own -> [n, I]."""
        return self.activated(self.projected(x, gate_up))

    def projected(self, x: torch.Tensor, gate_up: torch.Tensor | None = None) -> torch.Tensor:
        """x: [n, H] -> [n, rows of gate_up], in their order."""
        projected = x @ (self.gate_up if gate_up is None else gate_up).t()
        return projected if self.gate_up_bias is None else projected.add_(self.gate_up_bias)

    def activated(self, projected: torch.Tensor) -> torch.Tensor:
        """[n, rows of gate_up] -> [n, I]."""
        if self.interleaved:
            projected = projected.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return self.function(projected)

    def rows(self, units: torch.Tensor) -> torch.Tensor:
        """Of gate_up, those that the intermediate's units are computed from, gate first. int64 [n] -> [2n] or [n]."""
        if not self.function.gated:
            return units
        if self.interleaved:
            return torch.cat([2 * units, 2 * units + 1])
        return torch.cat([units, units + len(self.gate_up) // 2])

    def some_units(self, units: torch.Tensor) -> Self:
        """An expert of these units of the intermediate alone: its output is their share of the whole. It has copies of
        its weights, and down's bias in full."""
        rows = self.rows(units)
        bias = None if self.gate_up_bias is None else self.gate_up_bias[rows]
        return replace(self, interleaved=False, gate_up=self.gate_up[rows], down=self.down[:, units], gate_up_bias=bias)

    def output(self, h: torch.Tensor) -> torch.Tensor:
        """Of the down projection. h: [n, I] -> [n, H]."""
        y = h @ self.down.t()
        return y if self.down_bias is None else y + self.down_bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, H] -> [n, H], without routing weights."""
        return self.output(self.intermediate(x))
