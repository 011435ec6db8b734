"""What vLLM may hand the loaders of a layer: it is refused by name, or the layer is what it would have been."""

import random

import pytest
import torch

from tests.fuzz.test_mutated_files import MUTATIONS
from tests.vllm_mcmoe import test_expert_weights
from tests.vllm_mcmoe.test_expert_weights import LAYER, layer_weights, random_checkpoint
from vllm_mcmoe.checkpoint import VERSIONS, matrix_tensors
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.expert_weights import LayerWeights, Shard

HIDDEN, INTERMEDIATE = 128, 256
Offer = tuple[str, str, int, torch.Tensor]  # parameter, shard id, expert, tensor


@pytest.fixture(params=VERSIONS, ids="version {}".format)
def offers(request, monkeypatch) -> list[Offer]:
    """Every tensor of a layer, as vLLM offers them."""
    monkeypatch.setattr(test_expert_weights, "VERSION", request.param)
    found = []
    for (expert, shard_id), matrix in random_checkpoint(HIDDEN, INTERMEDIATE).items():
        for suffix, tensor in matrix_tensors(matrix, request.param).items():
            found.append((f"{'w2' if shard_id == 'w2' else 'w13'}_{suffix}", shard_id, expert, tensor))
    return found


def misshapen(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    shapes = [tensor[:-1], tensor[..., :-1], tensor[:0], tensor[None], torch.cat([tensor, tensor]), tensor.sum()]
    if tensor.dim() > 1:
        shapes += [tensor[:, :-1], tensor.flatten(), tensor.transpose(0, 1)]
    return chance.choice(shapes)


def retyped(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    return tensor.to(chance.choice((torch.int8, torch.float32, torch.bfloat16, torch.int64, torch.bool)))


def not_finite(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice((torch.nan, torch.inf, -torch.inf))
    return tensor


def mutated(offers: list[Offer], chance: random.Random) -> list[Offer]:
    offers = list(offers)
    chance.shuffle(offers)
    at = chance.randrange(len(offers))
    parameter, shard_id, expert, tensor = offers[at]
    kind = chance.choice(("order", "shape", "dtype", "infinite", "missing", "twice", "foreign expert", "other expert"))
    if kind == "shape":
        offers[at] = parameter, shard_id, expert, misshapen(tensor, chance)
    elif kind == "dtype":
        offers[at] = parameter, shard_id, expert, retyped(tensor, chance)
    elif kind == "infinite" and tensor.dtype == torch.float16:
        offers[at] = parameter, shard_id, expert, not_finite(tensor, chance)
    elif kind == "missing":
        del offers[at]
    elif kind == "twice":
        offers.insert(chance.randrange(len(offers) + 1), offers[at])
    elif kind == "foreign expert":
        offers.insert(at, (parameter, shard_id, chance.choice((-1, 4, 1000)), tensor))
    elif kind == "other expert":
        offers[at] = parameter, shard_id, (expert + 1) % 4, tensor
    return offers


def loaded(offers: list[Offer], shard: Shard, when_needed: bool) -> LayerWeights:
    """when_needed: memory comes with the first tensor, and the layer is wanted as soon as its last one is there."""
    weights = layer_weights(shard, HIDDEN, INTERMEDIATE, allocate=not when_needed)
    completed = []
    if when_needed:
        weights.on_complete = lambda: completed.append(True)
    parameters = dict(weights.parameters())
    for parameter, shard_id, expert, tensor in offers:
        loader = parameters[parameter].weight_loader
        loader(param=parameters[parameter], loaded_weight=tensor, weight_name="", shard_id=shard_id, expert_id=expert)
    weights.check_complete()
    assert len(completed) == when_needed
    return weights


def contents(weights: LayerWeights) -> list[torch.Tensor]:
    matrices = [*weights.gate_up.matrices(), *weights.down.matrices()]
    return [t for matrix in matrices for t in (matrix.qweight, matrix.scales, matrix.zeros) if t is not None]


@pytest.mark.parametrize("when_needed", [False, True])
@pytest.mark.parametrize(
    "shard",
    [Shard((0, 1, 2, 3), 0, 1), Shard((0, 1, 2, 3), 1, 2), Shard((1, 2), 0, 1)],
    ids=["whole", "tensor parallel", "expert parallel"],
)
def test_tensors_of_a_layer(offers, shard, when_needed):
    expected = loaded(offers, shard, when_needed)
    refused = 0
    for seed in range(MUTATIONS):
        try:
            found = loaded(mutated(offers, random.Random(seed)), shard, when_needed)
        except FormatError as error:
            assert str(error).startswith(LAYER), f"seed {seed}: {error}"
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        else:
            assert all(map(torch.equal, contents(found), contents(expected))), f"seed {seed}: differs, and nothing said"
    assert MUTATIONS / 4 < refused < MUTATIONS
