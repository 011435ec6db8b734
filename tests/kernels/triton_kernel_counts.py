"""Prints, as JSON, which kernels layers compile on a GPU that is not there, when, and how they are launched.

In a process of its own, as Triton either interprets or compiles. The layers have the shapes of real models, and tensors
that hold nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import torch

from tests.kernels.triton_launcher import Recorder, pretended_gpu
from vllm_mcmoe.kernels.expert_function import SILU
from vllm_mcmoe.kernels.packing import CODES, Code
from vllm_mcmoe.kernels.triton import experts, launches, tiles
from vllm_mcmoe.kernels.triton.layout import ExpertStack

H100 = tiles.Device("sm90", 132)
MIXTRAL = tiles.Shape(experts=8, top_k=2, hidden_size=4096, intermediate_size=14336)
QWEN3 = tiles.Shape(experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
# what CUDA graphs are captured for, and prompts of any length
TOKENS = (1, 2, 3, 4, 5, 8, 16, 24, 32, 33, 64, 100, 128, 256, 512, 544, 1055, 2049, 4096, 5000, 16384)
WIDTHS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Layer:
    """Numbers of the codes of one layer's experts; the model has others, too."""

    gate_up: tuple[int, ...]
    down: tuple[int, ...]


TRELLIS, SCALAR = Code(2, "trellis").number, 2
LAYERS_OF_BOTH_KINDS = (Layer((TRELLIS, SCALAR), (SCALAR,)), Layer((SCALAR,), (SCALAR,)), Layer((SCALAR,), (TRELLIS,)))
# four sets of widths of gate_up, three of down
LAYERS = (Layer((2, 3), (2, 3)), Layer((1, 2, 3), (2, 3)), Layer((1, 2, 3), (1, 2, 3)), Layer((2, 3, 4), (1, 2, 3, 4)))


def experts_of(shape: tiles.Shape, layer: Layer) -> torch.nn.Module:
    def stack(out_features: int, in_features: int, widths: tuple[int, ...], gated: bool) -> ExpertStack:
        codes, scales = torch.empty(64, dtype=torch.uint8), torch.empty(64, dtype=torch.int32)
        offsets, bits = torch.zeros(shape.experts, 2, dtype=torch.int64), torch.zeros(shape.experts, dtype=torch.int32)
        known = sum(1 << width for width in widths)
        return ExpertStack(codes, scales, offsets, bits, out_features, in_features, gated, known, stored_zeros=False)

    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    gate_up, down = stack(2 * intermediate, hidden, layer.gate_up, True), stack(hidden, intermediate, layer.down, False)
    return experts.TritonExperts(gate_up, down, SILU, False)


def call(layer: torch.nn.Module, shape: tiles.Shape, tokens: int, expert_map: torch.Tensor | None = None) -> None:
    x = torch.empty(tokens, shape.hidden_size, dtype=torch.bfloat16)
    ids = torch.zeros(tokens, shape.top_k, dtype=torch.int32)
    layer(x, torch.empty(tokens, shape.top_k), ids, expert_map)


def names(recorder: Recorder) -> list[str]:
    return [kernel.kernel for kernel in recorder.compiled]


def counts(shape: tiles.Shape, layers: tuple[Layer, ...], codes: Sequence[Code] = tuple(map(Code, WIDTHS))) -> dict:
    """Kernels compiled while loading, kernels compiled by what follows, and the launches of one layer by tokens."""
    experts.compile_layer.cache_clear()
    with pretended_gpu() as recorder:
        modules = [experts_of(shape, layer) for layer in layers]
        for module in modules:
            module.compile_kernels(codes=codes, top_k=shape.top_k, dtype=torch.bfloat16)
        at_load, by_tokens = names(recorder), {}
        for module in modules:
            for tokens in TOKENS:
                before = len(recorder.launches)
                call(module, shape, tokens)
                by_tokens[tokens] = [name for name, _ in recorder.launches[before:]]
        return {"at load": at_load, "later": names(recorder)[len(at_load) :], "launches": by_tokens}


def main() -> None:
    with (
        mock.patch.object(launches, "_has_ptx", lambda _: True),
        mock.patch.object(launches, "describe_device", lambda _: H100),
        mock.patch.object(experts, "describe_device", lambda _: H100),
    ):
        found = {
            "mixtral": counts(MIXTRAL, LAYERS),
            "qwen3": counts(QWEN3, LAYERS[:1]),
            "both kinds": counts(QWEN3, LAYERS_OF_BOTH_KINDS, CODES),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
