"""What quantising and serving a model will take, from its config.json alone: no weight is read or downloaded.

    plan = plan_resources("DeepSeek-V3", bits=2.5)
    plan.serving.placements                           # GPUs of several sizes, and vLLM's options for them

Sizes are exact, of transformers' own modules on the meta device. Memory is what the pipeline is built to stay within
(docs/design.md, Memory and resuming). Work is counted (work.py); times.py says how long it takes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from vllm_mcmoe.calibration.allocate.bits import written_bits
from vllm_mcmoe.calibration.allocate.program import check_budget, size_range
from vllm_mcmoe.calibration.allocate.size import size_in_bytes
from vllm_mcmoe.calibration.checkpoint.size import DecidedBytes, Weight
from vllm_mcmoe.calibration.evaluate.model_counts import (
    WITHOUT_KEYS,
    Parameters,
    count_model,
    count_parameters,
    largest_layer,
    linears_of,
    looked_up_weights,
)
from vllm_mcmoe.calibration.evaluate.work import Work, count_work, multiply_adds
from vllm_mcmoe.calibration.matrix.linears import (
    LINEAR_BITS,
    SCALE_BITS,
    LinearShape,
    choose_group_size,
)
from vllm_mcmoe.calibration.measure.linear_errors import table_of
from vllm_mcmoe.calibration.measure.sensitivity import FLOAT_BYTES, activation_bytes
from vllm_mcmoe.calibration.model.activations import OTHER_BYTES
from vllm_mcmoe.calibration.model.description import HEAD_MODULE, LAYERS, TEXT_MODULE, MoeModel, describe_model
from vllm_mcmoe.calibration.model.folder import ModelFolder
from vllm_mcmoe.calibration.model.layerwise import BATCH_TOKENS, skeleton
from vllm_mcmoe.calibration.recipes import Effort, Recipe, find_recipe, needs_gradients
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import Kind, group_count

BITS_16 = 2  # bytes
DEFAULT_BITS = 2.5

MEMORY_SIZES = {"24 GB GPU": 24, "48 GB GPU": 48, "80 GB GPU": 80, "141 GB GPU": 141}
# vLLM's default for --gpu-memory-utilization: the rest is for activations, graphs and what else runs there.
USABLE_SHARE = 0.9
GPUS_PER_NODE = 8
# Arrays of scores that attention keeps at once, by its definition and with its gradient; gpt-oss's took 3.6.
SCORE_COPIES = 4
# Below this many rows of an expert's gate per rank, slices are too thin to keep a GPU's tiles full.
THINNEST_SLICE = 512


@dataclass(frozen=True)
class QuantizationNeeds:
    """Bytes, and work.

    model_bytes        of the model's files as they are released, which must be at hand
    layer_bytes        of the largest decoder layer in float32
    activation_bytes   hidden states and gradients of the calibration tokens, in memory or on disk
    memory_bytes       resident, with activations on disk
    disk_bytes         checkpoint and activations, beside the model
    expert_products    multiply-adds of quantising every expert, at each width that is measured and at the one it gets
    forward_products   multiply-adds of running the calibration tokens through the layers
    work               both and what there is beside them, step by step and by kind
    """

    model_bytes: int
    layer_bytes: int
    activation_bytes: int
    memory_bytes: int
    disk_bytes: int
    expert_products: float
    forward_products: float
    work: Work


@dataclass(frozen=True)
class Placement:
    """A number of equal devices that hold the checkpoint and the KV cache, and vLLM's options for them.

    per_device_bytes   of weights and KV cache
    """

    device: str
    devices: int
    options: str
    per_device_bytes: int


@dataclass(frozen=True)
class ServingNeeds:
    """Bytes.

    checkpoint_bytes    weights, scales and zeros included
    kv_bytes_per_token  over all layers, 16-bit cache
    kv_bytes            of kv_tokens tokens
    step_bytes          weights read for one token of one stream: the bound of decoding is bandwidth / step_bytes
    """

    checkpoint_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    kv_bytes: int
    step_bytes: int
    placements: list[Placement]


@dataclass(frozen=True)
class SizeNeeds:
    """A size of the whole checkpoint, before anything is measured.

    requested_bytes, least_bytes, largest_bytes   of the files: what was asked for, and what is possible
    least_expert_bits, most_expert_bits   what is left to an expert's weight, on average as written, where all linears
                                          and the output head stay in 16 bits, and where all get 4
    """

    requested_bytes: int
    least_bytes: int
    largest_bytes: int
    least_expert_bits: float
    most_expert_bits: float


@dataclass(frozen=True)
class ResourcePlan:
    """bits: of an expert's weight; with a size, the most there can be. codes: of those of up to 4 bits.
    size: None where bits were asked for."""

    architecture: str
    bits: float
    codes: Kind
    size: SizeNeeds | None
    parameters: Parameters
    quantization: QuantizationNeeds
    serving: ServingNeeds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan_resources(
    model_dir: str | Path | ModelFolder,
    *,
    bits: float | None = None,
    size: str | int | None = None,
    linear_bits: int | None = None,
    sequences: int = 128,
    length: int = 2048,
    recipe: str | Recipe = "mcmoe",
    effort: Effort = "normal",
    codes: Kind | None = None,
    tuned: bool = True,
    kv_tokens: int = 65536,
) -> ResourcePlan:
    """model_dir: a directory or a name on the hub, as find_model takes it; config.json is all that is read.

    bits: of expert weights, scales and zeros included, DEFAULT_BITS if neither they nor a size are given. size: of
    the whole checkpoint, as allocate takes it. sequences x length calibration tokens.

    tuned, codes: as pipeline.quantize takes them. kv_tokens: of all requests that are served at once.

    Raises UnsupportedModelError and HubError as describe_model does, PlanError for a size that no checkpoint of this
    model can have.
    """
    description, recipe = describe_model(model_dir), find_recipe(recipe, effort, tune=tuned, codes=codes)
    if bits is not None and size is not None:
        raise PlanError("give either bits or size.")
    model = skeleton(description)
    size_needs = None if size is None else _size_needs(description, model, recipe, size, linear_bits)
    linear_bits = recipe.linear_bits if linear_bits is None else linear_bits
    if size_needs is not None:
        bits = size_needs.most_expert_bits
    elif bits is None:
        bits = DEFAULT_BITS
    linears = linears_of(description, model)
    parameters = count_parameters(description, model, linears)
    checkpoint_bytes = round(
        parameters.experts * bits / 8 + _bytes_of_linears(linears, linear_bits) + parameters.rest * BITS_16
    )
    if size_needs is not None:
        checkpoint_bytes = min(size_needs.requested_bytes, size_needs.largest_bytes)
    tokens = sequences * length
    with_gradients = needs_gradients(recipe)
    kept_bytes = activation_bytes(description.num_layers, tokens, description.hidden, with_gradients)
    layer_bytes = FLOAT_BYTES * largest_layer(model)
    embeddings = looked_up_weights(model)
    counts = count_model(description, model, length)
    work = count_work(description, recipe, sequences, length, counts, linear_bits)
    quantization = QuantizationNeeds(
        model_bytes=_model_bytes(description, parameters),
        layer_bytes=layer_bytes,
        activation_bytes=kept_bytes,
        memory_bytes=2 * layer_bytes + OTHER_BYTES + _attention_bytes(model, length),
        # While tuning, the checkpoint is there twice, but the gradients' activations are gone.
        disk_bytes=checkpoint_bytes + (kept_bytes if recipe.tuning is None else max(kept_bytes, checkpoint_bytes)),
        expert_products=work.of_experts,
        forward_products=sum(map(multiply_adds, (work.forward, work.backward, work.tuning))),
        work=work,
    )
    step_bytes = checkpoint_bytes - round(
        (parameters.total - parameters.active - embeddings) * bits / 8 + embeddings * BITS_16
    )
    kv_bytes_per_token = BITS_16 * sum(_kv_values(description.config, layer) for layer in range(description.num_layers))
    kv_bytes = kv_bytes_per_token * kv_tokens
    serving = ServingNeeds(
        checkpoint_bytes,
        kv_bytes_per_token,
        kv_tokens,
        kv_bytes,
        step_bytes,
        [
            _place(description, linears, linear_bits, name, size * 10**9, checkpoint_bytes, kv_bytes)
            for name, size in MEMORY_SIZES.items()
        ],
    )
    codes = recipe.gptq.codes
    return ResourcePlan(description.architecture, bits, codes, size_needs, parameters, quantization, serving)


def _size_needs(
    description: MoeModel, model: torch.nn.Module, recipe: Recipe, size: str | int, linear_bits: int | None
) -> SizeNeeds:
    linears = table_of(DecidedBytes.of(description, planned_weights(description, model)))
    requested = size_in_bytes(size, linears.original_bytes)
    asked = {"size": requested, "linear_bits": linear_bits, "linears": linears}
    check_budget(description, recipe, None, None, **asked)
    least, largest = size_range(description, recipe, linears, linear_bits)
    experts = sum(map(math.prod, description.part_shapes().values()))
    experts *= description.num_experts * len(description.moe_layers)

    def expert_bits(width: int) -> float:
        others = sum(
            m.nbytes[width if linear_bits is None else linears.held_at(m, linear_bits)] for m in linears.modules
        )
        left = 8 * (requested - linears.other_bytes - others) / experts
        least, most = (written_bits(width, recipe.format_version) for width in (recipe.widths[0], recipe.widths[-1]))
        return min(max(left, least), most)

    return SizeNeeds(requested, least, largest, expert_bits(LINEAR_BITS[-1]), expert_bits(LINEAR_BITS[0]))


def planned_weights(description: MoeModel, model: torch.nn.Module) -> dict[str, Weight]:
    """Of all tensors but the routed experts', by the names they have on disk, from the model without weights."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(f"{TEXT_MODULE}{LAYERS}."):
            number, _, relative = name.removeprefix(f"{TEXT_MODULE}{LAYERS}.").partition(".")
            on_disk = f"{description.layer_prefix}{number}.{description.on_disk_name(relative)}"
        elif name == f"{HEAD_MODULE}.weight" and description.config.tie_word_embeddings:
            continue
        else:
            on_disk = description.outer_name(name)
        if not description.is_expert_tensor(on_disk):
            weights[on_disk] = Weight(tuple(tensor.shape), BITS_16)
    return weights


