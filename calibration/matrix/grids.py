"""Round-to-nearest quantisation of one matrix, and the form every quantiser returns.

    weight[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),     g = k // 128

Scales and zeros are chosen per row and group of 128 by weighted least squares; both are kept as fp16 values, zeros
unrounded in units of codes. At 1 bit the zero is 0.5: a weight is -scale/2 or +scale/2. Where `in` is no multiple of
128 the last group is that much smaller; only packing fills it up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vllm_mcmoe.calibration.matrix.row_loops import least_squares_grids, over_rows
from vllm_mcmoe.kernels.packing import (
    GROUP_SIZE,
    ONE_BIT_ZERO,
    WIDTHS,
    PackedMatrix,
    from_groups,
    pack_codes,
    to_groups,
)

Search = Literal["mse", "minmax"]

SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal  # 6.1e-5; below it fp16 loses precision bit by bit
LARGEST_FP16 = torch.finfo(torch.float16).max
TOLERATED_FLUSH = 1e-3  # share of a matrix's squared norm that may lie in groups too small for an fp16 scale


@dataclass(frozen=True)
class QuantizedMatrix:
    """One linear map, quantised but not yet packed.

    bits    1, 2, 3, 4 or 8
    codes   uint8   [out, in], each below 2**bits
    scales  float16 [out, groups], > 0
    zeros   float16 [out, groups] in units of codes, not rounded; None at 1 bit, where it is 0.5
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def float_zeros(self) -> torch.Tensor:
        """float32 [out, groups], the constant 0.5 at 1 bit."""
        if self.zeros is None:
            return torch.full_like(self.scales, ONE_BIT_ZERO, dtype=torch.float32)
        return self.zeros.float()

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        groups = to_groups(self.codes).float()
        weight = self.scales.float()[..., None] * (groups - self.float_zeros()[..., None])
        return from_groups(weight, self.codes.shape[-1])

    def pack(self) -> PackedMatrix:
        """The same matrix as the checkpoint stores it."""
        return PackedMatrix(self.bits, pack_codes(self.codes, self.bits), self.scales, self.zeros)


@dataclass
class Grid:
    """Scales and zeros of every row and group while a matrix is being quantised.

    bits    width
    scales  float32 [out, groups], every value representable in fp16
    zeros   float32 [out, groups], every value representable in fp16; 0.5 at 1 bit
    """

    bits: int
    scales: torch.Tensor
    zeros: torch.Tensor

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 [out, in] -> nearest codes, float32, same shape."""
        codes = to_groups(weight) / self.scales[..., None] + self.zeros[..., None]
        return from_groups(codes.round_().clamp_(0, (1 << self.bits) - 1), weight.shape[-1])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes, float32 [out, in] -> weights, float32, same shape."""
        return from_groups(self.scales[..., None] * (to_groups(codes) - self.zeros[..., None]), codes.shape[-1])

    def matrix(self, codes: torch.Tensor) -> QuantizedMatrix:
        """codes: float32 [out, in] -> the quantised matrix."""
        zeros = None if self.bits == 1 else self.zeros.half()
        return QuantizedMatrix(self.bits, codes.to(torch.uint8), self.scales.half(), zeros)


