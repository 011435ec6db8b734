"""The CPU kernels, on every instruction set of this machine, against the reference."""

import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.matrices import FUNCTIONS, random_biases, random_call, random_layer
from vllm_mcmoe.kernels.cpu import ISA_VARIABLE, CpuExperts, available_isas, select_isa
from vllm_mcmoe.kernels.cpu.compiled import compile_layer
from vllm_mcmoe.kernels.cpu.isa import has_vbmi
from vllm_mcmoe.kernels.cpu.layout import SCALAR_WITH_ZEROS, TRELLIS, TRELLIS_VBMI
from vllm_mcmoe.kernels.cpu.op import MAX_TOKENS
from vllm_mcmoe.kernels.expert_function import GPT_OSS
from vllm_mcmoe.kernels.packing import CODES, Code, pack_planes
from vllm_mcmoe.kernels.reference import ReferenceExperts
from vllm_mcmoe.kernels.trellis import decode, trellis_planes

HIDDEN, INTERMEDIATE = 384, 256  # 3 and 2 groups: neither a power of two nor the same
ALL_ISAS = ("amx", "avx512_vnni", "avx_vnni", "avx2", "portable")
MIXED = list(CODES)
EXPERTS = len(MIXED)
TRELLIS_CODES = [code for code in CODES if code.kind == "trellis"]

# The integers are exact, so backends differ by the rounding of float32 sums of 3 + 2 groups and by exp's last place:
# some units of 6e-8 of the largest output. An intermediate value on the edge between two int8 codes may go either way:
# one step of 1/127 of one of 256 inputs, seldom; the data here has none.
TOLERANCE = 2e-6


@pytest.fixture(params=ALL_ISAS)
def isa(request, monkeypatch):
    if request.param not in available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_agrees(layer: dict, call: tuple, biases: dict | None = None) -> None:
    modules = CpuExperts.prepare(**layer), ReferenceExperts.prepare(**layer)
    if biases is not None:
        for module in modules:
            module.set_biases(**biases)
    found, expected = (module(*call) for module in modules)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 13, 16, 40])
@pytest.mark.parametrize(
    ("code", "zeros"),
    [(code, zeros) for code in CODES for zeros in ((False,) if code in TRELLIS_CODES else (True, False))],
    ids=str,
)
def test_agrees_with_the_reference_at_every_width(isa, code, zeros, tokens):
    layer = random_layer([code] * 2, [code] * 2, HIDDEN, INTERMEDIATE, stored_zeros=zeros)
    assert_agrees(layer, random_call(tokens, HIDDEN, 2, 1))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("code", TRELLIS_CODES, ids=str)
def test_trellis_codes_agree_where_avx512_comes_without_vbmi(monkeypatch, code, tokens):
    if "avx512_vnni" not in available_isas():
        pytest.skip("this CPU has no avx512_vnni")
    monkeypatch.setenv(ISA_VARIABLE, "avx512_vnni")
    monkeypatch.setattr("vllm_mcmoe.kernels.cpu.experts.has_vbmi", lambda isa: False)
    layer = random_layer([code] * 2, [code] * 2, HIDDEN, INTERMEDIATE)
    assert CpuExperts.prepare(**layer).families == [TRELLIS]
    assert_agrees(layer, random_call(tokens, HIDDEN, 2, 1))


@pytest.mark.parametrize("code", TRELLIS_CODES, ids=str)
def test_trellis_codes_agree_for_every_number_of_tokens_of_an_expert(isa, code):
    """Whether records are decoded on their way or before, and however batches divide the tokens."""
    layer = random_layer([code], [code], 256, 128)
    for tokens in range(1, 20):
        assert_agrees(layer, random_call(tokens, 256, 1, 1))


def test_a_layer_has_compiled_what_its_codes_need(isa):
    """vpermb and tiles where the CPU has them, and nothing for codes that no expert has."""
    trellis = TRELLIS_VBMI if has_vbmi(isa) else TRELLIS
    layers = {
        (Code(2), Code(3)): [SCALAR_WITH_ZEROS],
        (TRELLIS_CODES[1], TRELLIS_CODES[2]): [trellis],
        (Code(8), TRELLIS_CODES[2]): [SCALAR_WITH_ZEROS, trellis],
    }
    for codes, families in layers.items():
        module = CpuExperts.prepare(**random_layer(codes, codes, 128, 128))
        assert module.families == families
        compiled = compile_layer(isa, tuple(families))
        assert [bool(address) for address in compiled.kept] == [SCALAR_WITH_ZEROS in families, trellis in families]


