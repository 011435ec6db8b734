"""The CPU backend: numba with vector intrinsics, on torch's own threads.

layout     the records weights are repacked into          chunks     the activations that matrices multiply
products   the matrix products, emitted per width         vectors    quantising, gating, converting 16 lanes
team       tasks, shared out to threads                   threads    torch's OpenMP team
isa        instruction sets, chosen at run time           pruning    online pruning

             experts         linears (attention, dense layers, shared experts)
module       experts         linear
custom op    op              linear_op
compilation  compiled        compiled_linear
phases       moe             linear_phases
"""

from vllm_mcmoe.kernels.cpu.experts import CpuExperts
from vllm_mcmoe.kernels.cpu.isa import ISA_VARIABLE, available_isas, select_isa
from vllm_mcmoe.kernels.cpu.linear import CpuLinear

__all__ = ["ISA_VARIABLE", "CpuExperts", "CpuLinear", "available_isas", "select_isa"]
