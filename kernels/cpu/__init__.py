"""The CPU backend: numba with vector intrinsics, on torch's own threads.

layout     the records weights are repacked into          vectors    quantising, gating, converting 16 lanes
products   the matrix products, emitted per width         moe        one layer: grouping, phases, tasks
compiled   compilation and its cache                      threads    torch's OpenMP team
isa        instruction sets, chosen at run time           op         the torch custom op
records_file  a layer's records on disk, mapped into memory
"""

from vllm_mcmoe.kernels.cpu.experts import CpuExperts, record_sizes
from vllm_mcmoe.kernels.cpu.isa import ISA_VARIABLE, available_isas, select_isa
from vllm_mcmoe.kernels.cpu.layout import LAYOUT_VERSION
from vllm_mcmoe.kernels.cpu.records_file import PARTIAL_SUFFIX, RecordsError, remove_abandoned

__all__ = [
    "ISA_VARIABLE",
    "LAYOUT_VERSION",
    "PARTIAL_SUFFIX",
    "CpuExperts",
    "RecordsError",
    "available_isas",
    "record_sizes",
    "remove_abandoned",
    "select_isa",
]