def bytes_of_the_largest(code: Code) -> torch.Tensor:
    """uint8 [bytes]: the group of the largest sum; of trellis codes, of those with the same coded bits in all four
    columns of a quad and in all rings."""
    if code.kind == "scalar":
        return torch.full((16 * code.bits,), 255, dtype=torch.uint8)
    patterns = torch.arange(256)[:, None] >> torch.arange(8) & 1  # of a ring's quads
    coded = patterns.repeat_interleave(4, 1).repeat(1, 4)
    candidates = torch.stack([coded + 2 * uncoded for uncoded in range(1 << code.bits - 1)]).to(torch.uint8)
    largest = decode(candidates, code.bits).argmax(0, keepdim=True)  # uncoded bits are free
    codes = candidates.gather(0, largest)[0]
    best = decode(codes, code.bits).sum(1).argmax()
    return pack_planes(codes[best : best + 1], trellis_planes(code.bits))[0, 0]


@pytest.mark.parametrize("tokens", [1, 2, 4, 7])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_the_largest_codes_times_the_largest_activations_do_not_overflow(isa, code, tokens):
    """All of one sign, so that sums are as far from zero as they can be, and of both."""
    layer = random_layer([code] * 2, [code] * 2, HIDDEN, INTERMEDIATE)
    for matrix in layer["gate_up"] + layer["down"]:
        matrix.qweight[:] = bytes_of_the_largest(code)
    x, weights, ids = random_call(tokens, HIDDEN, 2, 2)
    for signs in (1.0, -1.0, torch.tensor([1.0, -1.0]).repeat(HIDDEN // 2)):
        assert_agrees(layer, (torch.full_like(x, 1e-3) * signs, weights, ids))  # small, or silu(gate) would be 0


@pytest.mark.parametrize("tokens", [1, 4, 17, 130])
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no zeros"])
def test_agrees_with_widths_mixed_in_one_layer(isa, zeros, tokens):
    layer = random_layer(MIXED, MIXED[::-1], HIDDEN, INTERMEDIATE, stored_zeros=zeros)
    assert_agrees(layer, random_call(tokens, HIDDEN, EXPERTS, 2))


@pytest.mark.parametrize(("experts", "top_k"), [(4, 4), (16, 8), (64, 6)])
def test_agrees_with_many_experts_some_without_tokens(isa, experts, top_k):
    codes = [MIXED[e % EXPERTS] for e in range(experts)]
    layer = random_layer(codes, codes[::-1], 128, 128)
    assert_agrees(layer, random_call(9, 128, experts, top_k))


def test_agrees_when_one_expert_gets_more_tokens_than_a_chunk_holds(isa):
    layer = random_layer([2, 3], [3, 2], 128, 128)
    x, weights, ids = random_call(300, 128, 2, 1)
    assert_agrees(layer, (x, weights, torch.where(torch.arange(300).unsqueeze(1) < 290, 1, ids)))


def test_agrees_over_more_tokens_than_one_pass_takes(isa):
    layer = random_layer([2, 3], [3, 2], 128, 128)
    assert_agrees(layer, random_call(MAX_TOKENS + 3, 128, 2, 1))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_agrees_for_every_function(isa, function, biased):
    layer = random_layer([4, 8], [4, 8], HIDDEN, INTERMEDIATE, function=function)
    biases = random_biases(2, HIDDEN, INTERMEDIATE, function) if biased else None
    assert_agrees(layer, random_call(6, HIDDEN, 2, 2), biases)


@pytest.mark.parametrize("tokens", [1, 70])
def test_biases_of_the_right_expert_are_added(isa, tokens):
    """Experts of several widths, some without tokens, an odd number of groups, and one bias left to another rank."""
    layer = random_layer(MIXED, MIXED[::-1], 256, HIDDEN, function=GPT_OSS)
    biases = random_biases(EXPERTS, 256, HIDDEN)
    assert_agrees(layer, random_call(tokens, 256, EXPERTS, 2), biases)
    assert_agrees(layer, random_call(tokens, 256, EXPERTS, 2), biases | {"down": None})


@pytest.mark.parametrize("row", [3, 128 + 3], ids=["gate", "up"])
def test_nan_passes_through_limits(isa, row):
    """A limit must not turn NaN into a number that looks like one."""
    layer = random_layer([4], [4], 128, 128, function=GPT_OSS)
    x, weights, ids = random_call(2, 128, 1, 1)
    module = CpuExperts.prepare(**layer)
    bias = torch.zeros(1, 256)
    bias[0, row] = torch.nan
    module.set_biases(bias, None)
    assert module(x, weights, ids).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_gives_the_float_result_rounded(isa, dtype):
    module = CpuExperts.prepare(**random_layer([2, 3], [3, 2], HIDDEN, INTERMEDIATE))
    x, weights, ids = random_call(6, HIDDEN, 2, 2, dtype=dtype)
    assert torch.equal(module(x, weights, ids), module(x.float(), weights, ids).to(dtype))


def test_routing_weights_may_have_the_dtype_of_the_activations(isa):
    module = CpuExperts.prepare(**random_layer([2, 3], [3, 2], 128, 128))
    x, weights, ids = random_call(3, 128, 2, 2, dtype=torch.bfloat16)
    weights = weights.bfloat16()
    assert torch.equal(module(x, weights, ids), module(x, weights.float(), ids))


def test_int32_and_int64_ids_are_the_same(isa):
    module = CpuExperts.prepare(**random_layer([2, 3], [3, 2], 128, 128))
    x, weights, ids = random_call(3, 128, 2, 2)
    assert torch.equal(module(x, weights, ids.int()), module(x, weights, ids.long()))


def test_dropped_pairs_contribute_nothing(isa):
    layer = random_layer(MIXED, MIXED, HIDDEN, INTERMEDIATE)
    x, weights, ids = random_call(20, HIDDEN, EXPERTS, 3)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4] = -1
    assert_agrees(layer, (x, weights, ids))


def test_a_token_without_experts_is_zero(isa):
    module = CpuExperts.prepare(**random_layer([2, 3], [3, 2], 128, 128))
    x, weights, ids = random_call(4, 128, 2, 2)
    ids[2] = -1
    out = module(x, weights, ids)
    assert not out[2].any() and out[[0, 1, 3]].any(dim=1).all()


def test_all_pairs_dropped_gives_zeros(isa):
    module = CpuExperts.prepare(**random_layer([2], [2], 128, 128))
    x, weights, ids = random_call(4, 128, 1, 1)
    assert not module(x, weights, torch.full_like(ids, -1)).any()


def test_no_tokens_give_an_empty_result(isa):
    module = CpuExperts.prepare(**random_layer([2], [2], 128, 128))
    out = module(torch.empty(0, 128), torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int32))
    assert out.shape == (0, 128)


