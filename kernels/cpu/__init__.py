"""The CPU backend: numba with vector intrinsics, on torch's own threads.

layout     the records weights are repacked into          vectors    quantising, gating, converting 16 lanes
products   the matrix products, emitted per width         moe        one layer: grouping, phases, tasks
compiled   compilation and its cache                      threads    torch's OpenMP team
isa        instruction sets, chosen at run time           op         the torch custom op
"""

from vllm_mcmoe.kernels.cpu.experts import CpuExperts
from vllm_mcmoe.kernels.cpu.isa import ISA_VARIABLE, available_isas, select_isa

__all__ = ["ISA_VARIABLE", "CpuExperts", "available_isas", "select_isa"]
