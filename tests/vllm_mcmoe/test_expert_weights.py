"""Loading one layer's expert tensors as vLLM does: by parameter, shard and global expert id."""

import sys

import pytest
import torch

from vllm_mcmoe.checkpoint import EXPONENTS, FORMAT_VERSION, VERSIONS, ZEROS, matrix_tensors, tensor_dtypes
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.expert_weights import PROJECTIONS, LayerWeights, Shard, exact_name
from vllm_mcmoe.kernels.expert_function import GPT_OSS, ExpertFunction
from vllm_mcmoe.kernels.packing import GROUP_SIZE, Code, PackedMatrix, StoredMatrix, group_count, pack_codes, padded
from vllm_mcmoe.kernels.reference import fused_experts
from vllm_mcmoe.kernels.trellis import TrellisMatrix, pack_trellis

LAYER = "model.layers.0.mlp.experts"
HIDDEN, INTERMEDIATE = 256, 512
GATE_UP_BITS, DOWN_BITS = (1, 2, 3, 4), (8, 1, 2, 3)


VERSION = FORMAT_VERSION  # of the matrices and layers made here; those of version 3 have trellis codes below 4 bits


@pytest.fixture(autouse=True, params=VERSIONS, ids="version {}".format)
def version(request, monkeypatch) -> int:
    monkeypatch.setattr(sys.modules[__name__], "VERSION", request.param)
    return request.param


def code_of(bits: int) -> Code:
    return Code(bits, "trellis" if VERSION == 3 and bits < 4 else "scalar")


def random_matrix(bits: int, rows: int, columns: int, seed: int) -> StoredMatrix:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = group_count(columns)
    scales = torch.rand(rows, groups, generator=generator).half() + 0.5
    zeros = torch.rand(rows, groups, generator=generator).half()
    if VERSION > 1:
        scales = (scales * 32).round() / 32  # from 0.5 to 1.5: five bits of mantissa
    if code_of(bits).kind == "trellis":
        return TrellisMatrix(bits, pack_trellis(padded_codes(codes), bits), scales)
    return PackedMatrix(bits, pack_codes(codes, bits), scales, zeros if VERSION == 1 and bits > 1 else None)


def padded_codes(codes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % GROUP_SIZE))


@pytest.fixture
def checkpoint(version) -> dict[tuple[int, str], StoredMatrix]:
    return random_checkpoint(HIDDEN, INTERMEDIATE)


def random_checkpoint(hidden: int, intermediate: int) -> dict[tuple[int, str], StoredMatrix]:
    """(expert, shard id) -> matrix: w1 gate, w3 up, w2 down."""
    matrices = {}
    for expert, (gate_up, down) in enumerate(zip(GATE_UP_BITS, DOWN_BITS, strict=True)):
        matrices[expert, "w1"] = random_matrix(gate_up, intermediate, hidden, seed=10 * expert)
        matrices[expert, "w3"] = random_matrix(gate_up, intermediate, hidden, seed=10 * expert + 1)
        matrices[expert, "w2"] = random_matrix(down, hidden, intermediate, seed=10 * expert + 2)
    return matrices


def layer_weights(
    shard: Shard, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, *, allocate: bool = True, **more
) -> LayerWeights:
    weights = LayerWeights(
        LAYER,
        shard,
        gate_up_codes=[code_of(GATE_UP_BITS[e]) for e in shard.expert_ids],
        down_codes=[code_of(DOWN_BITS[e]) for e in shard.expert_ids],
        model_hidden_size=hidden,
        model_intermediate_size=intermediate,
        version=VERSION,
        **more,
    )
    if allocate:
        weights.allocate()
    return weights


def load(
    weights: LayerWeights, checkpoint: dict[tuple[int, str], StoredMatrix], skip: str = "", device: str = "cpu"
) -> None:
    """Feed every tensor through the parameter's loader, except the one named `expert.shard.suffix`."""
    parameters = dict(weights.parameters())
    for (expert, shard_id), matrix in checkpoint.items():
        for suffix, tensor in matrix_tensors(matrix, VERSION).items():
            if skip == f"{expert}.{shard_id}.{suffix}":
                continue
            parameter = parameters[f"{'w2' if shard_id == 'w2' else 'w13'}_{suffix}"]
            parameter.weight_loader(
                param=parameter, loaded_weight=tensor.to(device), weight_name="", shard_id=shard_id, expert_id=expert
            )


def gate_up(checkpoint, expert: int) -> torch.Tensor:
    """float32 [2 * INTERMEDIATE, HIDDEN]"""
    return torch.cat([checkpoint[expert, "w1"].dequantize(), checkpoint[expert, "w3"].dequantize()])


