"""The CPU backend: numba with vector intrinsics, on torch's own threads.

layout     the records weights are repacked into          records_file  a layer's records on disk, mapped into memory
codes      a record's bytes, trellis codes decoded        chunks        the activations that matrices multiply
products   the matrix products, emitted per width         vectors       quantising, gating, converting 16 lanes
avx2, amx  the same in 256 bits, and in tiles             threads       torch's OpenMP team
team       tasks, shared out to threads                   pruning       online pruning
isa        instruction sets, chosen at run time

             experts         linears (attention, dense layers, shared experts)
module       experts         linear
custom op    op              linear_op
compilation  compiled        compiled_linear
phases       moe             linear_phases
"""

from vllm_mcmoe.kernels.cpu.experts import CpuExperts, record_sizes
from vllm_mcmoe.kernels.cpu.isa import ISA_VARIABLE, PORTABLE, available_isas, select_isa
from vllm_mcmoe.kernels.cpu.layout import LAYOUT_VERSION
from vllm_mcmoe.kernels.cpu.linear import CpuLinear
from vllm_mcmoe.kernels.cpu.records_file import PARTIAL_SUFFIX, RecordsError, remove_abandoned

__all__ = [
    "ISA_VARIABLE",
    "LAYOUT_VERSION",
    "PARTIAL_SUFFIX",
    "PORTABLE",
    "CpuExperts",
    "CpuLinear",
    "RecordsError",
    "available_isas",
    "record_sizes",
    "remove_abandoned",
    "select_isa",
]
