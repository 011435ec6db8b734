"""What quantising one group of linears, or the output head, to 4 bits is predicted to cost, and what it costs.

    python benchmarks/linear_predictions.py [--bits 8] [--evaluation-sequences 16]

Predicted: calibration/measure/linear_errors.py on calibration text. Measured: KL of the 16-bit model to the one whose
other weights are not quantised, on evaluation text.
"""

import argparse
from pathlib import Path

import torch

from vllm_mcmoe.calibration.evaluate.checkpoint_weights import load_dequantized
from vllm_mcmoe.calibration.matrix.gptq import HessianFactor
from vllm_mcmoe.calibration.matrix.linears import PACKED_BITS, quantize_linear
from vllm_mcmoe.calibration.measure.linear_errors import LinearMeasurer
from vllm_mcmoe.calibration.measure.sensitivity import backward_traces, kl_divergence
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.calibration.model.text import load_calibration_data
from vllm_mcmoe.calibration.model.weights import WeightFiles

REFERENCE = Path(__file__).parent / "reference_model"
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted and measured cost of quantised linears.")
    parser.add_argument("--bits", type=int, choices=PACKED_BITS, default=4)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--evaluation-sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    description = describe_model(REFERENCE / "tiny-mixtral")

    def tokens(part: str, sequences: int) -> torch.Tensor:
        files = sorted((REFERENCE / "corpus").glob(f"*.{part}.txt"))
        return load_calibration_data(description, files, sequences, options.length, print).tokens

    calibration, evaluation = (
        tokens("calibration", options.sequences),
        tokens("evaluation", options.evaluation_sequences),
    )
    layerwise = LayerwiseModel(WeightFiles(description))
    measurer = LinearMeasurer(layerwise, calibration.numel(), None)
    for _ in backward_traces(layerwise, calibration, watcher=measurer, show_progress=False):
        pass
    table, model = measurer.table(), load_dequantized(description.path)
    moments = input_moments(model, [module.names[0] for module in table.modules], calibration)
    expected = log_probs(model, evaluation)
    print("| linears | predicted | measured |\n|---|---:|---:|")
    for module in table.modules:
        factor = HessianFactor.build(moments[module.names[0]])
        weights = {name: model.get_submodule(name).weight for name in module.names}
        originals = {name: weight.data.clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            dtype = layerwise.source.read(f"{name}.weight").dtype
            weight.data.copy_(quantize_linear(weight.data, factor, options.bits, table.group_size, dtype)[0])
        measured = kl_divergence(expected, log_probs(model, evaluation)) / evaluation.numel()
        for name, weight in weights.items():
            weight.data.copy_(originals[name])
        shown = f"{module.names[0]}, ..." if len(module.names) > 1 else module.names[0]
        print(f"| {shown} | {module.loss_increase[options.bits]:.6f} | {measured:.6f} |", flush=True)


@torch.no_grad()
def log_probs(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(batch).logits.log_softmax(-1) for batch in tokens.split(BATCH)])


@torch.no_grad()
def input_moments(model: torch.nn.Module, names: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """name -> second moment of the linear's inputs, float32 [in, in]."""
    moments: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        moments[name] = moments.get(name, 0) + x.t() @ x

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: add(name, args[0].flatten(0, -2))
        )
        for name in names
    ]
    for batch in tokens.split(BATCH):
        model(batch)
    for hook in hooks:
        hook.remove()
    return moments


if __name__ == "__main__":
    main()