def test_gate_and_up_are_stacked_and_widths_kept_apart(checkpoint):
    weights = layer_weights(Shard(expert_ids=(0, 1, 2, 3), tp_rank=0, tp_size=1))
    load(weights, checkpoint)
    weights.check_complete()
    for expert, (first, second) in enumerate(zip(weights.gate_up.matrices(), weights.down.matrices(), strict=True)):
        assert (first.bits, second.bits) == (GATE_UP_BITS[expert], DOWN_BITS[expert])
        assert torch.equal(first.dequantize(), gate_up(checkpoint, expert))
        assert torch.equal(second.dequantize(), checkpoint[expert, "w2"].dequantize())


def test_tensor_parallel_ranks_slice_rows_of_gate_up_and_groups_of_down(checkpoint):
    ranks = [layer_weights(Shard(expert_ids=(0, 1, 2, 3), tp_rank=rank, tp_size=2)) for rank in range(2)]
    for weights in ranks:
        load(weights, checkpoint)
        weights.check_complete()
    for expert in range(4):
        slices = [list(weights.gate_up.matrices())[expert].dequantize().chunk(2) for weights in ranks]
        assert torch.equal(torch.cat([gate for gate, _ in slices]), checkpoint[expert, "w1"].dequantize())
        assert torch.equal(torch.cat([up for _, up in slices]), checkpoint[expert, "w3"].dequantize())
        columns = [list(weights.down.matrices())[expert].dequantize() for weights in ranks]
        assert torch.equal(torch.cat(columns, dim=1), checkpoint[expert, "w2"].dequantize())


@pytest.mark.parametrize(
    ("hidden", "intermediate", "tp_size"),
    [(576, 352, 1), (192, 1408, 2), (192, 352, 2), (256, 360, 3), (192, 160, 2)],
)
def test_ranks_of_any_sizes_add_up_to_the_experts_without_padding(hidden, intermediate, tp_size):
    """Against float weights of the model's own sizes; whole groups are shared out, evenly or not."""
    checkpoint = random_checkpoint(hidden, intermediate)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, hidden, generator=generator)
    topk_weights, topk_ids = (
        torch.rand(5, 2, generator=generator),
        torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3]]),
    )

    expected = torch.zeros(5, hidden)
    for token, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weights, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (checkpoint[expert, w].dequantize(in_features=hidden) @ x[token] for w in ("w1", "w3"))
            down = checkpoint[expert, "w2"].dequantize(in_features=intermediate)
            expected[token] += weight * (down @ (torch.nn.functional.silu(gate) * up))

    total, groups = torch.zeros(5, padded(hidden)), 0
    for rank in range(tp_size):
        weights = layer_weights(Shard((0, 1, 2, 3), rank, tp_size), hidden, intermediate)
        for _, parameter in weights.parameters():
            parameter.data.view(torch.uint8).fill_(255)  # NaN as fp16: what memory may hold before it is loaded
        load(weights, checkpoint)
        weights.check_complete()
        gate_up, down = list(weights.gate_up.matrices()), list(weights.down.matrices())
        x_padded = torch.nn.functional.pad(x, (0, padded(hidden) - hidden))
        total += fused_experts(x_padded, topk_weights, topk_ids, gate_up, down, activations="float")
        groups += weights.intermediate_size // 128
    assert groups == group_count(intermediate)
    # float32 sums in another order over at most 1408 products
    torch.testing.assert_close(total[:, :hidden], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not total[:, hidden:].any()


@pytest.mark.parametrize(("hidden", "intermediate", "tp_size"), [(576, 352, 1), (192, 360, 3), (256, 512, 2)])
@pytest.mark.parametrize("function", [GPT_OSS, ExpertFunction("relu2", gated=False)], ids=str)
def test_ranks_add_each_bias_once(function, hidden, intermediate, tp_size):
    """Biases come in any dtype, also where the start cache has the matrices and nothing else is read."""
    checkpoint = random_checkpoint(hidden, intermediate)
    if not function.gated:
        checkpoint = {place: matrix for place, matrix in checkpoint.items() if place[1] != "w3"}
    generator = torch.Generator().manual_seed(0)
    biases = {
        place: torch.randn(hidden if place[1] == "w2" else intermediate, generator=generator).bfloat16()
        for place in checkpoint
    }
    x = torch.randn(3, hidden, generator=generator)
    topk_weights, topk_ids = torch.rand(3, 2, generator=generator), torch.tensor([[0, 1], [2, 3], [3, 0]])

    def project(expert: int, shard_id: str, inputs: torch.Tensor) -> torch.Tensor:
        weight = checkpoint[expert, shard_id].dequantize(in_features=len(inputs))
        return weight @ inputs + biases[expert, shard_id].float()

    expected = torch.zeros(3, hidden)
    for token in range(3):
        for expert, weight in zip(topk_ids[token].tolist(), topk_weights[token], strict=True):
            parts = [project(expert, part, x[token]) for part in (("w1", "w3") if function.gated else ("w1",))]
            expected[token] += weight * project(expert, "w2", function(torch.cat(parts)))

    total = torch.zeros(3, padded(hidden))
    for rank in range(tp_size):
        shard = Shard((0, 1, 2, 3), rank, tp_size)
        weights, cached = (
            layer_weights(shard, hidden, intermediate, allocate=allocate, function=function, has_bias=True)
            for allocate in (True, False)
        )
        for loaded in (weights, cached):
            load(loaded, checkpoint)
            parameters = dict(loaded.parameters())
            for (expert, shard_id), bias in biases.items():
                parameter = parameters[f"{'w2' if shard_id == 'w2' else 'w13'}_bias"]
                parameter.weight_loader(parameter, bias, "", shard_id, expert)
            loaded.check_complete()
        assert torch.equal(weights.gate_up_bias, cached.gate_up_bias)
        assert (weights.down_bias is None) == (cached.down_bias is None) == (rank > 0)
        assert rank > 0 or torch.equal(weights.down_bias, cached.down_bias)
        total += fused_experts(
            torch.nn.functional.pad(x, (0, padded(hidden) - hidden)),
            topk_weights,
            topk_ids,
            list(weights.gate_up.matrices()),
            list(weights.down.matrices()),
            function=function,
            gate_up_bias=weights.gate_up_bias,
            down_bias=weights.down_bias,
            activations="float",
        )
    torch.testing.assert_close(total[:, :hidden], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not total[:, hidden:].any()


def test_a_missing_bias_is_named(checkpoint):
    weights = layer_weights(Shard((0, 1, 2, 3), 0, 1), has_bias=True)
    load(weights, checkpoint)
    with pytest.raises(FormatError, match=f"{LAYER}: 12 tensors are missing.*expert 0 w1 bias"):
        weights.check_complete()


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(7), r"expert 1, w2 bias: found .*\[7\], expected .*\[256\]"),
        (torch.full((HIDDEN,), torch.inf), "expert 1, w2 bias: has NaN or infinite values"),
    ],
)
def test_a_bias_that_cannot_be_one_is_refused(bias, message):
    weights = layer_weights(Shard((0, 1, 2, 3), 0, 1), has_bias=True, allocate=False)
    parameter = dict(weights.parameters())["w2_bias"]
    with pytest.raises(FormatError, match=message):
        parameter.weight_loader(parameter, bias, "", "w2", 1)


