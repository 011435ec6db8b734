"""What the engine tests share: small engines, and the logprobs they must reproduce."""

import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel
from vllm import LLM, SamplingParams, TokensPrompt

from vllm_mcmoe.calibration.experts_forward import round_activations
from vllm_mcmoe.calibration.models import describe_model
from vllm_mcmoe.calibration.pruning.rules import layer_rules
from vllm_mcmoe.checkpoint import read_checkpoint_config
from vllm_mcmoe.pruning import LayerPruning, PruningRules

# Two ranks on one NUMA node need a core each; one process may have both.
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
NEW_TOKENS = 12


def start_engine(model: Path, **options) -> LLM:
    """An engine for a small machine: eager and little KV cache unless told otherwise."""
    defaults = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "gpu_memory_utilization": 0.05,
    }
    return LLM(str(model), **(defaults | options))


def stop_engine(engine: LLM) -> None:
    engine.llm_engine.engine_core.shutdown()


def prompts_from(model: Path, files: list[Path], length: int = 48) -> list[list[int]]:
    """One prompt of `length` tokens per text file."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(file.read_text()[:4000], add_special_tokens=False)["input_ids"][:length] for file in files]


def engine_logprobs(engine: LLM, prompts: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    """Per prompt: prompt and generated tokens, and float32 [tokens - 1] the logprob of each after the first.

    Covers prefill (the prompt's own tokens) and decode (NEW_TOKENS greedy ones).
    """
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=1, prompt_logprobs=1, ignore_eos=True)
    results = []
    for output in engine.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], sampling, use_tqdm=False):
        completion = output.outputs[0]
        tokens = list(output.prompt_token_ids) + list(completion.token_ids)
        entries = list(output.prompt_logprobs[1:]) + list(completion.logprobs)
        logprobs = [entry[token].logprob for token, entry in zip(tokens[1:], entries, strict=True)]
        results.append((tokens, torch.tensor(logprobs)))
    return results


def pruning_rules(checkpoint: Path, target: float) -> list[LayerPruning]:
    """The rule of every MoE layer of a checkpoint, in plain torch, at a target."""
    description = describe_model(checkpoint)
    rules = PruningRules.load(checkpoint, read_checkpoint_config(checkpoint).pruning)
    return list(layer_rules(rules, description, target).values())


def with_int8_activations(model: PreTrainedModel, pruning: Sequence[LayerPruning] = ()) -> PreTrainedModel:
    """Let the experts of a dequantised transformers model round their inputs, and drop pairs, as the kernels do."""
    moe_layers = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for experts, rule in zip_longest(moe_layers, pruning):

        def forward(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts=experts, rule=rule):
            if rule is not None:
                topk_weights, topk_ids = rule(x, topk_weights, topk_ids)
            out, rounded = torch.zeros_like(x), round_activations(x)
            for token, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weights, strict=True)):
                for expert, weight in zip(ids, weights, strict=True):
                    if expert < 0:
                        continue
                    gate, up = (experts.gate_up_proj[expert] @ rounded[token]).chunk(2)
                    middle = round_activations((torch.nn.functional.silu(gate) * up)[None])[0]
                    out[token] += weight * (experts.down_proj[expert] @ middle)
            return out

        experts.forward = forward
    return model


def expected_logprobs(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """float32 [tokens - 1] logprobs of a transformers forward pass over the whole sequence."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)


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
