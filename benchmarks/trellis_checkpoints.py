"""Checkpoints of trellis codes, before the format has them: written as version 2, whose tensors are of the same sizes,
and read by who knows. Nobody else may read them: a scalar code's weights come out.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from unittest import mock

import torch

from vllm_mcmoe.calibration.checkpoint import writer
from vllm_mcmoe.calibration.evaluate import checkpoint_weights
from vllm_mcmoe.calibration.matrix.gptq import Codes
from vllm_mcmoe.calibration.quantize import layer
from vllm_mcmoe.checkpoint import matrix_of, matrix_tensors
from vllm_mcmoe.kernels.packing import PackedMatrix
from vllm_mcmoe.kernels.trellis import TRELLIS_WIDTHS, TrellisMatrix


def checkpoints_of(codes: Codes) -> AbstractContextManager:
    """Within the block, checkpoints are written and read with matrices of such codes."""
    stack = ExitStack()
    if codes == "trellis":
        for module in (checkpoint_weights, layer):
            stack.enter_context(mock.patch.object(module, "matrix_of", _trellis_matrix_of))
        stack.enter_context(mock.patch.object(writer, "matrix_tensors", _trellis_matrix_tensors))
    return stack


def _trellis_matrix_of(bits: int, version: int, read: Callable[[str], torch.Tensor]) -> PackedMatrix | TrellisMatrix:
    matrix = matrix_of(bits, version, read)
    return TrellisMatrix(bits, matrix.qweight, matrix.scales) if bits in TRELLIS_WIDTHS else matrix


def _trellis_matrix_tensors(matrix: PackedMatrix | TrellisMatrix, version: int) -> dict[str, torch.Tensor]:
    return matrix_tensors(PackedMatrix(matrix.bits, matrix.qweight, matrix.scales, matrix.zeros), version)
