"""A pretended NVIDIA GPU for vLLM's CUDA build: its platform's classes, on CPU tensors. Import it before vLLM."""

import torch
import vllm.platforms
from vllm.platforms.cuda import CudaPlatformBase
from vllm.platforms.interface import DeviceCapability

CAPABILITY = DeviceCapability(9, 0)


class PretendedCuda(CudaPlatformBase):
    """An H100 that is asked what it is, and never to compute."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return CAPABILITY

    @classmethod
    def has_device_capability(cls, capability: int | tuple[int, int], device_id: int = 0) -> bool:
        wanted = capability if isinstance(capability, tuple) else divmod(capability, 10)
        return (CAPABILITY.major, CAPABILITY.minor) >= tuple(wanted)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3 (pretended)"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 << 30

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132

    @classmethod
    def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
        return True

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        """Which attention backend and block size a GPU would get; there is none."""


vllm.platforms._current_platform = PretendedCuda()


def topk_softmax(
    weights: torch.Tensor,
    ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    logits: torch.Tensor,
    renormalize: bool,
    bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> None:
    """In the place of vLLM's CUDA kernel of that name, with the check of sizes that it makes."""
    if is_padding is not None and len(is_padding) != len(logits):
        raise RuntimeError(f"is_padding size mismatch, expected: {len(logits)}, found {len(is_padding)}")
    scores, chosen = logits.float().softmax(-1).topk(weights.shape[1])
    if renormalize:
        scores = scores / scores.sum(-1, keepdim=True)
    if is_padding is not None:
        scores = scores.masked_fill(is_padding[:, None], 0)
        chosen = chosen.masked_fill(is_padding[:, None], -1)
    weights.copy_(scores)
    ids.copy_(chosen)
