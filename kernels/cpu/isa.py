"""Which instructions the kernels use on this machine."""

import ctypes
import os
import platform
from functools import cache

import llvmlite.binding as llvm

ISA_VARIABLE = "VLLM_MCMOE_CPU_ISA"
PORTABLE = "portable"
# Features of LLVM's names; each is one sufficient set.
_NEEDS = {
    "amx": [("avx512f", "avx512bw", "avx512vl", "avx512vnni", "amx-tile", "amx-int8")],
    "avx512_vnni": [("avx512f", "avx512bw", "avx512vl", "avx512vnni")],
    "avx_vnni": [("avx2", "fma", "f16c", "avxvnni"), ("avx2", "fma", "f16c", "avx512vl", "avx512vnni")],
    "avx2": [("avx2", "fma", "f16c")],
    PORTABLE: [()],
}


@cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets this machine has, best first."""
    features = llvm.get_host_cpu_features()
    isas = [isa for isa, sets in _NEEDS.items() if any(all(features.get(need) for need in needs) for needs in sets)]
    if "amx" in isas and not _permit_amx():
        isas.remove("amx")
    return tuple(isas)


def _permit_amx() -> bool:
    """Ask Linux for the tile registers, which a process may use only after asking; holds for all its threads."""
    syscall_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata = 158, 0x1023, 18
    if platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(syscall_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0


def has_vbmi(isa: str) -> bool:
    """Whether its kernels may look up 64 bytes at once: AVX-512 since Ice Lake and Zen 4, but not Cascade Lake."""
    return isa in ("amx", "avx512_vnni") and bool(llvm.get_host_cpu_features().get("avx512vbmi"))


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
