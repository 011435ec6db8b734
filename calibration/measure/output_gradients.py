"""Loss gradients at a MoE layer's output, kept from measuring until the layer is quantised, and what they say of an
expert's matrices: the Hessians of their outputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open

from vllm_mcmoe.calibration.matrix.two_sided import COUPLED_ROWS, OutputHessian
from vllm_mcmoe.calibration.measure.expert_tokens import (
    CHUNK_TOKENS,
    MIN_EXPERT_TOKENS,
    MoeInputs,
    evenly_spaced,
    tokens_of,
)
from vllm_mcmoe.calibration.model.activations import Rows
from vllm_mcmoe.calibration.model.experts import Expert

# Tokens whose gradients are kept: a quarter of the default calibration text, in an eighth of its hidden states' bytes.
GRADIENT_TOKENS = 65536


@dataclass(frozen=True)
class OutputGradients:
    """tokens  int64 [n], positions among the calibration tokens, ascending
    values  bfloat16 [n, hidden], the loss gradient at the layer's output there
    """

    tokens: torch.Tensor
    values: torch.Tensor

    @classmethod
    def sample(cls, gradients: Rows, positions: torch.Tensor) -> Self:
        """Of GRADIENT_TOKENS tokens, evenly spaced. gradients: float32 [N, hidden]; positions: of these N among the
        calibration tokens, int64 [N], ascending."""
        rows = evenly_spaced(len(gradients), min(len(gradients), GRADIENT_TOKENS))
        return cls(positions[rows], torch.cat([gradients[part].bfloat16() for part in rows.split(CHUNK_TOKENS)]))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """For a file."""
        return {"gradient_tokens": self.tokens, "gradients": self.values}


class KeptGradients(Mapping[str, OutputGradients]):
    """Layer name -> its gradients, read anew each time from the file that holds them: those of all layers need not fit
    in memory. files: layer name -> safetensors file."""

    def __init__(self, files: Mapping[str, Path]):
        self.files = files

    def __getitem__(self, name: str) -> OutputGradients:
        with safe_open(self.files[name], framework="pt") as file:
            return OutputGradients(file.get_tensor("gradient_tokens"), file.get_tensor("gradients"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def output_hessians(
    expert: Expert, number: int, inputs: MoeInputs, gradients: OutputGradients, name: str
) -> dict[str, OutputHessian] | None:
    """Part -> Hessian of its outputs, from the tokens of the expert whose gradients are kept.

    expert, number  the expert's weights, as they are when it is called, and its position in the layer
    name            what errors call it

    None for an expert with fewer than MIN_EXPERT_TOKENS such tokens, of which too little is known.
    """
    own = tokens_of(inputs, number)
    place = torch.searchsorted(gradients.tokens, own.index).clamp_max(len(gradients.tokens) - 1)
    kept = (gradients.tokens[place] == own.index).nonzero()[:, 0]
    if len(kept) < MIN_EXPERT_TOKENS:
        return None
    device = inputs.device
    rows = {
        "gate_up": [expert.rows(units) for units in _chunks(expert.down.shape[1], COUPLED_ROWS // 2, device)],
        "down": _chunks(expert.down.shape[0], COUPLED_ROWS, device),
    }
    moments = {part: [torch.zeros(len(r), len(r), device=device) for r in of_part] for part, of_part in rows.items()}
    for chosen in kept.split(CHUNK_TOKENS):
        x = inputs.x[own.index[chosen]].to(device)
        at_down = gradients.values[place[chosen]].to(device).float() * own.routing_weight[chosen.to(device), None]
        with torch.enable_grad():
            projected = expert.projected(x).detach().requires_grad_()
            h = expert.activated(projected)
        (at_gate_up,) = torch.autograd.grad(h, projected, at_down @ expert.down)
        for part, at_outputs in (("gate_up", at_gate_up), ("down", at_down)):
            for moment, of_block in zip(moments[part], rows[part], strict=True):
                some = at_outputs[:, of_block]
                moment.addmm_(some.t(), some)
    return {part: OutputHessian.build(rows[part], moments[part], len(kept), name=f"{name}.{part}") for part in rows}


def _chunks(count: int, size: int, device: torch.device) -> list[torch.Tensor]:
    return list(torch.arange(count, device=device).split(size))
