"""Linears on the CPU kernels, on every instruction set of this machine, against the reference."""

import os
import subprocess
import sys
from functools import cache, partial

import llvmlite.binding as llvm
import pytest
import torch
from llvmlite import ir
from numba import cfunc

from tests.kernels.linear_cases import random_inputs, random_linear
from tests.kernels.test_cpu import ALL_ISAS
from vllm_mcmoe.kernels.cpu import ISA_VARIABLE, CpuLinear, available_isas, avx2, compiled_linear, layout, products
from vllm_mcmoe.kernels.cpu.compiled import ROWS
from vllm_mcmoe.kernels.cpu.layout import linear_record
from vllm_mcmoe.kernels.cpu.op import MAX_TOKENS
from vllm_mcmoe.kernels.reference.linear import symmetric_linear, unpack_symmetric

KINDS = [(bits, group_size) for bits in (4, 8) for group_size in (128, 64, 32)]
INPUTS, OUTPUTS = 384, 72  # rows that do not fill the last block of 16

# As the experts': exact integers, then the rounding of float32 sums of up to 12 groups, some units of 6e-8.
TOLERANCE = 2e-6

DOT = partial(products.products_by, products.dot_portable)
# What these compile, with the dot product spelled out: any CPU runs it.
EMULATED = {
    "avx512_vnni in generic vectors": products.linear_rows(
        products.multiply_linear("emulated", DOT(), products.VNNI_TOKENS), products.vnni_batch
    ),
    "avx_vnni in generic vectors": avx2.multiply_linear_rows_by(
        "emulated_256", DOT, avx2.sums_by(products.dot_portable)
    ),
}


def emulated_products(rows):
    @cache
    def products_of(source: str, width: int, group_size: int):
        @cfunc(ROWS)
        def multiply_rows(bits, records, blocks, groups, group, group_count, codes, scales, first, count, totals):
            rows(width, group_size, records, blocks, groups, group, group_count, codes, scales, first, count, totals)

        return multiply_rows

    return products_of


EMULATED_PRODUCTS = {name: emulated_products(rows) for name, rows in EMULATED.items()}


@pytest.fixture(params=ALL_ISAS)
def isa(request, monkeypatch):
    if request.param not in available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=(*ALL_ISAS, *EMULATED))