def test_a_rank_copies_its_slice_alone(checkpoint):
    """What the others keep is never read: vLLM hands over tensors mapped from files larger than memory."""
    weights = layer_weights(Shard((0, 1, 2, 3), tp_rank=1, tp_size=2))
    parameter = dict(weights.parameters())["w2_qweight"]
    sliced = []

    class Recording(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            if function is torch.Tensor.copy_:
                sliced.append(args[1].shape)
            return result

    loaded = checkpoint[0, "w2"].qweight.as_subclass(Recording)
    parameter.weight_loader(param=parameter, loaded_weight=loaded, weight_name="", shard_id="w2", expert_id=0)
    assert sliced == [(HIDDEN, 2, 128)]


def test_expert_parallel_ranks_take_their_own_experts_and_decline_the_others(checkpoint):
    weights = layer_weights(Shard(expert_ids=(1, 3), tp_rank=0, tp_size=1))
    load(weights, checkpoint)
    weights.check_complete()
    matrices = list(weights.gate_up.matrices())
    assert [matrix.bits for matrix in matrices] == [2, 4]
    assert torch.equal(matrices[1].dequantize(), gate_up(checkpoint, 3))
    again = layer_weights(Shard(expert_ids=(1, 3), tp_rank=0, tp_size=1))
    parameter = dict(again.parameters())["w13_scales"]
    scales = [matrix_tensors(checkpoint[expert, "w1"], VERSION)["scales"] for expert in range(4)]
    arguments = {"loaded_weight": scales[0], "weight_name": "", "shard_id": "w1"}
    assert parameter.weight_loader(parameter, expert_id=0, return_success=True, **arguments) is False
    arguments["loaded_weight"] = scales[3]
    assert parameter.weight_loader(parameter, expert_id=3, return_success=True, **arguments) is True


@pytest.mark.parametrize("missing", ["2.w1.qweight", "0.w2.zeros", "0.w2.exponents", "3.w3.scales"])
def test_a_missing_tensor_is_named(checkpoint, version, missing):
    if missing.rpartition(".")[2] not in tensor_dtypes(Code(8), version):
        pytest.skip(f"version {version} has no such tensor")
    weights = layer_weights(Shard(expert_ids=(0, 1, 2, 3), tp_rank=0, tp_size=1))
    load(weights, checkpoint, skip=missing)
    with pytest.raises(FormatError, match=f"{LAYER}: 1 tensors are missing.*expert {missing.replace('.', ' ')}"):
        weights.check_complete()


# of tensors that have a shape and a dtype, and nothing that could be read
WITHOUT_CONTENT = "meta"


def test_without_memory_tensors_are_noted_and_not_read(checkpoint):
    weights = layer_weights(Shard(expert_ids=(0, 1, 2, 3), tp_rank=0, tp_size=1), allocate=False)
    load(weights, checkpoint, device=WITHOUT_CONTENT)
    weights.check_complete()
    assert all(parameter.numel() == 0 for _, parameter in weights.parameters())


def test_without_memory_a_missing_tensor_is_named_all_the_same(checkpoint):
    weights = layer_weights(Shard(expert_ids=(0, 1, 2, 3), tp_rank=0, tp_size=1), allocate=False)
    load(weights, checkpoint, skip="2.w1.qweight", device=WITHOUT_CONTENT)
    with pytest.raises(FormatError, match=r"1 tensors are missing.*expert 2 w1 qweight"):
        weights.check_complete()


@pytest.mark.parametrize("allocate", [True, False])
def test_a_misshapen_tensor_is_named_with_what_was_expected(checkpoint, allocate):
    weights = layer_weights(Shard(expert_ids=(0, 1, 2, 3), tp_rank=0, tp_size=1), allocate=allocate)
    parameter = dict(weights.parameters())["w13_qweight"]
    wrong_width = checkpoint[3, "w1"].qweight  # 4 bits where the config says 2
    with pytest.raises(FormatError, match=r"expert 1, w1 qweight: found .*\[512, 2, 64\], expected .*\[512, 2, 32\]"):
        parameter.weight_loader(param=parameter, loaded_weight=wrong_width, weight_name="", shard_id="w1", expert_id=1)


@pytest.mark.parametrize("expert", [0, 1])
def test_zeros_that_the_format_has_not_are_refused(version, expert):
    """At 1 bit, and from version 2 on."""
    if version == 1 and expert == 1:
        pytest.skip("2 bits have zeros in version 1")
    weights = layer_weights(Shard(expert_ids=(0, 1, 2, 3), tp_rank=0, tp_size=1))
    parameter = dict(weights.parameters())["w13_zeros"]
    zeros = torch.ones(INTERMEDIATE, group_count(HIDDEN)).half()
    with pytest.raises(FormatError, match=rf"expert {expert}, w1 zeros: present .*but a matrix of {expert + 1}.bit"):
        parameter.weight_loader(param=parameter, loaded_weight=zeros, weight_name="", shard_id="w1", expert_id=expert)


def test_release_gives_the_memory_back_while_something_still_refers_to_the_parameters():
    weights = layer_weights(Shard(expert_ids=(0, 1, 2, 3), tp_rank=0, tp_size=1))
    kept = [parameter for _, parameter in weights.parameters()]
    assert sum(parameter.untyped_storage().nbytes() > 0 for parameter in kept) == 6  # three of each projection
    weights.release()
    assert not any(parameter.untyped_storage().nbytes() for parameter in kept)


def test_tensors_are_taken_under_exact_names_and_those_of_other_ranks_declined(checkpoint):
    shard = Shard(expert_ids=(1, 3), tp_rank=0, tp_size=1)
    expected, weights = layer_weights(shard), layer_weights(shard)
    load(expected, checkpoint)
    parameters = dict(weights.exact_parameters(len(GATE_UP_BITS)))
    assert all(parameter.numel() == 0 for parameter in parameters.values())
    projections = {shard_id: projection for projection, shard_id in PROJECTIONS.items()}
    for (expert, shard_id), matrix in checkpoint.items():
        for suffix, tensor in matrix_tensors(matrix, VERSION).items():
            parameter = parameters.pop(exact_name(expert, projections[shard_id], suffix))
            parameter.weight_loader(parameter, tensor)
    assert all(name.endswith((ZEROS, EXPONENTS)) for name in parameters)  # that this version, or 1 bit, has not
    weights.check_complete()
    for one, other in ((weights.gate_up, expected.gate_up), (weights.down, expected.down)):
        for found, wanted in zip(one.matrices(), other.matrices(), strict=True):
            assert torch.equal(found.dequantize(), wanted.dequantize())
