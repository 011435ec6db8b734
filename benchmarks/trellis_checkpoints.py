"""Reading checkpoints of trellis codes, before config.json says which codes a matrix has."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from unittest import mock

import torch

from vllm_mcmoe.calibration.evaluate import checkpoint_weights
from vllm_mcmoe.calibration.matrix.gptq import Codes
from vllm_mcmoe.calibration.quantize import layer
from vllm_mcmoe.checkpoint import matrix_of
from vllm_mcmoe.kernels.packing import PackedMatrix
from vllm_mcmoe.kernels.trellis import TRELLIS_WIDTHS, TrellisMatrix


def reading(codes: Codes) -> AbstractContextManager:
    """Within the block, matrices of checkpoints are taken to have such codes."""
    stack = ExitStack()
    if codes == "trellis":
        for module in (checkpoint_weights, layer):
            stack.enter_context(mock.patch.object(module, "matrix_of", _trellis_matrix_of))
    return stack


def _trellis_matrix_of(bits: int, version: int, read: Callable[[str], torch.Tensor]) -> PackedMatrix | TrellisMatrix:
    matrix = matrix_of(bits, version, read)
    return TrellisMatrix(bits, matrix.qweight, matrix.scales) if bits in TRELLIS_WIDTHS else matrix
