"""The Triton kernels, interpreted on the CPU with every check on, against the reference kernels.

Tolerance: the integer part is exact on both sides, so only the order of float32 sums differs. 2e-6 of the output's norm
is sixteen times float32's rounding; the measured error is 1e-7. A requantised intermediate may fall on the other side
of a half, which moves one code of hundreds by one; none does with these seeds.
"""

from unittest import mock

import pytest
import torch

from tests.kernels.matrices import FUNCTIONS, random_biases
from tests.kernels.triton_cases import Layer, random_layer, random_tokens
from tests.kernels.triton_interpreter import import_interpreted, programs_backwards, strict
from vllm_mcmoe.kernels.expert_function import GPT_OSS, ExpertFunction
from vllm_mcmoe.kernels.packing import TRELLIS_WIDTHS, WIDTHS, Code
from vllm_mcmoe.kernels.reference import fused_experts, linear_int8

triton_experts = import_interpreted("vllm_mcmoe.kernels.triton.experts")
launches = import_interpreted("vllm_mcmoe.kernels.triton.launches")
Tiles = triton_experts.Tiles

# exp(-x) of a very negative gate is infinite, and 1 / (1 + inf) is the right sigmoid
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

TOLERANCE = 2e-6
DECODE, PREFILL = Tiles(8, 2, 3), Tiles(64, 4, 3)
MIXED = [1, 2, 3, 4, 8, 2]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def prepare(layer: Layer, activations: str = "int8", biases: dict | None = None) -> torch.nn.Module:
    module = triton_experts.TritonExperts.prepare(
        iter(layer.gate_up), iter(layer.down), **layer.announced(), activations=activations, device="cpu"
    )
    if biases is not None:
        module.set_biases(**biases)
    return module


