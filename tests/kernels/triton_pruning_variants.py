"""Prints, as JSON, what the launcher compiles for pruned layers: while they are loaded, and when they are called.

In a process of its own, as Triton either interprets or compiles. The default dtype is bfloat16, as it is while vLLM
loads a bfloat16 model.
"""

import json

import torch

from tests.kernels.triton_launcher import Recorder, pretended_gpu

EXPERTS, HIDDEN, TOP_K, RANK = 8, 256, 2, 8
CPU = torch.device("cpu")


def learned():
    from vllm_mcmoe.pruning import LayerPruning

    float32 = {"dtype": torch.float32}
    router = {
        "weight_slopes": torch.zeros(2, TOP_K - 1, **float32),
        "expert_bias": torch.zeros(EXPERTS, **float32),
        "projection": torch.zeros(RANK, HIDDEN, **float32),
        "expert_features": torch.zeros(EXPERTS, RANK, **float32),
    }
    return LayerPruning(torch.zeros(TOP_K - 1, **float32), torch.tensor(1.0, **float32), router)


def ratio():
    from vllm_mcmoe.pruning import ratio_pruning

    float32 = {"dtype": torch.float32}
    return ratio_pruning(torch.ones(TOP_K - 1, **float32), torch.tensor(1.0, **float32), EXPERTS, HIDDEN)


def variants(recorder: Recorder, begin: int) -> list[dict]:
    """Pointers' types and constants of what was compiled since."""
    return [dict(kernel.types) | dict(kernel.constants) for kernel in recorder.compiled[begin:]]


def main() -> None:
    torch.set_default_dtype(torch.bfloat16)
    found = {}
    for name, rule in (("otp", learned()), ("odp", ratio())):
        with pretended_gpu() as recorder:
            layer = rule.on_device(CPU, "triton", dtype=torch.bfloat16)
            at_load, launches = len(recorder.compiled), len(recorder.launches)
            for tokens in (1, 8, 100, 257, 4096):
                layer(
                    torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16),
                    torch.zeros(tokens, TOP_K, dtype=torch.float32),
                    torch.zeros(tokens, TOP_K, dtype=torch.int32),
                )
        found[name] = {
            "at load": variants(recorder, 0)[:at_load],
            "at calls": variants(recorder, at_load),
            "launches per call": (len(recorder.launches) - launches) / 5,
            "buffers": {buffer: str(tensor.dtype) for buffer, tensor in layer.named_buffers()},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
