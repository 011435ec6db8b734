"""What CPU kernels read of a record, by every way of reading, whichever the instruction set of a layer takes."""

import ctypes

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from llvmlite import ir

from tests.kernels.matrices import random_matrix
from vllm_mcmoe.kernels.cpu import codes
from vllm_mcmoe.kernels.cpu.layout import ROWS, expert_record, repack
from vllm_mcmoe.kernels.cpu.products import unpack_function
from vllm_mcmoe.kernels.packing import CODES, GROUP_SIZE, Code, StoredMatrix
from vllm_mcmoe.kernels.trellis import TRELLIS_WIDTHS, level_table, table_entries, unpack_trellis

NEEDS = {
    codes.Codes: (),
    codes.PortableLevels: (),
    codes.Avx2Levels: ("avx2",),
    codes.Avx512Levels: ("avx512bw",),
    codes.VbmiLevels: ("avx512bw", "avx512vbmi"),
}
DECODERS = [reader for reader in NEEDS if reader is not codes.Codes]


def read(matrix: StoredMatrix, reader: type[codes.Codes]) -> torch.Tensor:
    """uint8 [16, 128] of a matrix of one record, by code that is compiled for this CPU."""
    if missing := [need for need in NEEDS[reader] if not llvm.get_host_cpu_features().get(need)]:
        pytest.skip(f"this CPU has no {missing[0]}")
    kind, module = expert_record(matrix.code, stored_zeros=False), ir.Module()
    unpack_function(module, "read", kind, reader).linkage = "external"
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten()
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    record, out = torch.zeros(kind.nbytes, dtype=torch.uint8), torch.zeros(GROUP_SIZE // 4, ROWS, 4, dtype=torch.uint8)
    repack(matrix, np.zeros(1, np.int64), record)
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("read"))
    function(record.data_ptr(), out.data_ptr())
    return out.transpose(0, 1).reshape(ROWS, GROUP_SIZE)


def one_record(code: Code) -> StoredMatrix:
    return random_matrix(code, ROWS, GROUP_SIZE, torch.Generator().manual_seed(0), stored_zeros=False)


@pytest.mark.parametrize("code", [code for code in CODES if code.kind == "scalar"], ids=str)
def test_codes_are_read_as_they_are(code):
    matrix = one_record(code)
    assert torch.equal(read(matrix, codes.Codes), matrix.levels())


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
@pytest.mark.parametrize("reader", DECODERS)
def test_levels_are_those_of_the_definition(reader, bits):
    """Of every entry there is: 2048 weights, 16 to 128 entries."""
    matrix = one_record(Code(bits, "trellis"))
    assert torch.equal(read(matrix, reader), matrix.levels())


@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
@pytest.mark.parametrize("reader", DECODERS)
def test_a_wrong_entry_of_a_table_would_be_noticed(reader, bits, monkeypatch):
    """By exactly the weights whose level stands there, and in AVX2's half tables those of the mirrored entry."""
    matrix, wrong = one_record(Code(bits, "trellis")), 5
    table = level_table(bits).clone()
    table[wrong] ^= 1
    monkeypatch.setattr(codes, "level_table", lambda bits: table)
    entries = table_entries(unpack_trellis(matrix.qweight, bits))
    affected = entries == wrong
    if reader is codes.Avx2Levels and bits > 1:
        affected |= entries == len(table) - 1 - wrong
    assert affected.any()
    assert torch.equal(read(matrix, reader) != matrix.levels(), affected)
