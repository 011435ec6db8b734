"""Who shall serve linears of 4 and 8 bits: what the environment asks for.

Apart from linear_scheme.py, which brings the CPU's kernels.
"""

import os

from vllm_mcmoe.errors import UnsupportedModelError

LINEARS_VARIABLE = "VLLM_MCMOE_LINEARS"
AUTO, MCMOE, VLLM = "auto", "mcmoe", "vllm"  # its values


def linears_request() -> str:
    """`VLLM_MCMOE_LINEARS`, "auto" where it is not set. Raises UnsupportedModelError for what it does not know."""
    request = os.environ.get(LINEARS_VARIABLE) or AUTO
    if request not in (AUTO, MCMOE, VLLM):
        raise UnsupportedModelError(f"{LINEARS_VARIABLE}={request}: expected one of {AUTO}, {MCMOE}, {VLLM}.")
    return request
