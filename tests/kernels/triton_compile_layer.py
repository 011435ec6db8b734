"""Prints, as JSON, what compiling a layer's kernels leaves in Triton's caches, for a GPU that is not there.

Unlike triton_kernel_counts.py this compiles, several kernels at a time, as a model does while it loads; two bits alone.
"""

import json
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.kernels.triton_kernel_counts import H100, MIXTRAL
from tests.kernels.triton_launcher import PretendedDriver
from vllm_mcmoe.kernels.expert_function import SILU
from vllm_mcmoe.kernels.triton import experts, gemm, launches, prepare, routing


def main() -> None:
    driver.set_active(PretendedDriver(GPUTarget("cuda", 90, 32)))
    with (
        mock.patch.object(launches, "_has_ptx", lambda _: True),
        mock.patch.object(launches, "describe_device", lambda _: H100),
        mock.patch.object(experts, "describe_device", lambda _: H100),
    ):
        experts.compile_layer(
            torch.device("cpu"), MIXTRAL, 1 << 2, False, SILU, (False, False), torch.bfloat16, is_mapped=False
        )
    kernels = (prepare.prepare_kernel, gemm.grouped_gemm_kernel, routing.combine_kernel)
    found = {k.fn.__name__: [type(v).__name__ for v in k.device_caches[0][0].values()] for k in kernels}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
