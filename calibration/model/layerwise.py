"""A transformers model whose decoder layers are in memory one at a time.

The model's own modules and its own forward code are used; only the loop over layers is ours, so calibration sees
every layer's input and the memory needed is one layer's weights in float32 plus the hidden states of all sequences.
Embeddings are in memory while tokens are embedded, lm_head while logits are asked for. Weights are in the memory of the
model's device, and what the model computes is there; hidden states may be given to it from anywhere.

    model = LayerwiseModel(WeightFiles(describe_model(path)))
    hidden = model.embed(tokens)                    # list of [sequences, length, hidden], one per batch
    for index in range(model.num_layers):
        with model.loaded_layer(index) as layer:
            hidden = [layer(batch) for batch in hidden]
    logits = model.logits(hidden[0])

Transformers keeps a layer's experts as two tensors, as a rule `gate_up_proj [E, 2I, H]` (gate rows first) and
`down_proj [E, H, I]`, whatever the names on disk; `DecoderLayer.expert` knows the exceptions. The call
`experts(hidden_states, top_k_index, top_k_weights)` is the seam calibration works at: `DecoderLayer.experts_forward`
replaces it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from vllm_mcmoe.calibration.common.device import check_layer_fits
from vllm_mcmoe.calibration.model.description import HEAD_MODULE, LAYERS, TEXT_MODULE, MoeModel
from vllm_mcmoe.calibration.model.experts import Expert
from vllm_mcmoe.calibration.model.weights import WeightSource
from vllm_mcmoe.checkpoint import BIAS
from vllm_mcmoe.errors import FormatError, UnsupportedModelError
from vllm_mcmoe.memory import release_freed_memory

# Tokens per forward call: enough for full matrix multiplications, few enough for the [tokens, vocabulary] logits.
BATCH_TOKENS = 2048


HEAD = f"{HEAD_MODULE}.weight"


ExpertsForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class DecoderLayer:
    """One loaded decoder layer of a model, with the arguments transformers passes it besides the hidden states, by
    position and by name, and the device both are on."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    model: MoeModel
    device: torch.device

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: float32 [sequences, length, hidden], on any device -> same shape, on the layer's."""
        fresh = {name: type(self.kwargs[name])() for name in self.model.family.filled_arguments}
        output = self.module(hidden.to(self.device), *self.args, **(self.kwargs | fresh))
        return output[0] if isinstance(output, tuple) else output

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())

    @property
    def experts(self) -> nn.Module | None:
        """Transformers' module of all routed experts; None in a dense layer."""
        return getattr(self.module.get_submodule(self.model.family.moe_module), "experts", None)

    @property
    def gate_up(self) -> torch.Tensor:
        """float32 [experts, out, in], a view of the layer's weights; rows as in `Expert`."""
        return self._stack("gate_up")

    @property
    def down(self) -> torch.Tensor:
        """float32 [experts, hidden, intermediate], likewise."""
        return self._stack("down")

    def _stack(self, part: str) -> torch.Tensor:
        stack = getattr(self.experts, stack_name(self.model, part))
        return stack.transpose(1, 2) if self.model.family.experts_transposed else stack

    def expert(self, number: int) -> Expert:
        """One of the layer's."""
        biases = [
            getattr(self.experts, bias_name(self.model, part))[number] if self.model.has_biases else None
            for part in ("gate_up", "down")
        ]
        interleaved = self.model.family.experts_interleaved
        return Expert(self.model.function, interleaved, self.gate_up[number], self.down[number], *biases)

    def linear(self, name: str) -> nn.Linear | None:
        """The linear that is called so on disk, relative to the layer, where this layer has it."""
        return find_linear(self.module, self.model.module_name(name))

    @contextmanager
    def experts_forward(self, forward: ExpertsForward) -> Iterator[None]:
        """Within the block the layer's experts are computed by forward(x [N, H], topk_ids [N, k],
        topk_weights [N, k]) -> [N, H]. A dense layer stays as it is."""
        experts = self.experts
        if experts is None:
            yield
            return
        experts.forward = forward
        try:
            yield
        finally:
            del experts.forward

    @contextmanager
    def router_scores(self, receive: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Within the block receive(float32 [N, experts], in host memory) is called before each experts call with the
        scores of all experts, from which the router selects."""
        family = self.model.family
        position = family.router_logits
        softmax = partial(torch.softmax, dim=-1)
        score = {"sigmoid": torch.sigmoid, "softmax": softmax, "given": torch.Tensor.float}[family.router_scores]

        def hook(module: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
            receive(score(output[position].detach().float()).cpu())

        router = self.module.get_submodule(family.moe_module).get_submodule(family.router)
        handle = router.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


class LayerwiseModel:
    """See the module's text. Parameters of decoder layers, embeddings and lm_head live on the meta device until they
    are used.

    left_out   on-disk names of tensors outside the decoder layers that the model's class does not know
    """

    def __init__(self, source: WeightSource, device: torch.device | str = "cpu"):
        """Raises DeviceError for a GPU smaller than a decoder layer, FormatError or UnsupportedModelError for tensors
        that are missing or not to be had."""
        self.source = source
        self.device = torch.device(device)
        self.description = source.model
        self._layer_names: dict[int, list[str]] = {}
        self._outer_names: list[str] = []
        for name in source.names():
            split = self.description.split_layer_name(name)
            if split is None or split[0] >= self.num_layers:
                self._outer_names.append(name)
            else:
                self._layer_names.setdefault(split[0], []).append(name)
        check_layer_fits(self.device, self.layer_bytes(), self.description.path)
        self.module = skeleton(self.description)
        rotary = _rotary(self.module, self.description)
        if rotary is not None:
            rotary.to(self.device)
        known = {self.description.outer_name(name) for name in self.module.state_dict() if not _in_layer(name)}
        known |= {name for name in self._outer_names if self.description.passes_through(name)}
        self.left_out = [name for name in self._outer_names if name not in known]
        self._outer_names = [name for name in self._outer_names if name in known]
        self._check_outer()
        for name, module in self.module.model.named_children():
            if name not in (self.description.family.embedding, LAYERS):
                self._load_outer(f"{TEXT_MODULE}{name}", module)
        self._arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @property
    def num_layers(self) -> int:
        return self.description.num_layers

    def layer_tensors(self, index: int) -> list[str]:
        """On-disk names of one decoder layer's tensors."""
        return self._layer_names.get(index, [])

    def outer_tensors(self) -> list[str]:
        """On-disk names of all tensors that belong to no decoder layer."""
        return self._outer_names

    def layer_bytes(self) -> int:
        """Of the largest decoder layer in float32."""
        layers = (sum(map(self.source.numel, names)) for names in self._layer_names.values())
        return 4 * max(layers)

    def check_weight(self, name: str) -> None:
        """Raises UnsupportedModelError for weights that would poison everything measured from them."""
        self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        """As float32 on the model's device. Raises as check_weight does."""
        tensor = self.source.read(name).to(self.device)
        if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):  # NaN is both minimum and maximum
            raise UnsupportedModelError(
                f"{self.description.path}: {name} has NaN or infinite values; repair the model first."
            )
        return tensor.float()

    def _on_disk_name(self, name: str) -> str:
        """Of a parameter outside the decoder layers. A tied lm_head has one of its own, but no tensor in the files."""
        on_disk = self.description.outer_name(name)
        tied = self.description.config.tie_word_embeddings and name == HEAD and on_disk not in self._outer_names
        return self.description.outer_name(f"{self._embedding}.weight") if tied else on_disk

    @property
    def _embedding(self) -> str:
        """In transformers' module tree."""
        return TEXT_MODULE + self.description.family.embedding

    def _check_outer(self) -> None:
        for name, _ in self.module.named_parameters(remove_duplicate=False):
            if not _in_layer(name) and self._on_disk_name(name) not in self._outer_names:
                raise FormatError(
                    f"{self.description.path}: tensor {self._on_disk_name(name)} is missing from its safetensors files."
                )

    def outer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, float32 weight) of every parameter outside the decoder layers, a tied head's included."""
        for name, _ in self.module.named_parameters(remove_duplicate=False):
            if not _in_layer(name):
                yield name, self._read(self._on_disk_name(name))

    def _load_outer(self, prefix: str, module: nn.Module) -> None:
        """A module outside the decoder layers, unless it is loaded already."""
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                weight = self._read(self._on_disk_name(f"{prefix}.{name}"))
                module.load_state_dict({name: weight}, strict=False, assign=True)
        module.requires_grad_(False)

    def load_layer(self, index: int) -> nn.Module:
        """Read a decoder layer's weights as float32. Raises FormatError naming tensors that are missing."""
        layer = self.module.model.layers[index]
        state = self.layer_state(index)
        expected = layer.state_dict()
        for fault, names in (("lacks", expected.keys() - state), ("has unknown tensors", state.keys() - expected)):
            if names:
                where = f"{self.description.path}: {self.description.layer_prefix}{index}"
                raise FormatError(f"{where} {fault} {', '.join(sorted(names)[:3])} in its safetensors files.")
        layer.load_state_dict(state, strict=True, assign=True)
        return layer.requires_grad_(False)

    def layer_state(self, index: int) -> dict[str, torch.Tensor]:
        """State dict of one layer in transformers' names; experts fused."""
        model, state = self.description, {}
        for name in self.layer_tensors(index):
            if not model.is_expert_tensor(name):
                state[model.module_name(model.split_layer_name(name)[1])] = self._read(name)
        if index in model.moe_layers:
            experts = model.module_name(f"{model.family.experts}.")
            for part in ("gate_up", "down"):
                weights = self.expert_weights(index, part)
                state[experts + stack_name(model, part)] = (
                    weights.transpose(1, 2) if model.family.experts_transposed else weights
                )
                if model.has_biases:
                    state[experts + bias_name(model, part)] = self.expert_biases(index, part)
        return state

    def expert_weights(self, index: int, part: str) -> torch.Tensor:
        """float32 [experts, out, in] of "gate_up" or "down", rows as in `Expert`."""
        return self._stacked(index, part, "weight", self.description.part_shapes()[part])

    def expert_biases(self, index: int, part: str) -> torch.Tensor:
        """float32 [experts, out], likewise."""
        return self._stacked(index, part, BIAS, self.description.part_shapes()[part][:1])

    def _stacked(self, index: int, part: str, suffix: str, shape: list[int]) -> torch.Tensor:
        model = self.description
        stacked = torch.empty(model.num_experts, *shape, device=self.device)
        for expert in range(model.num_experts):
            for projection, rows in zip(model.projections(part), model.projection_rows(part), strict=True):
                name = f"{model.expert_tensor(model.moe_layers[index], expert, projection)}.{suffix}"
                stacked[expert, rows] = self._read(name)
        return stacked

    @contextmanager
    def loaded_layer(self, index: int) -> Iterator[DecoderLayer]:
        """The decoder layer with its weights, which are dropped at the end of the block."""
        module = self.load_layer(index)
        try:
            yield DecoderLayer(module, *self._arguments[index], self.description, self.device)
        finally:
            module.to("meta")
            release_freed_memory()

    def embed(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """tokens: int64 [sequences, length] -> float32 hidden states in batches of about BATCH_TOKENS tokens, in host
        memory.

        Also notes the arguments every decoder layer is to be called with; they hold for this length only.
        """
        self.note_layer_arguments(tokens.shape[1])
        return [batch.cpu() for batch in self.embedded_batches(tokens)]

    def embedded_batches(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """What embed returns, one batch at a time, on the model's device; the embeddings are in memory until the
        last."""
        embedding = self.module.get_input_embeddings()
        self._load_outer(self._embedding, embedding)
        multiplier = self._config_factor(self.description.family.embedding_multiplier)
        for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
            yield embedding(batch.to(self.device)) * multiplier
        embedding.to("meta")

    def note_layer_arguments(self, length: int) -> None:
        """Run the model's own forward on one sequence with its layers replaced by recorders."""
        decoder, layers = self.module.model, self.module.model.layers
        recorders = nn.ModuleList(_Recorder(layer, self.description.family.layer_outputs) for layer in layers)
        decoder.layers = recorders
        try:
            with torch.no_grad():
                nothing = torch.zeros(1, length, self.description.hidden, device=self.device)
                decoder(inputs_embeds=nothing, use_cache=False)
        finally:
            decoder.layers = layers
        self._arguments = {index: (recorder.args, recorder.kwargs) for index, recorder in enumerate(recorders)}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last layer's output [..., hidden], on any device -> float32 logits [..., vocabulary], on the model's. lm_head
        stays in memory until release_head."""
        return self.head_logits(self.head_inputs(hidden))

    def head_logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """What logits does with head_inputs."""
        logits = self.head()(inputs.to(self.device))
        logits = logits / self._config_factor(self.description.family.logits_divisor)
        softcap = self.description.family.logits_softcap
        limit = None if softcap is None else getattr(self.description.config, softcap)
        return logits if limit is None else torch.tanh(logits / limit) * limit

    def head(self) -> nn.Linear:
        """lm_head with its weights, which stay in memory until release_head."""
        self._load_outer(HEAD_MODULE, self.module.lm_head)
        return self.module.lm_head

    def head_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """What lm_head is called with where the last layer's output is hidden: [..., hidden] -> same shape, on the
        model's device."""
        return self.final_norm(hidden.to(self.device))

    @property
    def final_norm(self) -> nn.Module:
        """Of the last layer's output."""
        return getattr(self.module.model, self.description.family.final_norm)

    def reload_final_norm(self) -> None:
        """Read it again from a source that has other values by now."""
        norm = self.final_norm.to("meta")
        self._load_outer(TEXT_MODULE + self.description.family.final_norm, norm)

    def _config_factor(self, key: str | None) -> float:
        return 1.0 if key is None else getattr(self.description.config, key)

    def release_head(self) -> None:
        self.module.lm_head.to("meta")

    def load_everything(self) -> PreTrainedModel:
        """The whole model in memory, float32, as a transformers model."""
        for index in range(self.num_layers):
            self.load_layer(index)
        self._load_outer(self._embedding, self.module.get_input_embeddings())
        self._load_outer(HEAD_MODULE, self.module.lm_head)
        return self.module


def find_linear(layer: nn.Module, name: str) -> nn.Linear | None:
    """The linear of that name in transformers' module tree where this decoder layer has it (dense layers have other
    ones than MoE layers)."""
    try:
        module = layer.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None


def stack_name(model: MoeModel, part: str) -> str:
    """What transformers' module calls the weights of a part of all experts."""
    return {"gate_up": "gate_up_proj" if model.function.gated else "up_proj", "down": "down_proj"}[part]


def bias_name(model: MoeModel, part: str) -> str:
    """Likewise, their biases."""
    return f"{stack_name(model, part)}_bias"


def _in_layer(name: str) -> bool:
    """Whether a parameter of transformers' module tree belongs to a decoder layer."""
    return name.startswith(f"{TEXT_MODULE}{LAYERS}.")


class _Recorder(nn.Module):
    """Stands in for a decoder layer that returns so many values: passes the hidden states on and keeps the other
    arguments. What else the model asks of the layer, the layer answers."""

    def __init__(self, layer: nn.Module, outputs: int):
        super().__init__()
        self.outputs = outputs
        self._layer = (layer,)  # a module of its own here would be one of ours

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(
        self, hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        self.args, self.kwargs = args, kwargs
        return hidden if self.outputs == 1 else (hidden, *[None] * (self.outputs - 1))


def skeleton(description: MoeModel) -> PreTrainedModel:
    """The transformers model without weights; rotary tables, which no file holds, are computed."""
    config = description.config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the weights arrive here dequantised
    try:
        with torch.device("meta"):
            # whatever config.json names; by its definition where the class has nothing else
            attention = "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, experts_implementation="eager", attn_implementation=attention
            )
        rotary = _rotary(model, description)
        if rotary is not None:
            setattr(model.model, description.family.rotary, type(rotary)(config=config))
        description.family.fill_buffers(model)
    except Exception as error:  # of a value that no layer can be made of, whichever it is
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"{description.path / 'config.json'}: transformers cannot build the model: {reason}"
        ) from error
    stored = model.state_dict().keys()  # buffers that files hold come with their layer
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in stored]
    if empty:  # torch multiplies by them without complaint and returns garbage
        raise UnsupportedModelError(
            f"{description.path}: no file holds {empty[0]}, and its adapter does not compute it."
        )
    return model.eval()


def _rotary(model: PreTrainedModel, description: MoeModel) -> nn.Module | None:
    """Some models that could have one leave positions to Mamba layers."""
    return None if description.family.rotary is None else getattr(model.model, description.family.rotary)


def load_full_model(source: WeightSource) -> PreTrainedModel:
    """The whole model in memory, float32, for use as any transformers model."""
    return LayerwiseModel(source).load_everything()