def isa_or_emulation(request, monkeypatch):
    if request.param in EMULATED:
        monkeypatch.setitem(compiled_linear._PRODUCTS, "portable", EMULATED_PRODUCTS[request.param])
        compiled_linear.compile_linear.cache_clear()
        monkeypatch.setenv(ISA_VARIABLE, "portable")
    elif request.param in available_isas():
        monkeypatch.setenv(ISA_VARIABLE, request.param)
    else:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    if request.param in EMULATED:
        compiled_linear.compile_linear.cache_clear()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_agrees(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_agrees_with_the_reference_at_every_number_of_tokens(isa_or_emulation, bits, group_size):
    packed, scales = random_linear(bits, group_size, OUTPUTS, INPUTS)
    module = CpuLinear.prepare(packed, scales, bits=bits)
    for tokens in [*range(1, 41), 300]:
        x = random_inputs(tokens, INPUTS, seed=tokens)
        assert_agrees(module(x), symmetric_linear(x, packed, scales, bits))


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 520])
@pytest.mark.parametrize("inputs", [32, 160])
def test_agrees_at_odd_sizes(isa, outputs, inputs):
    packed, scales = random_linear(4, 32, outputs, inputs)
    x = random_inputs(3, inputs)
    assert_agrees(CpuLinear.prepare(packed, scales, bits=4)(x), symmetric_linear(x, packed, scales, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [OUTPUTS, 64])
def test_half_precision_input_gives_the_float_result_rounded(isa, dtype, outputs):
    packed, scales = random_linear(4, 64, outputs, INPUTS)
    module = CpuLinear.prepare(packed, scales, bits=4)
    x, bias = random_inputs(6, INPUTS, dtype=dtype), random_inputs(outputs, dtype=dtype, seed=2)
    assert torch.equal(module(x, bias), module(x.float(), bias.float()).to(dtype))


@pytest.mark.parametrize("outputs", [OUTPUTS, 64])
def test_the_bias_is_added_in_float32(isa, outputs):
    packed, scales = random_linear(8, 128, outputs, INPUTS)
    x, bias = random_inputs(6, INPUTS), 100 * random_inputs(outputs, seed=2)
    found = CpuLinear.prepare(packed, scales, bits=8)(x, bias)
    assert_agrees(found, symmetric_linear(x, packed, scales, 8, bias))


@pytest.mark.parametrize("shape", [(INPUTS,), (0, INPUTS), (2, 3, INPUTS)])
def test_leading_dimensions_are_kept(isa, shape):
    packed, scales = random_linear(4, 128, OUTPUTS, INPUTS)
    x = random_inputs(*shape)
    found = CpuLinear.prepare(packed, scales, bits=4)(x)
    assert found.shape == (*shape[:-1], OUTPUTS)
    if x.numel():
        assert_agrees(found, symmetric_linear(x, packed, scales, 4))


def test_strided_inputs_are_read_as_what_they_show(isa):
    packed, scales = random_linear(4, 128, OUTPUTS, INPUTS)
    module, x = CpuLinear.prepare(packed, scales, bits=4), random_inputs(5, INPUTS)
    strided = torch.cat([x, x + 1], dim=1)[:, :INPUTS]
    assert not strided.is_contiguous()
    assert torch.equal(module(strided), module(x))


def test_agrees_over_more_tokens_than_one_pass_takes(isa):
    packed, scales = random_linear(4, 128, 32, 128)
    x = random_inputs(MAX_TOKENS + 3, 128)
    assert_agrees(CpuLinear.prepare(packed, scales, bits=4)(x), symmetric_linear(x, packed, scales, 4))


def test_nan_in_one_token_reaches_that_token_alone(isa):
    packed, scales = random_linear(4, 128, OUTPUTS, INPUTS)
    module, x = CpuLinear.prepare(packed, scales, bits=4), random_inputs(3, INPUTS)
    clean = module(x)
    x[1, 5] = torch.nan
    found = module(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_thread_count_does_not_change_a_bit(isa, threads):
    packed, scales = random_linear(4, 64, 520, INPUTS)
    module, x = CpuLinear.prepare(packed, scales, bits=4), random_inputs(33, INPUTS)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(module(x))
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (8, 32)])
def test_other_tokens_in_the_batch_do_not_change_a_bit(isa_or_emulation, bits, group_size):
    packed, scales = random_linear(bits, group_size, OUTPUTS, INPUTS)
    module, x = CpuLinear.prepare(packed, scales, bits=bits), random_inputs(300, INPUTS)
    assert torch.equal(module(x), torch.cat([module(token) for token in x.split(1)]))


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_instruction_sets_agree_to_the_bit(isa_or_emulation, monkeypatch, bits, group_size):
    packed, scales = random_linear(bits, group_size, OUTPUTS, INPUTS)
    x = random_inputs(40, INPUTS)
    found = CpuLinear.prepare(packed, scales, bits=bits)(x)
    monkeypatch.undo()
    compiled_linear.compile_linear.cache_clear()
    monkeypatch.setenv(ISA_VARIABLE, "portable")
    assert torch.equal(found, CpuLinear.prepare(packed, scales, bits=bits)(x))


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
@pytest.mark.parametrize("tokens", products.VNNI_TOKENS)
def test_vnni_products_compile_to_one_instruction_per_quad_and_token(bits, group_size, tokens):
    module = ir.Module()
    products.product_function(
        module, "product", products.products_by(products.dot_vnni), linear_record(bits, group_size), tokens
    )
    module.globals["product"].linkage = ""  # else there is nothing to keep
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu="cascadelake", opt=3)
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    quads = group_size // 4 if tokens == 1 else products.PORTION_QUADS  # several tokens: a loop over portions
    assert assembly.count("vpdpbusd") == quads * tokens
    assert "zmm" in assembly


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_records_hold_the_matrix(bits, group_size):
    packed, scales = random_linear(bits, group_size, OUTPUTS, INPUTS)
    module = CpuLinear.prepare(packed, scales, bits=bits)
    codes, halves, zeros = layout.unpack(module.records, linear_record(bits, group_size), OUTPUTS + 8, INPUTS)
    assert torch.equal(codes[:OUTPUTS], unpack_symmetric(packed, bits))
    assert torch.equal(halves[:OUTPUTS].float() * module.factor, scales.float())
    assert zeros is None and not halves[OUTPUTS:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("largest", [1e-30, 1e-6, 0.02, 1e4])
def test_scales_of_any_size_are_kept(isa, dtype, largest):
    """bfloat16 and float16 exactly, 28 binades below the largest, too; float32 to the 11 bits that float16 has."""
    packed, scales = random_linear(4, 128, 32, 256)
    scales = (scales.float() / scales.max() * largest * torch.tensor([1.0, 2.0**-14])).to(dtype)
    if not scales.all():
        pytest.skip("float16 has no numbers so small")
    x = random_inputs(2, 256)
    for part in (slice(0, 128), slice(128, 256)):  # each group by itself, else the larger would hide the smaller
        alone = torch.zeros_like(x)
        alone[:, part] = x[:, part]
        expected = symmetric_linear(alone, packed, scales, 4)
        error = 2.0**-11 if dtype == torch.float32 else TOLERANCE
        found = CpuLinear.prepare(packed, scales, bits=4)(alone)
        torch.testing.assert_close(found, expected, rtol=0, atol=error * float(expected.abs().max()))


@pytest.mark.parametrize("largest", [0.0, 0.02])
def test_torchs_default_dtype_does_not_matter(isa, largest):
    """vLLM sets it to the model's while it loads."""
    packed, scales = random_linear(4, 128, OUTPUTS, INPUTS)
    scales, x = scales / scales.max() * largest, random_inputs(5, INPUTS)
    expected = CpuLinear.prepare(packed, scales, bits=4)(x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = CpuLinear.prepare(packed, scales, bits=4)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(module(x), expected)


def test_compiled_by_torch_equals_eager(isa):
    packed, scales = random_linear(4, 128, OUTPUTS, INPUTS)
    module, x, bias = CpuLinear.prepare(packed, scales, bits=4), random_inputs(5, INPUTS), random_inputs(OUTPUTS)

    def doubled(x, bias):
        return module(x * 2, bias) + 1

    assert torch.equal(torch.compile(doubled, fullgraph=True)(x, bias), doubled(x, bias))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("outputs", [OUTPUTS, 64])
def test_custom_op_passes_torchs_own_check(isa, with_bias, outputs):
    packed, scales = random_linear(4, 128, outputs, INPUTS)
    module = CpuLinear.prepare(packed, scales, bits=4)
    x, bias = random_inputs(2, 3, INPUTS, dtype=torch.bfloat16), random_inputs(outputs) if with_bias else None
    arguments = (x, module.records, module.factor, bias, outputs, 4, 128, isa)
    torch.library.opcheck(torch.ops.vllm_mcmoe.cpu_linear, arguments)


def test_runs_on_numbas_threads_where_torch_has_no_openmp_team():
    """In a process of its own: which threads are used is settled once."""
    script = """
from vllm_mcmoe.kernels.cpu import CpuLinear, compiled_linear
compiled_linear.find_gomp_parallel = lambda: None
from tests.kernels.linear_cases import random_inputs, random_linear
from tests.kernels.test_cpu import ALL_ISAS
from tests.kernels.test_cpu_linear import assert_agrees
from vllm_mcmoe.kernels.reference.linear import symmetric_linear
packed, scales = random_linear(4, 128, 40, 256)
x = random_inputs(20, 256)
assert_agrees(CpuLinear.prepare(packed, scales, bits=4)(x), symmetric_linear(x, packed, scales, 4))
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})


@pytest.mark.parametrize(
    ("bits", "packed", "scales", "message"),
    [
        (2, (16, 8), (16, 1), r"no linears of 2 bits in groups of 128; supported: \(4, 8\) bits in groups of \(128,"),
        (4, (16, 4), (16, 2), "no linears of 4 bits in groups of 16"),
        (4, (15, 16), (16, 1), r"packed is \[15, 16\] and scales are \[16, 1\]: no 4-bit matrix of whole groups"),
        (4, (16, 33), (16, 2), "no linears of 4 bits in groups of 132"),
    ],
)
def test_a_matrix_the_kernels_cannot_hold_is_refused(bits, packed, scales, message):
    with pytest.raises(ValueError, match=message):
        CpuLinear.prepare(torch.zeros(packed, dtype=torch.int32), torch.ones(scales), bits=bits)


def test_scales_that_are_no_numbers_are_refused():
    packed, scales = random_linear(4, 128, 16, 128)
    scales[3, 0] = torch.nan
    with pytest.raises(ValueError, match="scales are not finite"):
        CpuLinear.prepare(packed, scales, bits=4)


def test_inputs_of_another_width_are_refused(isa):
    packed, scales = random_linear(4, 128, 16, 256)
    with pytest.raises(ValueError, match=r"no 4-bit matrix \[16, 128\] in groups of 128"):
        CpuLinear.prepare(packed, scales, bits=4)(random_inputs(2, 128))
