"""What a model consists of, counted on its modules without weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from vllm_mcmoe.calibration.evaluate.work import ModelCounts, attention_products
from vllm_mcmoe.calibration.matrix.linears import LinearShape, tensor_parallel_sizes
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.layerwise import find_linear

# config.json's names of layers without keys and values
WITHOUT_KEYS = ("linear_attention", "conv", "mamba", "moe", "mlp")


@dataclass(frozen=True)
class Parameters:
    """Weights of a model: routed experts, linears that compressed-tensors quantises, and everything else.

    active   weights a token is multiplied with: top-k experts of each layer, all else but the embeddings
    """

    experts: int
    linears: int
    rest: int
    active: int

    @property
    def total(self) -> int:
        return self.experts + self.linears + self.rest


def linears_of(description: MoeModel, model: torch.nn.Module) -> list[LinearShape]:
    """Those that compressed-tensors quantises."""
    names = [name for stage in description.family.linears for name in stage]
    found = [
        (name, find_linear(layer, description.module_name(name))) for layer in model.model.layers for name in names
    ]
    ranks = tensor_parallel_sizes(description.config.num_attention_heads)
    return [LinearShape(name, *linear.weight.shape, ranks) for name, linear in found if linear is not None]


def looked_up_weights(model: torch.nn.Module) -> int:
    """Embeddings, of which a token reads one row; none where they are the output head as well."""
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    return 0 if model.config.tie_word_embeddings or embedding is head else embedding.numel()


def count_parameters(description: MoeModel, model: torch.nn.Module, linears: Sequence[LinearShape]) -> Parameters:
    expert = sum(rows * columns for rows, columns in description.part_shapes().values())
    layers = len(description.moe_layers)
    experts = layers * description.num_experts * expert
    quantised = sum(linear.out_features * linear.in_features for linear in linears)
    total = sum(weight.numel() for weight in model.parameters())  # tied embeddings once
    unused = layers * (description.num_experts - description.top_k) * expert
    return Parameters(experts, quantised, total - experts - quantised, total - unused - looked_up_weights(model))


def largest_layer(model: torch.nn.Module) -> int:
    """Weights of the decoder layer that has most."""
    return max(sum(weight.numel() for weight in layer.parameters()) for layer in model.model.layers)


def count_model(description: MoeModel, model: torch.nn.Module, length: int) -> ModelCounts:
    """length: of calibration sequences."""
    parameters = count_parameters(description, model, linears_of(description, model))
    stages = []
    for layer in model.model.layers:
        for names in description.family.linears:
            found = [find_linear(layer, description.module_name(name)) for name in names]
            stages.append([tuple(linear.weight.shape) for linear in found if linear is not None])
    widths = (_attention_width(description.config, layer) for layer in range(description.num_layers))
    scores = sum(attention_products(length, width) for width in widths) / length
    head = model.lm_head.weight.numel()
    return ModelCounts(parameters.total, parameters.active, head, scores, [stage for stage in stages if stage])


def _attention_width(config: PretrainedConfig, layer: int) -> int:
    """Of queries and values, over all heads, between whose tokens attention multiplies: 0 in layers of other kinds."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] in WITHOUT_KEYS:
        return 0
    of_layer = config.per_layer_config[layer] if getattr(config, "per_layer_config", None) else config
    if getattr(config, "kv_lora_rank", None):
        return config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    head_size = getattr(of_layer, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * (head_size + (getattr(of_layer, "v_head_dim", None) or head_size))