def test_strided_inputs_are_read_as_what_they_show(isa):
    module = CpuExperts.prepare(**random_layer([2, 3], [3, 2], 128, 128))
    x, weights, ids = random_call(5, 128, 2, 2)
    strided = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (x, weights, ids)]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(module(*strided), module(x, weights, ids))


def test_a_group_of_zero_activations_is_fine(isa):
    module = CpuExperts.prepare(**random_layer([2], [3], 256, 128))
    x, weights, ids = random_call(2, 256, 1, 1)
    x[0, :128] = 0
    x[1] = 0
    out = module(x, weights, ids)
    assert out[0].isfinite().all() and not out[1].any()


def test_nan_in_one_token_reaches_that_token_alone(isa):
    module = CpuExperts.prepare(**random_layer([2], [3], 256, 128))
    x, weights, ids = random_call(3, 256, 1, 1)
    clean = module(x, weights, ids)
    x[1, 5] = torch.nan
    out = module(x, weights, ids)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_thread_count_does_not_change_a_bit(isa, threads):
    module = CpuExperts.prepare(**random_layer(MIXED, MIXED, HIDDEN, INTERMEDIATE))
    call = random_call(33, HIDDEN, EXPERTS, 2)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(module(*call))
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_other_tokens_in_the_batch_do_not_change_a_bit(isa):
    module = CpuExperts.prepare(**random_layer(MIXED, MIXED, HIDDEN, INTERMEDIATE))
    x, weights, ids = random_call(50, HIDDEN, EXPERTS, 2)
    whole = module(x, weights, ids)
    alone = torch.cat([module(x[i : i + 1], weights[i : i + 1], ids[i : i + 1]) for i in range(50)])
    assert torch.equal(whole, alone)


