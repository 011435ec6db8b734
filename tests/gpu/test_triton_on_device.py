"""The correctness matrix of the Triton kernels on hardware, eagerly and inside a CUDA graph.

    pytest tests/gpu        in a process of its own: beside tests/kernels the kernels are already interpreted

Tolerance as in tests/kernels/test_triton_experts.py, twice as wide, because a device's exp and division differ from the
CPU's in the last place, which can move a requantised code by one.
"""

import pytest
import torch

from tests.kernels.matrices import FUNCTIONS, random_biases
from tests.kernels.triton_cases import Layer, random_layer, random_tokens
from vllm_mcmoe.kernels.expert_function import GPT_OSS, SILU
from vllm_mcmoe.kernels.packing import CODES, WIDTHS, Code
from vllm_mcmoe.kernels.reference import fused_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]

# one int8 code of an intermediate group of 128 off by one changes the output's norm by about 1 / (127 * sqrt(I))
TOLERANCE = 1e-3
MIXED = [1, 2, 3, 4, 8, 2, 3, 1]
ALL_CODES = [*CODES, Code(2, "trellis")]


@pytest.fixture(scope="module")
def backend():
    from triton.runtime import JITFunction

    from vllm_mcmoe.kernels.triton import experts, gemm

    if not isinstance(gemm.grouped_gemm_kernel, JITFunction):
        pytest.skip("the kernels were imported to be interpreted; run `pytest tests/gpu` by itself")
    return experts


def on_device(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in tensors)


def prepare(backend, layer: Layer) -> torch.nn.Module:
    return backend.TritonExperts.prepare(iter(layer.gate_up), iter(layer.down), **layer.announced())


def assert_agrees(
    found: torch.Tensor, layer: Layer, tokens: tuple[torch.Tensor, ...], biases: dict | None = None
) -> None:
    named = {f"{part}_bias": bias for part, bias in (biases or {}).items()}
    expected = fused_experts(*tokens, layer.gate_up, layer.down, function=layer.function, **named).double()
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert error < TOLERANCE


@pytest.mark.parametrize("code", CODES, ids=str)
def test_packing_on_the_device_can_be_undone(backend, code):
    from vllm_mcmoe.kernels.triton.layout import pack_experts

    layer = random_layer([code], 512, 256)
    stack = pack_experts(
        layer.gate_up,
        codes=[code],
        out_features=512,
        in_features=512,
        gated=True,
        stored_zeros=True,
        device=torch.device("cuda"),
    )
    assert torch.equal(stack.matrix(0).qweight.cpu(), layer.gate_up[0].qweight)


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_every_code_alone(backend, code, tokens):
    layer, inputs = random_layer([code] * 4, 512, 384), random_tokens(tokens, 512, 4, 2)
    assert_agrees(prepare(backend, layer)(*on_device(inputs)), layer, inputs)


