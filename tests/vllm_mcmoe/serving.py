"""What an engine must reproduce: the logprobs of transformers with the dequantised weights."""

import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from vllm_mcmoe.calibration.evaluate.experts_forward import layer_rules, round_activations
from vllm_mcmoe.calibration.matrix.linears import SCALE
from vllm_mcmoe.calibration.model.description import describe_model
from vllm_mcmoe.calibration.model.weight_files import TensorFiles
from vllm_mcmoe.checkpoint import read_checkpoint_config
from vllm_mcmoe.kernels.reference import quantize_activations
from vllm_mcmoe.pruning import LayerPruning, PruningRules

# Two ranks on one NUMA node need a core each; one process may have both.
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

# Rounding in another order now and then moves an activation to its neighbouring int8 code, 1/127 of its group's
# maximum, and that moves a logprob by hundredths; one wrong expert, width or scale moves all of them by tenths.
LARGEST_DIFFERENCE, MEAN_DIFFERENCE = 0.1, 0.005


def assert_close(logprobs: torch.Tensor, expected: torch.Tensor) -> None:
    """Of an engine in float32."""
    difference = (logprobs - expected).abs()
    print(f"difference: mean {difference.mean():.4f}, largest {difference.max():.4f}")
    assert difference.max() < LARGEST_DIFFERENCE
    assert difference.mean() < MEAN_DIFFERENCE


# Where linears round their inputs to int8, too, so is attention's output, which vLLM computes by formulas of its own:
# changing it by 1e-6 of itself moves the mean by up to 0.004, by 1e-5 by 0.013, by 1e-3 by 0.024, and now and then
# sends a token to another expert. Swapping two linears of a kind in two layers moves the mean by 0.3 to 1.0.
MEAN_DIFFERENCE_WITH_INT8_LINEARS = 0.05


def assert_close_with_int8_linears(logprobs: torch.Tensor, expected: torch.Tensor) -> None:
    """Of an engine in float32 with linears of 4 or 8 bits."""
    difference = (logprobs - expected).abs()
    print(f"difference: mean {difference.mean():.4f}, largest {difference.max():.4f}")
    assert difference.mean() < MEAN_DIFFERENCE_WITH_INT8_LINEARS


def prompts_from(model: Path, files: list[Path], length: int = 48) -> list[list[int]]:
    """One prompt of `length` tokens per text file."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(file.read_text()[:4000], add_special_tokens=False)["input_ids"][:length] for file in files]


def pruning_rules(checkpoint: Path, target: float) -> list[LayerPruning]:
    """The rule of every MoE layer of a checkpoint, in plain torch, at a target."""
    description = describe_model(checkpoint)
    rules = PruningRules.load(checkpoint, read_checkpoint_config(checkpoint).pruning)
    return list(layer_rules(rules, description, target).values())


def with_int8_linears(model: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    """Let the linears that a checkpoint has in 4 or 8 bits round their inputs as the CPU kernels do."""
    files, description = TensorFiles(checkpoint), describe_model(checkpoint)
    for name in files.info:
        base, _, suffix = name.rpartition(".")
        if suffix != SCALE:
            continue
        if base == description.family.head:
            linear = model.lm_head
        else:
            layer, relative = description.split_layer_name(base)
            linear = model.model.layers[layer].get_submodule(description.module_name(f"{relative}.").rstrip("."))
        group_size = linear.in_features // files.info[name].shape[1]

        def round_inputs(module: torch.nn.Module, inputs: tuple[torch.Tensor], group_size: int = group_size):
            codes, scales = quantize_activations(inputs[0].flatten(0, -2), group_size)
            rounded = codes.unflatten(-1, (-1, group_size)) * scales.unsqueeze(-1)
            return rounded.reshape(inputs[0].shape)

        linear.register_forward_pre_hook(round_inputs)
    return model


def with_int8_activations(model: PreTrainedModel, pruning: Sequence[LayerPruning] = ()) -> PreTrainedModel:
    """Let the experts of a dequantised transformers model round their inputs, and drop pairs, as the kernels do."""
    moe_layers = [m for m in model.modules() if isinstance(getattr(m, "down_proj", None), torch.nn.Parameter)]
    for experts, rule in zip_longest(moe_layers, pruning):

        def forward(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts=experts, rule=rule):
            if rule is not None:
                topk_weights, topk_ids = rule(x, topk_weights, topk_ids)
            out, rounded = torch.zeros_like(x), round_activations(x)
            for token, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weights, strict=True)):
                for expert, weight in zip(ids, weights, strict=True):
                    if expert < 0:
                        continue
                    middle = round_activations(_intermediate(experts, expert, rounded[token])[None])[0]
                    out[token] += weight * _down(experts, expert, middle)
            return out

        experts.forward = forward
    return model


def _intermediate(experts: torch.nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """As transformers' module computes it, written anew or by its own function."""
    if isinstance(experts, GptOssExperts):
        return experts._apply_gate(x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert])
    if isinstance(experts, NemotronHExperts):
        return experts.act_fn(experts.up_proj[expert] @ x)
    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
    if isinstance(experts, Gemma4TextExperts):
        return experts.act_fn(gate) * up
    return torch.nn.functional.silu(gate) * up


def _down(experts: torch.nn.Module, expert: int, middle: torch.Tensor) -> torch.Tensor:
    if isinstance(experts, GptOssExperts):
        return middle @ experts.down_proj[expert] + experts.down_proj_bias[expert]
    return experts.down_proj[expert] @ middle


def expected_logprobs(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """float32 [tokens - 1] logprobs of a transformers forward pass over the whole sequence."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)


def bfloat16_range(model: PreTrainedModel, tokens: list[int], runs: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest logprobs, float32 [tokens - 1] each, that bfloat16's rounding may make of `expected_logprobs`.

    A token whose router or pruning rule is at a tie goes one way or the other by the last bit and moves by tenths, in a
    correct engine too. So every layer's output is nudged at random: rounding to bfloat16 moves a value by at most 2^-9
    of it, and the four roundings of a layer (two norms, two residual sums) spread like one nudge of at most 2^-8.
    Of 32 runs, a side of a tie that one run in eight takes is missed once in seventy times.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(layer: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + (2 * torch.rand(output.shape, generator=generator) - 1) * 2**-8)

    exact = expected_logprobs(model, tokens)
    hooks = [layer.register_forward_hook(nudge) for layer in model.model.layers]
    logprobs = torch.stack([exact] + [expected_logprobs(model, tokens) for _ in range(runs)])
    for hook in hooks:
        hook.remove()
    return logprobs.amin(0), logprobs.amax(0)


class environment:
    """Set variables for the engines started inside the block; vLLM hands them to its processes."""

    def __init__(self, variables: dict[str, str]):
        self.variables = variables

    def __enter__(self) -> None:
        self.saved = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)

    def __exit__(self, *exception: object) -> None:
        for name, value in self.saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