def test_instruction_sets_agree_to_the_bit(monkeypatch):
    if len(available_isas()) < 2:
        pytest.skip("this CPU has one instruction set")
    results = []
    for isa in available_isas():
        monkeypatch.setenv(ISA_VARIABLE, isa)
        module = CpuExperts.prepare(**random_layer(MIXED, MIXED, HIDDEN, INTERMEDIATE))
        results.append(module(*random_call(40, HIDDEN, EXPERTS, 2)))
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_matrices_are_taken_one_at_a_time():
    layer = random_layer([2, 3, 4], [2, 3, 4], 128, 128)
    alive = []

    def one_by_one(matrices):
        for matrix in matrices:
            alive.append(matrix)
            yield matrix
            assert alive.pop() is matrix  # the consumer came back for the next before taking another

    CpuExperts.prepare(**(layer | {"gate_up": one_by_one(layer["gate_up"]), "down": one_by_one(layer["down"])}))


def test_compiled_by_torch_equals_eager(isa):
    module = CpuExperts.prepare(**random_layer([2, 3], [3, 2], 128, 128))
    call = random_call(5, 128, 2, 2)

    def doubled(x, weights, ids):
        return module(x * 2, weights, ids) + 1

    assert torch.equal(torch.compile(doubled, fullgraph=True)(*call), doubled(*call))


def test_custom_op_passes_torchs_own_check(isa):
    module = CpuExperts.prepare(**random_layer([2, 3], [3, 2], 128, 128))
    call = random_call(5, 128, 2, 2)
    torch.library.opcheck(torch.ops.vllm_mcmoe.cpu_fused_experts, module.arguments(*call))
    module.set_biases(**random_biases(2, 128, 128))
    torch.library.opcheck(torch.ops.vllm_mcmoe.cpu_fused_experts, module.arguments(*call))


def test_runs_on_numbas_threads_where_torch_has_no_openmp_team():
    """In a process of its own: which threads are used is settled once."""
    script = """
from vllm_mcmoe.kernels.cpu import compiled
compiled.find_gomp_parallel = lambda: None
from tests.kernels.matrices import random_call, random_layer
from tests.kernels.test_cpu import assert_agrees
assert_agrees(random_layer([2, 3], [3, 2], 128, 128), random_call(20, 128, 2, 2))
assert compiled.compile_layer.cache_info().currsize == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})


def test_an_expert_id_out_of_range_is_refused(isa):
    module = CpuExperts.prepare(**random_layer([2, 3], [3, 2], 128, 128))
    x, weights, ids = random_call(5, 128, 2, 2)
    ids[3, 0] = 2
    with pytest.raises(IndexError, match="topk_ids names expert 2, this layer holds 2"):
        module(x, weights, ids)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match="ISA=mmx: expected one of amx, avx512_vnni, avx_vnni, avx2, portable"):
        select_isa()


def test_an_instruction_set_this_cpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr("vllm_mcmoe.kernels.cpu.isa.available_isas", lambda: ("portable",))
    monkeypatch.setenv(ISA_VARIABLE, "amx")
    with pytest.raises(ValueError, match=r"VLLM_MCMOE_CPU_ISA=amx: this CPU .* lacks it; it has portable"):
        select_isa()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up_codes": [Code(2), Code(5)]}, "gate_up: the cpu kernels have no matrices of 5 bits"),
        ({"down_codes": [Code(3), Code(4)]}, "down of expert 1: expected 4 bits and shape .* found 2 bits"),
        ({"down_codes": [Code(3), Code(2), Code(2)]}, "down: 3 codes were given, but only 2 matrices"),
        ({"hidden_size": 100}, "hidden_size 100 is not a positive multiple of the group size 128"),
        ({"intermediate_size": 256}, r"gate_up of expert 0: expected 2 bits and shape \[512, 128\]"),
    ],
)
def test_a_layer_the_kernels_cannot_hold_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CpuExperts.prepare(**(random_layer([2, 3], [3, 2], 128, 128) | change))


def test_experts_of_other_ranks_are_left_out_by_a_map():
    module = CpuExperts.prepare(**random_layer([2, 3], [3, 2], 128, 128))
    x, weights = torch.randn(4, 128), torch.rand(4, 2)
    everywhere = torch.tensor([[0, 3], [1, 2], [3, 1], [-1, 0]], dtype=torch.int32)
    expert_map = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    here = torch.tensor([[-1, 0], [1, -1], [0, 1], [-1, -1]], dtype=torch.int32)
    assert torch.equal(module(x, weights, everywhere, expert_map), module(x, weights, here))


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="run on CPUs, not on cuda"):
        CpuExperts.prepare(**random_layer([2], [2], 128, 128), device="cuda")
