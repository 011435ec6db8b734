"""Which instructions the kernels use on this machine."""

import os
from functools import cache

import llvmlite.binding as llvm

ISA_VARIABLE = "VLLM_MCMOE_CPU_ISA"
_NEEDS = {
    "avx512_vnni": ("avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    "portable": (),
}


@cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets this machine has, best first."""
    features = llvm.get_host_cpu_features()
    return tuple(isa for isa, needs in _NEEDS.items() if all(features.get(need) for need in needs))


def select_isa() -> str:
    """`VLLM_MCMOE_CPU_ISA` where set, else the best. Raises ValueError for one that is unknown or missing here."""
    chosen = os.environ.get(ISA_VARIABLE)
    if not chosen:
        return available_isas()[0]
    if chosen not in _NEEDS:
        raise ValueError(f"{ISA_VARIABLE}={chosen}: expected one of {', '.join(_NEEDS)}")
    if chosen not in available_isas():
        raise ValueError(
            f"{ISA_VARIABLE}={chosen}: this CPU ({llvm.get_host_cpu_name()}) lacks it; it has "
            f"{', '.join(available_isas())}. Unset the variable to use the best."
        )
    return chosen
