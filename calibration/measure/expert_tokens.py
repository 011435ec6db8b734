"""One MoE layer seen from its experts: which tokens reach which expert, and the second moments GPTQ needs of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vllm_mcmoe.calibration.matrix.gptq import HessianFactor
from vllm_mcmoe.calibration.matrix.second_moment import SecondMoment
from vllm_mcmoe.calibration.model.activations import SCRATCH, Activations, ActivationStore, Rows
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer
from vllm_mcmoe.calibration.recipes import Recipe

# Below one token per column of a group, a group's Hessian is singular and says more about damping than about inputs.
MIN_EXPERT_TOKENS = 128
POOL_TOKENS = 4096  # tokens standing for the whole layer; 16 per input of a 256-wide Hessian, cheap everywhere

# Tokens whose intermediate is in memory at once: one expert's [tokens, 2*intermediate] would take 7.5 GB for 65536
# tokens of Mixtral-8x7B, and products of 2048 rows run at full speed.
CHUNK_TOKENS = 2048

# What an expert's quantiser takes: copies of its largest matrix and of a Hessian, and arrays of a chunk's tokens.
MATRIX_COPIES, HESSIAN_COPIES, CHUNK_COPIES = 8, 6, 4
SMALLEST_SHARE = 256 << 20  # bytes for experts at work, of the 2 GiB that are planned besides two layers


@dataclass(frozen=True)
class MoeInputs:
    """What a layer's experts are called with, for all N calibration tokens, in host memory.

    x             float32 [N, hidden], a tensor or rows on disk
    topk_ids      int64   [N, top_k]
    topk_weights  float32 [N, top_k], the routing weights that multiply the experts' outputs
    device        the layer's, where an expert's tokens are wanted
    """

    x: Rows
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    device: torch.device

    @property
    def num_tokens(self) -> int:
        return len(self.x)


class MoeInputsRecorder:
    """Collects, batch by batch, what a layer's experts are called with. tokens: rows in all; device: the layer's."""

    def __init__(self, store: ActivationStore, tokens: int, device: torch.device):
        self._x = store.create(f"{SCRATCH}moe-inputs", tokens)
        self._device = device
        self._routing: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self._x.append(x.detach())
        self._routing.append((topk_ids.cpu(), topk_weights.detach().float().cpu()))

    def finish(self) -> MoeInputs:
        topk_ids, topk_weights = (torch.cat(parts) for parts in zip(*self._routing, strict=True))
        return MoeInputs(self._x.finish().rows, topk_ids, topk_weights, self._device)


def moe_inputs(
    layer: DecoderLayer, hidden: Activations | list[torch.Tensor], store: ActivationStore | None = None
) -> MoeInputs:
    """Run a decoder layer up to its experts. hidden: the layer's input batches, [sequences, length, hidden] each;
    store: where the experts' inputs are kept, memory if not given."""
    tokens = len(hidden.rows) if isinstance(hidden, Activations) else sum(batch[..., 0].numel() for batch in hidden)
    recorder = MoeInputsRecorder(store or ActivationStore(), tokens, layer.device)

    def record(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        recorder.record(x, topk_ids, topk_weights)
        return torch.zeros_like(x)

    with torch.no_grad(), layer.experts_forward(record):
        for batch in hidden:
            layer(batch)
    return recorder.finish()


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens of one expert.

    index           int64   [n], positions among the layer's N tokens, in host memory
    routing_weight  float32 [n], on the layer's device
    rows            the experts' inputs of all N tokens, float32 [N, hidden], in host memory
    pooled          these are tokens of the whole layer, because the expert has too few of its own
    """

    index: torch.Tensor
    routing_weight: torch.Tensor
    rows: Rows
    pooled: bool = False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def x(self) -> torch.Tensor:
        """The expert's inputs, float32 [n, hidden], fetched anew to the layer's device each time."""
        return self._fetch(self.index)

    def _fetch(self, index: torch.Tensor) -> torch.Tensor:
        return self.rows[index].to(self.routing_weight.device)

    def chunks(self) -> Iterator[torch.Tensor]:
        """x in pieces of at most CHUNK_TOKENS."""
        for index in self.index.split(CHUNK_TOKENS):
            yield self._fetch(index)

    def at_most(self, count: int) -> "ExpertTokens":
        """count of the tokens, evenly spaced, or all if there are no more."""
        if len(self) <= count:
            return self
        chosen = evenly_spaced(len(self), count)
        return ExpertTokens(self.index[chosen], self.routing_weight[chosen], self.rows, self.pooled)


def evenly_spaced(total: int, count: int) -> torch.Tensor:
    """int64 [count], of 0 to total - 1."""
    return torch.arange(count) * total // count


def tokens_of(inputs: MoeInputs, expert: int) -> ExpertTokens:
    """The tokens routed to an expert."""
    index, slot = (inputs.topk_ids == expert).nonzero(as_tuple=True)
    return ExpertTokens(index, inputs.topk_weights[index, slot].to(inputs.device), inputs.x)


def calibration_tokens(inputs: MoeInputs, expert: int) -> ExpertTokens:
    """The tokens an expert's Hessians are made of.

    Its own; with fewer than MIN_EXPERT_TOKENS of them, up to POOL_TOKENS of the layer's tokens instead, evenly spaced
    and all of routing weight 1: an expert that calibration hardly saw is then quantised for the layer's typical input,
    and the second moment keeps full rank.
    """
    own = tokens_of(inputs, expert)
    if len(own) >= MIN_EXPERT_TOKENS:
        return own
    index = evenly_spaced(inputs.num_tokens, min(POOL_TOKENS, inputs.num_tokens))
    return ExpertTokens(index, torch.ones(len(index), device=inputs.device), inputs.x, pooled=True)


def hessian_weights(tokens: ExpertTokens, weighting: str, gradient_norms: torch.Tensor | None) -> torch.Tensor | None:
    """Weight of each token in its expert's Hessians, float32 [n], None for all alike.

    weighting: as Recipe.hessian_weighting. gradient_norms: float32 [N], squared norms of the loss gradient at the
    layer's output, in host memory, needed for "gradient".
    """
    if weighting == "none":
        return None
    weights = tokens.routing_weight.square()
    if weighting == "gradient":
        weights = weights * gradient_norms[tokens.index].to(weights.device)
    return weights


def experts_at_once(description: MoeModel, device: torch.device, layer_bytes: int) -> int:
    """How many experts of a layer may be worked on side by side: as many as take no more than the layer itself does in
    float32, layer_bytes, for which memory is planned twice (docs/design.md, Memory and resuming). On a GPU one after
    another."""
    if device.type != "cpu":
        return 1
    shapes = description.part_shapes().values()
    matrix, width = max(rows * columns for rows, columns in shapes), max(max(shape) for shape in shapes)
    columns = max(columns for _, columns in shapes)
    floats = MATRIX_COPIES * matrix + HESSIAN_COPIES * columns**2 + CHUNK_COPIES * CHUNK_TOKENS * width
    return max(1, max(layer_bytes, SMALLEST_SHARE) // (4 * floats))


Transform = Callable[[torch.Tensor], torch.Tensor]


def build_factor(
    tokens: ExpertTokens, weights: torch.Tensor | None, transform: Transform | None, recipe: Recipe, name: str
) -> HessianFactor:
    """Of the weighted second moment of transform(x), or of x itself. weights: float32 [n] or None, all alike."""
    return HessianFactor.build(second_moment(tokens, weights, transform), recipe.gptq, name=name)


def second_moment(tokens: ExpertTokens, weights: torch.Tensor | None, transform: Transform | None) -> torch.Tensor:
    """sum_t weight_t y_t y_t^T with y = transform(x), float32 [width, width], exactly symmetric; one chunk of tokens in
    memory."""
    moment, start = SecondMoment(), 0
    for x in tokens.chunks():
        y = x if transform is None else transform(x)
        moment.add(y, None if weights is None else weights[start : start + len(y)])
        start += len(y)
    return moment.matrix()