def check_weight(weight: torch.Tensor, bits: int, name: str) -> None:
    """Raises ValueError naming the matrix where it cannot be quantised to this width."""
    if bits not in WIDTHS:
        raise ValueError(f"{name}: bit-width {bits} is not one of {WIDTHS}")
    if weight.ndim != 2:
        raise ValueError(f"{name}: shape {list(weight.shape)}, expected [out, in]")
    bad = int(weight.numel() - torch.isfinite(weight).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; repair the model first")


def quantize_rtn(
    weight: torch.Tensor,
    bits: int,
    *,
    search: Search = "mse",
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> QuantizedMatrix:
    """Round every weight to the nearest value of its group's grid.

    weight      [out, in], any float dtype
    search      "minmax": the grid spans the group's range; "mse": scale and zero minimise the squared error
                (at 1 bit both give scale/2 = mean |w|, which is the minimiser)
    importance  float [in], weight of each column's squared error under "mse", e.g. the Hessian's diagonal
    name        what errors call the matrix

    Raises ValueError naming the matrix for NaN or infinite weights, an unknown width, or magnitudes that fp16 scales
    cannot express.
    """
    check_weight(weight, bits, name)
    weight = weight.float()
    grid = search_grid(weight, bits, search, importance, name)
    return grid.matrix(grid.encode(weight))


def search_grid(
    weight: torch.Tensor,
    bits: int,
    search: Search = "mse",
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> Grid:
    """Scale and zero of every row and group, from the weights alone. weight: float32 [out, in]; importance: as above.

    A last group of fewer columns is searched on those it has.
    """
    importance = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    parts = list(zip(_by_size(weight), map(_column_weight, _by_size(importance)), strict=True))

    def per_group(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.cat([function(groups, column_weight) for groups, column_weight in parts], dim=1)

    energy = per_group(lambda groups, _: groups.square().sum(-1))
    if bits == 1:
        scales = per_group(lambda groups, column_weight: 2 * (groups.abs() * column_weight).sum(-1))
        scales /= per_group(lambda groups, column_weight: column_weight.sum(-1).expand(groups.shape[:-1]))
        return storable_grid(energy, bits, scales, torch.full_like(scales, ONE_BIT_ZERO), name)
    low, high = per_group(lambda groups, _: groups.amin(-1)), per_group(lambda groups, _: groups.amax(-1))
    grid = _grid_spanning(energy, bits, low, high, name)
    return grid if search == "minmax" else _least_squares_grid(parts, energy, grid, name)


def _by_size(columns: torch.Tensor) -> list[torch.Tensor]:
    """[..., in] -> the whole groups [..., in // 128, 128] and what remains [..., 1, in % 128], where there are any."""
    groups, rest = divmod(columns.shape[-1], GROUP_SIZE)
    whole, remaining = columns.split([groups * GROUP_SIZE, rest], dim=-1)
    parts = [whole.unflatten(-1, (groups, GROUP_SIZE))] if groups else []
    return parts + ([remaining.unsqueeze(-2)] if rest else [])


def _column_weight(importance: torch.Tensor) -> torch.Tensor:
    """float32 [groups, size], with 1 throughout a group that no token ever uses: any sane grid will do for it."""
    dead = importance.sum(-1, keepdim=True) <= 0
    return torch.where(dead, torch.ones_like(importance), importance)


def _grid_spanning(energy: torch.Tensor, bits: int, low: torch.Tensor, high: torch.Tensor, name: str) -> Grid:
    """The grid whose first code means low and whose last means high; all [out, groups]."""
    scales = (high - low) / ((1 << bits) - 1)
    # A constant group is exact as scale |w|, zero -1 or 1, code 0 (or any scale and zero 0, where it is 0).
    constant = high <= low
    scales = torch.where(constant, low.abs(), scales)
    zeros = torch.where(constant, -low.sign(), -low / scales.clamp_min(1e-30))
    return storable_grid(energy, bits, scales, zeros, name)


# Shares of the range's lower and upper half the search starts from, in all 16 combinations, and least-squares steps
# from each: within 0.3% of the squared error of 256 starts at 2 and 3 bits and 3% at 4, in a fourteenth of the time
# (1024 x 256 Gaussian weights, 0.03 s on one thread).
_RANGE_SHARES = np.array([1.0, 0.85, 0.7, 0.55], dtype=np.float32)
_FIT_STEPS = 5


def _least_squares_grid(
    parts: list[tuple[torch.Tensor, torch.Tensor]], energy: torch.Tensor, spanning: Grid, name: str
) -> Grid:
    """Scales and zeros of least weighted squared error, searched from the grids that span the range.

    parts: groups of one size each and the weights of their columns, as search_grid makes them.
    """
    found, first = [], 0
    for groups, column_weight in parts:
        columns = slice(first, first := first + groups.shape[1])
        scales, zeros = (
            values[:, columns].clone(memory_format=torch.contiguous_format)
            for values in (spanning.scales, spanning.zeros)
        )
        over_rows(
            least_squares_grids,
            (groups.contiguous(), scales, zeros),
            column_weight.contiguous(),
            np.float32((1 << spanning.bits) - 1),
            _RANGE_SHARES,
            _FIT_STEPS,
            written=(scales, zeros),
        )
        found.append((scales, zeros))
    scales, zeros = (torch.cat(values, dim=1) for values in zip(*found, strict=True))
    return storable_grid(energy, spanning.bits, scales, zeros, name)


def storable_grid(energy: torch.Tensor, bits: int, scales: torch.Tensor, zeros: torch.Tensor, name: str) -> Grid:
    """Round scales and zeros to what fp16 stores, keeping scales out of its subnormal range.

    energy: squared norm of every group, like scales and zeros float32 [out, groups].

    A scale below 6.1e-5 is raised to it: the group's weights are then at most 3.1e-5 off. That is harmless in a few
    negligible groups and fatal for a matrix made of them, so ValueError is raised when such groups hold more than
    0.1% of the matrix's squared norm, or when a scale or zero exceeds fp16's range.
    """
    flushed = scales < SMALLEST_SCALE
    if flushed.any():
        share = float(energy[flushed].sum() / energy.sum().clamp_min(1e-45))
        if share > TOLERATED_FLUSH:
            raise ValueError(
                f"{name}: {int(flushed.sum())} of {flushed.numel()} groups, {share:.1%} of the squared norm, need "
                f"scales below fp16's smallest normal {SMALLEST_SCALE:.1e}; scale the matrix up"
            )
    if float(scales.max()) > LARGEST_FP16:
        raise ValueError(f"{name}: scale {float(scales.max()):.3g} exceeds fp16's largest value {LARGEST_FP16:g}")
    if bits == 1:
        return Grid(bits, scales.clamp_min(SMALLEST_SCALE).half().float(), zeros)
    stored = scales.clamp_min(SMALLEST_SCALE).half().float()
    # The offset scale * zero is what the weights see; keep it where the scale had to be rounded.
    zeros = zeros * (scales / stored)
    return Grid(bits, stored, zeros.clamp(-LARGEST_FP16, LARGEST_FP16).half().float())
