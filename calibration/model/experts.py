"""One expert of a loaded decoder layer, whatever transformers' module looks like inside."""

from dataclasses import dataclass

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
        projected = x @ (self.gate_up if gate_up is None else gate_up).t()
        if self.gate_up_bias is not None:
            projected += self.gate_up_bias
        if self.interleaved:
            projected = projected.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return self.function(projected)

    def output(self, h: torch.Tensor) -> torch.Tensor:
        """Of the down projection. h: [n, I] -> [n, H]."""
        y = h @ self.down.t()
        return y if self.down_bias is None else y + self.down_bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [n, H] -> [n, H], without routing weights."""
        return self.output(self.intermediate(x))
