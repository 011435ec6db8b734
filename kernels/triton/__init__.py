"""GPU kernels in Triton: one launch per projection for experts of any bit-widths. See docs/triton_kernel.md."""

from vllm_mcmoe.kernels.triton.experts import TritonExperts

__all__ = ["TritonExperts"]
