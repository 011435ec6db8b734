"""Where calibration computes: on the CPU, or on a GPU that torch calls "cuda" (NVIDIA, or AMD with a ROCm build).

A device holds one decoder layer, one batch of activations and one expert's Hessians, all in float32. Activations of all
tokens, routing decisions and everything that is written stay in host memory or on the disk, and so do random draws. The
loops of matrix/row_loops.py run on the CPU whatever the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vllm_mcmoe.errors import DeviceError

AUTO = "auto"


def choose_device(request: str | torch.device, log: Callable[[str], None] = lambda message: None) -> torch.device:
    """The device asked for: "auto" (a GPU if there is one; what is chosen is logged), "cpu", "cuda" or "cuda:N".
    A torch.device that is no GPU is taken as it is.

    On a GPU matrix products are in full float32 from here on, in the whole process.

    Raises DeviceError for another name, and for a GPU that is not there.
    """
    if isinstance(request, torch.device):
        if request.type != "cuda":
            return request
        request = str(request)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda" if gpus else "cpu") if request == AUTO else _parse(request, gpus)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.set_float32_matmul_precision("highest")  # not TF32, which has float16's precision
    if request == AUTO:
        found = torch.cuda.get_device_name(device) if gpus else "torch finds no GPU"
        log(f"Computing on {device} ({found}).")
    return device


# Inner size of the products below which rounding the operands costs what the faster instructions save.
SMALLEST_BFLOAT16 = 1024


def multiplies_in_bfloat16(device: torch.device, hidden: int) -> bool:
    """Whether bfloat16_products pay for a model of that hidden size: on CPUs with AMX, which do those of linears 2.4
    times as fast. Timed with "ieee" and "bf16" by

    python -m timeit -s "import torch; torch.backends.mkldnn.matmul.fp32_precision = 'bf16'
    a, b = torch.randn(2048, 4096), torch.randn(4096, 4096)" "a @ b.t()"
    """
    return device.type == "cpu" and hidden >= SMALLEST_BFLOAT16 and torch.cpu._is_amx_tile_supported()


@contextmanager
def bfloat16_products(allowed: bool) -> Iterator[None]:
    """Within the block float32 matrix products on the CPU round their operands to bfloat16, and sum in float32; of the
    whole process. The weights of most models are exact in bfloat16; their activations are made for it."""
    if not allowed:
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def check_layer_fits(device: torch.device, layer_bytes: int, model: object) -> None:
    """Raises DeviceError where a decoder layer alone is more than the GPU has. What else it needs depends on the text
    and on other processes, and only shows later."""
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    if layer_bytes > total:
        raise DeviceError(
            f"{model}: a decoder layer takes {layer_bytes / 1e9:.1f} GB in float32, {device} has {total / 1e9:.1f} GB; "
            "use a larger GPU, or the device cpu."
        )


def _parse(request: str, gpus: int) -> torch.device:
    try:
        device = torch.device(request)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and request != "cpu"):
        raise DeviceError(f"device {request!r} is not one of {AUTO}, cpu, cuda and cuda:N.")
    if device.type == "cuda" and gpus <= (device.index or 0):
        found = f"finds {gpus} of them, counted from cuda:0" if gpus else "finds no GPU"
        raise DeviceError(f"device {request}: torch {torch.__version__} {found}; use a device it has, or cpu.")
    return device