def run(
    layer: Layer,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    tiles: Tiles = DECODE,
    activations: str = "int8",
    biases: dict | None = None,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer through the interpreted kernels, with the given tiles."""
    with strict(), mock.patch.object(triton_experts, "choose_tiles", lambda *_: tiles):
        return prepare(layer, activations, biases)(x, topk_weights, topk_ids, expert_map)


def reference(
    layer: Layer,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    biases: dict | None = None,
) -> torch.Tensor:
    named = {f"{part}_bias": bias for part, bias in (biases or {}).items()}
    return fused_experts(x, topk_weights, topk_ids, layer.gate_up, layer.down, function=layer.function, **named)


def assert_agrees(
    layer: Layer,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    biases: dict | None = None,
    **how,
) -> None:
    found = run(layer, x, topk_weights, topk_ids, biases=biases, **how)
    assert found.dtype == x.dtype
    assert relative_error(found, reference(layer, x, topk_weights, topk_ids, biases)) < TOLERANCE


zeros_or_none = pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no zeros"])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tiles", [DECODE, PREFILL], ids=["decode", "prefill"])
@zeros_or_none
def test_every_width_alone(bits, tiles, zeros):
    layer = random_layer([bits] * 4, 256, 128, stored_zeros=zeros)
    assert_agrees(layer, *random_tokens(5, 256, 4, 2), tiles=tiles)


@pytest.mark.parametrize("tokens", [1, 2, 9, 130])
@zeros_or_none
def test_all_widths_in_one_layer(tokens, zeros):
    tiles = PREFILL if tokens == 130 else DECODE
    # of seed 0 without zeros, one code of one of 130 tokens does fall on the other side of a half
    layer = random_layer(MIXED, 256, 128, seed=1, stored_zeros=zeros)
    assert_agrees(layer, *random_tokens(tokens, 256, len(MIXED), 2), tiles=tiles)


@pytest.mark.parametrize("block_tokens", [8, 16, 64, 128])
def test_every_block_size(block_tokens):
    tiles = Tiles(block_tokens, 2, 3)
    assert_agrees(random_layer([3, 2], 128, 128), *random_tokens(35, 128, 2, 2), tiles=tiles)


def test_one_group_of_inputs():
    assert_agrees(random_layer(MIXED, 128, 128), *random_tokens(3, 128, len(MIXED), 2))


def test_long_inputs_and_a_hidden_size_that_fills_no_whole_tile():
    assert_agrees(random_layer([3, 4], 128 * 15, 128), *random_tokens(1, 128 * 15, 2, 2))


@pytest.mark.parametrize("tokens", [2, 9], ids=["few", "many"])
@pytest.mark.parametrize(("gate_up", "down"), [(2, 1), (1, 3), (4, 2)])
def test_split_k_gives_the_same_sums(gate_up, down, tokens):
    """Five and three groups divide by none of these: the last part is shorter, or empty."""
    tiles = Tiles(8, 2, 3, gate_up_split_k=gate_up, down_split_k=down)
    assert_agrees(random_layer([2, 3, 8], 640, 384), *random_tokens(tokens, 640, 3, 2), tiles=tiles)


def test_more_parts_and_slots_than_are_added_at_a_time():
    tiles = Tiles(8, 2, 3, gate_up_split_k=9, down_split_k=9)
    assert_agrees(random_layer([2] * 6, 1280, 1152), *random_tokens(2, 1280, 6, 3), tiles=tiles)


@pytest.mark.parametrize("tokens", [3, 9], ids=["few", "many"])
def test_the_order_in_which_programs_arrive_changes_no_bit(tokens):
    """The first program of a launch is then the last to arrive, and adds up what the others stored."""
    tiles = Tiles(8, 2, 3, gate_up_split_k=2, down_split_k=2)
    layer, inputs = random_layer([2, 3, 8], 640, 384), random_tokens(tokens, 640, 3, 2)
    forwards = run(layer, *inputs, tiles=tiles)
    with programs_backwards():
        assert torch.equal(run(layer, *inputs, tiles=tiles), forwards)
    assert relative_error(forwards, reference(layer, *inputs)) < TOLERANCE


def test_blocks_beyond_one_group_of_them():
    """More blocks than go through the tiles together, in a number that divides by nothing."""
    bits = [2, 3] * 10
    assert_agrees(random_layer(bits, 384, 256), *random_tokens(11, 384, len(bits), 3))


def test_sixty_four_experts_most_of_them_idle():
    bits = [WIDTHS[expert % len(WIDTHS)] for expert in range(64)]
    assert_agrees(random_layer(bits, 128, 128), *random_tokens(2, 128, 64, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations(dtype):
    """Both sides round the same float32 sums; one unit of the last place where a sum is near a half."""
    layer, tokens = random_layer(MIXED, 256, 128), random_tokens(9, 256, len(MIXED), 2, dtype)
    found, expected = run(layer, *tokens), reference(layer, *tokens)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_an_id_of_minus_one_contributes_nothing_and_leaves_its_slot_defined():
    layer, (x, topk_weights, topk_ids) = random_layer(MIXED, 256, 128), random_tokens(6, 256, len(MIXED), 3)
    topk_ids[0, 1] = topk_ids[2, 0] = topk_ids[2, 2] = -1
    topk_ids[4] = -1
    found = run(layer, x, topk_weights, topk_ids)
    assert relative_error(found, reference(layer, x, topk_weights, topk_ids)) < TOLERANCE
    assert torch.equal(found[4], torch.zeros(256))


def test_every_id_minus_one_gives_zeros():
    x, topk_weights, topk_ids = random_tokens(3, 128, 2, 2)
    split = Tiles(8, 2, 3, gate_up_split_k=2, down_split_k=2)
    for tiles in (DECODE, split):
        found = run(random_layer([2, 3], 128, 128), x, topk_weights, topk_ids.fill_(-1), tiles=tiles)
        assert torch.equal(found, torch.zeros(3, 128))


def test_zero_tokens_give_zero_rows():
    found = run(random_layer([2, 3], 128, 128), *random_tokens(0, 128, 2, 2))
    assert found.shape == (0, 128)


def test_a_token_of_zeros_gives_zeros():
    layer, (x, topk_weights, topk_ids) = random_layer([2, 3], 128, 128), random_tokens(3, 128, 2, 2)
    x[1] = 0
    assert torch.equal(run(layer, x, topk_weights, topk_ids)[1], torch.zeros(128))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_expert_map_selects_this_ranks_experts(rank):
    """Global experts 0, 2, 4 live on rank 0 and 1, 3, 5 on rank 1; the two ranks' outputs add up to the whole."""
    whole, (x, topk_weights, topk_ids) = random_layer(MIXED, 256, 128), random_tokens(7, 256, len(MIXED), 2)
    mine = Layer(whole.gate_up[rank::2], whole.down[rank::2], 256, 128)
    expert_map = torch.tensor([e // 2 if e % 2 == rank else -1 for e in range(len(MIXED))], dtype=torch.int32)
    found = run(mine, x, topk_weights, topk_ids, expert_map=expert_map)
    kept = torch.where(topk_ids % 2 == rank, topk_ids, -1)
    assert relative_error(found, reference(whole, x, topk_weights, kept)) < TOLERANCE


def test_int64_ids_are_taken_as_they_are():
    x, topk_weights, topk_ids = random_tokens(3, 128, 2, 2)
    assert_agrees(random_layer([2, 3], 128, 128), x, topk_weights, topk_ids.long())


def test_many_tokens_are_computed_in_chunks():
    with mock.patch.object(triton_experts, "TOKENS_PER_CHUNK", 4):
        assert_agrees(random_layer([2, 3], 128, 128), *random_tokens(9, 128, 2, 2))


def test_the_inline_assembly_computes_the_same():
    with mock.patch.object(launches, "_has_ptx", lambda _: True):
        assert_agrees(random_layer(MIXED, 128, 128), *random_tokens(3, 128, len(MIXED), 2))


TRELLIS = [Code(bits, "trellis") for bits in TRELLIS_WIDTHS]
ALL_CODES = [TRELLIS[1], 2, TRELLIS[0], 3, TRELLIS[2], 8, TRELLIS[3], 4, 1]
plain_or_assembly = pytest.mark.parametrize("inline_asm", [False, True], ids=["plain", "assembly"])


@pytest.mark.parametrize("code", TRELLIS, ids=str)
@plain_or_assembly
def test_every_trellis_code_alone(code, inline_asm):
    """256 x 128 weights of either matrix: every entry of the table, at every place of a ring."""
    with mock.patch.object(launches, "_has_ptx", lambda _: inline_asm):
        assert_agrees(random_layer([code], 128, 128), *random_tokens(2, 128, 1, 1))


@pytest.mark.parametrize(
    ("tokens", "tiles", "zeros"),
    [(3, DECODE, True), (9, Tiles(8, 2, 3, 2, 2), False), (40, Tiles(64, 4, 3), True)],
    ids=["few", "split-K", "prefill"],
)
def test_trellis_and_scalar_codes_in_one_layer(tokens, tiles, zeros):
    layer = random_layer(ALL_CODES, 256, 256, stored_zeros=zeros)
    with mock.patch.object(launches, "_has_ptx", lambda _: True):
        assert_agrees(layer, *random_tokens(tokens, 256, len(ALL_CODES), 2), tiles=tiles)


def test_trellis_codes_in_one_projection_order_the_inputs_of_both():
    """The other one's experts are scalar, their inputs in the order of rings all the same."""
    trellis, scalar = random_layer([TRELLIS[1]] * 2, 256, 128), random_layer([2, 4], 256, 128)
    call = random_tokens(3, 256, 2, 2)
    with mock.patch.object(launches, "_has_ptx", lambda _: True):
        assert_agrees(Layer(trellis.gate_up, scalar.down, 256, 128), *call)
        assert_agrees(Layer(scalar.gate_up, trellis.down, 256, 128), *call)


@pytest.mark.parametrize("function", [GPT_OSS, ExpertFunction("relu2", gated=False)], ids=str)
def test_trellis_codes_with_biases_and_other_functions(function):
    """Sizes that fill no whole tile."""
    layer = random_layer([TRELLIS[1], TRELLIS[2], 3], 384, 128, function=function)
    with mock.patch.object(launches, "_has_ptx", lambda _: True):
        assert_agrees(layer, *random_tokens(4, 384, 3, 2), biases=random_biases(3, 384, 128, function))


@plain_or_assembly
def test_trellis_codes_with_float_activations(inline_asm):
    layer, tokens = random_layer([*TRELLIS, 3], 128, 128), random_tokens(3, 128, 5, 2)
    with mock.patch.object(launches, "_has_ptx", lambda _: inline_asm):
        found = run(layer, *tokens, activations="float")
    expected = fused_experts(*tokens, layer.gate_up, layer.down, activations="float")
    assert relative_error(found, expected) < FLOAT_TOLERANCE


# float16 rounds x and the intermediate by at most 2**-12 each; a sum keeps less than both
FLOAT_TOLERANCE = 2**-11


@pytest.mark.parametrize(("split_k", "inline_asm"), [(1, True), (2, False)], ids=["fused, assembly", "split-K, plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_activations(dtype, split_k, inline_asm):
    layer, tokens = random_layer(MIXED, 256, 128), random_tokens(5, 256, len(MIXED), 2, dtype)
    tiles = Tiles(8, 2, 3, gate_up_split_k=split_k)
    with mock.patch.object(launches, "_has_ptx", lambda _: inline_asm):
        found = run(layer, *tokens, tiles=tiles, activations="float")
    expected = fused_experts(*tokens, layer.gate_up, layer.down, activations="float")
    assert relative_error(found, expected) < max(FLOAT_TOLERANCE, torch.finfo(dtype).eps)


@pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**100])
def test_float_activations_far_outside_float16s_range_are_kept(magnitude):
    """bfloat16 reaches there; a group's scale is a power of two, so the stored values are the same at any magnitude."""
    x, topk_weights, topk_ids = random_tokens(2, 256, 1, 1)

    def quantized(x: torch.Tensor) -> launches.Activations:
        routing = launches.Routing(topk_weights, topk_ids, None, 1, 8)
        return launches.prepare(launches.run_kernel, x, torch.float16, routing, torch.empty(1, dtype=torch.int32))

    with strict():
        usual, extreme = quantized(x), quantized(x * magnitude)
    assert torch.equal(extreme.values, usual.values)
    assert torch.equal(extreme.scales, usual.scales * magnitude)


def test_the_environment_can_ask_for_float_activations(monkeypatch):
    monkeypatch.setenv("VLLM_MCMOE_ACTIVATIONS", "float")
    with strict():
        assert prepare(random_layer([2], 128, 128), activations=None).float_activations
    monkeypatch.setenv("VLLM_MCMOE_ACTIVATIONS", "fp8")
    with strict(), pytest.raises(ValueError, match="VLLM_MCMOE_ACTIVATIONS='fp8': choose int8 or float"):
        prepare(random_layer([2], 128, 128), activations=None)


@pytest.mark.parametrize("split_k", [1, 2], ids=["fused", "after split-K"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_every_function(function, split_k):
    layer, (x, topk_weights, topk_ids) = random_layer([3], 256, 128, function=function), random_tokens(4, 256, 1, 1)
    x *= 20  # gates of +-20: limits and both tails are reached
    projected = linear_int8(x, layer.gate_up[0])
    assert projected.max() > 7 > -7 > projected.min()
    assert_agrees(layer, x, topk_weights, topk_ids, tiles=Tiles(8, 2, 3, gate_up_split_k=split_k))


@pytest.mark.parametrize(
    ("tokens", "tiles"),
    [(2, DECODE), (9, PREFILL), (2, Tiles(8, 2, 3, 4, 2))],
    ids=["decode", "prefill", "split-K"],
)
def test_biases_are_added_once(tokens, tiles):
    """Sizes that fill no whole tile, experts of every width, and down's bias left to another rank."""
    layer = random_layer(MIXED, 640, 384, function=GPT_OSS)
    biases = random_biases(len(MIXED), 640, 384)
    call = random_tokens(tokens, 640, len(MIXED), 2)
    assert_agrees(layer, *call, tiles=tiles, biases=biases)
    assert_agrees(layer, *call, tiles=tiles, biases=biases | {"down": None})


@pytest.mark.parametrize(
    ("intermediate", "tiles", "activations"),
    [
        (128, DECODE, "int8"),
        (256, DECODE, "int8"),
        (384, DECODE, "int8"),
        (384, PREFILL, "int8"),
        (384, Tiles(8, 2, 3, 2, 1), "int8"),
        (256, Tiles(8, 2, 3, 2, 1), "int8"),
        (384, DECODE, "float"),
        (384, PREFILL, "float"),
    ],
    ids=str,
)
def test_experts_without_a_gate_have_two_groups_in_a_tile(intermediate, tiles, activations):
    """The second of which is not there where groups are odd in number."""
    function = ExpertFunction("relu2", gated=False)
    layer = random_layer(MIXED, 256, intermediate, function=function)
    biases = random_biases(len(MIXED), 256, intermediate, function)
    call = random_tokens(5, 256, len(MIXED), 2)
    found = run(layer, *call, tiles=tiles, activations=activations, biases=biases)
    named = {f"{part}_bias": bias for part, bias in biases.items()}
    expected = fused_experts(*call, layer.gate_up, layer.down, function=function, activations=activations, **named)
    bound = TOLERANCE if activations == "int8" else FLOAT_TOLERANCE
    assert relative_error(found, expected) < bound


@pytest.mark.parametrize("row", [3, 128 + 3], ids=["gate", "up"])
def test_nan_passes_through_limits(row):
    layer = random_layer([4], 128, 128, function=GPT_OSS)
    bias = torch.zeros(1, 256)
    bias[0, row] = torch.nan
    found = run(layer, *random_tokens(2, 128, 1, 1), biases={"gate_up": bias, "down": None})
    assert found.isnan().all()


def test_an_unsupported_device_is_refused():
    with pytest.raises(ValueError, match="CUDA and ROCm devices, found 'cpu'"):
        prepare(random_layer([2], 128, 128))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a device")
def test_a_missing_device_is_named():
    with pytest.raises(ValueError, match="torch sees none"):
        layer = random_layer([2], 128, 128)
        triton_experts.TritonExperts.prepare(iter(layer.gate_up), iter(layer.down), **layer.announced())


def test_an_unsupported_dtype_is_refused():
    x, topk_weights, topk_ids = random_tokens(1, 128, 1, 1, torch.float64)
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        run(random_layer([2], 128, 128), x, topk_weights, topk_ids)


def test_the_layer_is_one_opaque_operation_under_torch_compile():
    """The fake implementation has the shape, dtype and device of the real one."""
    x, topk_weights, topk_ids = random_tokens(3, 128, 2, 2)
    with strict():
        experts = prepare(random_layer([2, 3], 128, 128))
        torch.library.opcheck(
            torch.ops.vllm_mcmoe.triton_experts.default,
            experts.arguments(x, topk_weights, topk_ids, None),
            test_utils=("test_schema", "test_faketensor"),
        )
