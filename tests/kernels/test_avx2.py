"""The 256-bit products: what AVX2 can sum, and the VNNI form on machines that cannot run it."""

import itertools
import re
from functools import partial

import llvmlite.binding as llvm
import pytest
from llvmlite import ir
from numba import cfunc

from tests.kernels.matrices import random_call, random_layer
from tests.kernels.test_cpu import HIDDEN, INTERMEDIATE, assert_agrees
from vllm_mcmoe.kernels.cpu import ISA_VARIABLE, available_isas, avx2, compiled
from vllm_mcmoe.kernels.cpu.codes import largest_value
from vllm_mcmoe.kernels.cpu.layout import SCALAR, SCALAR_WITH_ZEROS, TRELLIS, expert_record, family_records
from vllm_mcmoe.kernels.cpu.products import dot_portable, products_by
from vllm_mcmoe.kernels.packing import CODES, WIDTHS


@pytest.mark.parametrize("code", [code for code in CODES if code.bits < 8], ids=str)
def test_as_many_quads_are_summed_in_16_bits_as_fit_and_no_more(code):
    record = expert_record(code, stored_zeros=False)
    largest = largest_value(record)
    assert largest == 2 * record.zero  # the middle of what quads can have
    fitting = avx2.fitting_quads(largest)
    assert fitting * 2 * 127 * largest <= 32767
    assert 2 * fitting * 2 * 127 * largest > 32767


def test_vnni_in_256_bits_agrees_with_its_instruction_spelled_out(monkeypatch):
    """All of its code but the one instruction, on any machine; test_cpu_codes.py has what trellis codes are read by."""
    if "avx2" not in available_isas():
        pytest.skip("this CPU has no avx2")
    rows = avx2.multiply_rows_by("emulated", partial(products_by, dot_portable), avx2.sums_by(dot_portable))

    def products(source: str, family: int):
        @cfunc(compiled.ROWS)
        def multiply_rows(bits, records, blocks, groups, first_group, group_count, codes, scales, first, count, totals):
            rows(
                family, bits, records, blocks, groups, first_group, group_count, codes, scales, first, count,
                totals,
            )  # fmt: skip

        return multiply_rows

    monkeypatch.setitem(compiled._PRODUCTS, "avx2", products)
    monkeypatch.setenv(ISA_VARIABLE, "avx2")
    compiled.compile_layer.cache_clear()
    try:
        for tokens, bits, zeros in itertools.product((1, 2, 3, 4, 5, 6, 7, 9, 10, 20), WIDTHS, (True, False)):
            layer = random_layer([bits] * 2, [bits] * 2, HIDDEN, INTERMEDIATE, stored_zeros=zeros)
            assert_agrees(layer, random_call(tokens, HIDDEN, 2, 2))
        assert_agrees(random_layer(WIDTHS, WIDTHS, HIDDEN, INTERMEDIATE), random_call(130, HIDDEN, len(WIDTHS), 2))
    finally:
        compiled.compile_layer.cache_clear()


def _compiled_for(cpu: str, function: ir.Function) -> str:
    """Assembly of an emitted function for a CPU by LLVM's name."""
    function.linkage = "external"
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, opt=3)
    module = llvm.parse_assembly(str(function.module))
    module.verify()
    return machine.emit_assembly(module)


@pytest.mark.parametrize(
    "record",
    [record for family in (SCALAR, SCALAR_WITH_ZEROS, TRELLIS) for record in family_records(family)],
    ids=lambda record: f"{record.code}{', zeros' if record.zero is None else ''}",
)
def test_vnni_in_256_bits_compiles_for_a_cpu_without_avx512(record):
    if not re.match("x86_64|amd64|i.86", llvm.get_default_triple()):
        pytest.skip("not an x86 machine: LLVM here compiles for no other")
    module = ir.Module()
    module.triple = llvm.get_default_triple()
    dot = avx2.sums_by(avx2.dot_vnni_256)
    block = avx2.block_function(module, "block", dot, record, avx2.BATCH)
    assembly = _compiled_for("alderlake", block)
    assert len(re.findall(r"vpdpbusd\t", assembly)) >= 2 * 8 * avx2.BATCH  # a turn of 8 quads, two registers of rows
    assert "zmm" not in assembly and "vpdpbusds" not in assembly