def _model_bytes(description: MoeModel, parameters: Parameters) -> int:
    """Of the files as released. Linears that a quantised release leaves in 16 bits are few."""
    per_weight = description.source_format.bytes_per_weight
    quantised = parameters.experts * per_weight(True) + parameters.linears * per_weight(False)
    return round(quantised) + parameters.rest * BITS_16


def _bytes_of_linears(linears: Sequence[LinearShape], bits: int) -> float:
    group_size = choose_group_size(linears, bits)
    packed = (bits + SCALE_BITS / group_size) / 8
    return sum(
        linear.out_features
        * linear.in_features
        * (packed if bits != 16 and linear.can_be_packed(group_size) else BITS_16)
        for linear in linears
    )


def _kv_values(config: PretrainedConfig, layer: int) -> int:
    """Numbers that one layer caches per token: none in layers of other kinds, whose states do not grow."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] in WITHOUT_KEYS:
        return 0
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention
        return config.kv_lora_rank + config.qk_rope_head_dim
    of_layer = config.per_layer_config[layer] if getattr(config, "per_layer_config", None) else config
    head_size = getattr(of_layer, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = of_layer.num_key_value_heads
    if kinds and kinds[layer] == "sliding_attention":
        heads = getattr(config, "swa_num_key_value_heads", None) or heads
    return heads * (head_size + (getattr(of_layer, "v_head_dim", None) or head_size))


def _attention_bytes(model: torch.nn.Module, length: int) -> int:
    """Of scores between all pairs of tokens, where attention is computed by its definition."""
    if model.config._attn_implementation != "eager":
        return 0
    sequences = max(1, BATCH_TOKENS // length)
    return SCORE_COPIES * sequences * model.config.num_attention_heads * length**2 * FLOAT_BYTES


def _tensor_parallel_sizes(linears: Sequence[LinearShape], bits: int) -> list[int]:
    """Of one node, those whose ranks get whole groups of every packed linear; vLLM refuses others."""
    group_size = choose_group_size(linears, bits)
    packed = [linear for linear in linears if bits != 16 and linear.can_be_packed(group_size)]
    sizes = [2**power for power in range(GPUS_PER_NODE.bit_length())]
    return [size for size in sizes if all(linear.holds(group_size, size) for linear in packed)]


def _place(
    description: MoeModel,
    linears: Sequence[LinearShape],
    linear_bits: int,
    device: str,
    memory: int,
    weights: int,
    kv_bytes: int,
) -> Placement:
    """The smallest power of two of devices: attention heads and experts divide evenly among as many."""
    devices = 1
    while weights + kv_bytes > USABLE_SHARE * memory * devices:
        devices *= 2
    tensor = max(size for size in _tensor_parallel_sizes(linears, linear_bits) if size <= devices)
    pipeline = devices // tensor
    options = []
    if tensor > 1:
        options.append(f"--tensor-parallel-size {tensor}")
        rows = description.intermediate // tensor
        if rows < THINNEST_SLICE or group_count(description.intermediate) < tensor:
            options.append("--enable-expert-parallel")
    if pipeline > 1:
        options.append(f"--pipeline-parallel-size {pipeline}")
    return Placement(device, devices, " ".join(options), round((weights + kv_bytes) / devices))