@pytest.mark.parametrize("codes", [MIXED, ALL_CODES], ids=["scalar", "with trellis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 33, 130, 1024])
def test_all_codes_in_one_layer(backend, tokens, dtype, codes):
    layer, inputs = random_layer(codes, 1024, 512), random_tokens(tokens, 1024, len(codes), 2, dtype)
    found = prepare(backend, layer)(*on_device(inputs)).float()
    expected = fused_experts(*inputs, layer.gate_up, layer.down).float()
    assert (found.cpu() - expected).norm() / expected.norm() < max(TOLERANCE, torch.finfo(dtype).eps)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("intermediate", [640, 512])
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_every_function_with_biases(backend, function, intermediate, tokens):
    """Sizes of which 256 features, a tile, do and do not divide the rows of experts without a gate."""
    layer = random_layer(MIXED, 1024, intermediate, function=function)
    inputs = random_tokens(tokens, 1024, len(MIXED), 2)
    biases = random_biases(len(MIXED), 1024, intermediate, function)
    experts = prepare(backend, layer)
    experts.set_biases(**biases)
    assert_agrees(experts(*on_device(inputs)), layer, inputs, biases)


@pytest.mark.parametrize("block_tokens", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("split_k", [1, 2, 3])
def test_every_block_size(backend, monkeypatch, block_tokens, split_k):
    tiles = backend.Tiles(block_tokens, max(2, block_tokens // 16), 2, split_k, split_k)
    if block_tokens < backend.describe_device(torch.device("cuda")).smallest_block:
        pytest.skip("AMD's matrix instructions are 16 wide")
    monkeypatch.setattr(backend, "choose_tiles", lambda *_: tiles)
    layer, inputs = random_layer(MIXED, 1024, 640), random_tokens(50, 1024, len(MIXED), 2)
    assert_agrees(prepare(backend, layer)(*on_device(inputs)), layer, inputs)


def test_512_experts_most_of_them_idle(backend):
    bits = [WIDTHS[expert % len(WIDTHS)] for expert in range(512)]
    layer, inputs = random_layer(bits, 128, 128), random_tokens(3, 128, 512, 8)
    assert_agrees(prepare(backend, layer)(*on_device(inputs)), layer, inputs)


def test_an_id_of_minus_one_contributes_nothing(backend):
    layer, (x, topk_weights, topk_ids) = random_layer(MIXED, 256, 256), random_tokens(9, 256, len(MIXED), 3)
    topk_ids[0, 1] = topk_ids[2, 0] = -1
    topk_ids[4] = -1
    inputs = (x, topk_weights, topk_ids)
    assert_agrees(prepare(backend, layer)(*on_device(inputs)), layer, inputs)


def test_16384_tokens(backend):
    layer, inputs = random_layer([2, 3], 256, 128), random_tokens(16384, 256, 2, 1)
    assert_agrees(prepare(backend, layer)(*on_device(inputs)), layer, inputs)


def test_two_runs_give_the_same_bits(backend):
    layer, inputs = random_layer(MIXED, 1024, 512), on_device(random_tokens(77, 1024, len(MIXED), 4))
    experts = prepare(backend, layer)
    assert torch.equal(experts(*inputs), experts(*inputs))


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_programs_that_add_up_what_others_stored_always_find_it(backend, monkeypatch, tokens):
    """Whichever arrives last: a store that came too late would change some run of many."""
    monkeypatch.setattr(backend, "choose_tiles", lambda *_: backend.Tiles(16, 2, 3, 4, 4))
    layer, inputs = random_layer(MIXED, 2048, 2048), random_tokens(tokens, 2048, len(MIXED), 2)
    experts, held = prepare(backend, layer), on_device(inputs)
    first = experts(*held)
    assert_agrees(first, layer, inputs)
    assert all(torch.equal(experts(*held), first) for _ in range(300))


@pytest.mark.parametrize("function", [SILU, GPT_OSS], ids=["plain", "clamped, with biases"])
def test_nothing_is_compiled_after_loading(backend, function):
    from vllm_mcmoe.kernels.triton import gemm, routing
    from vllm_mcmoe.kernels.triton import prepare as prepare_module

    kernels = (gemm.grouped_gemm_kernel, prepare_module.prepare_kernel, routing.combine_kernel)

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    layer = prepare(backend, random_layer([1, 2], 1280, 1152, function=function))
    if function == GPT_OSS:
        layer.set_biases(**random_biases(2, 1280, 1152))
    before = compiled()
    layer.compile_kernels(codes=map(Code, [1, 2, 3]), top_k=2, dtype=torch.bfloat16)
    at_load = compiled()
    assert at_load > before
    for tokens in (1, 4, 5, 37, 300, 4097):
        layer(*on_device(random_tokens(tokens, 1280, 2, 2, torch.bfloat16)))
    assert compiled() == at_load


@pytest.mark.parametrize("tokens", [1, 8, 64, 256])
def test_a_captured_graph_follows_new_routings(backend, tokens):
    """Grids and allocations come from shapes: the graph of one routing must be right for every other."""
    layer = random_layer(MIXED, 1024, 512)
    experts = prepare(backend, layer)
    held = on_device(random_tokens(tokens, 1024, len(MIXED), 2, seed=1))
    experts(*held)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(*held)
    for seed in (1, 2, 3):
        inputs = random_tokens(tokens, 1024, len(MIXED), 2, seed=seed)
        if seed == 3:
            inputs[2].fill_(5)  # every token to the same two slots of one expert
        for kept, new in zip(held, inputs, strict=True):
            kept.copy_(new)
        graph.replay()
        assert_agrees(out, layer, inputs)
