"""Round-to-nearest quantisation of one matrix, and the form every quantiser returns.

    weight[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),     g = k // 128

Scales and zeros are chosen per row and group of 128 by weighted least squares, among the values that the checkpoint can
hold: float16 scales and zeros, or scales of one byte without zeros ("float8": five bits of mantissa, in a range of 252
for each row). Without zeros, and at 1 bit, the zero is the middle of the codes: at 1 bit a weight is -scale/2 or
+scale/2, at 2 bits one of -3/2, -1/2, 1/2 and 3/2 times the scale. Where `in` is no multiple of 128 the last group is
that much smaller; only packing fills it up.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from vllm_mcmoe.calibration.matrix.row_loops import least_squares_grids, over_rows
from vllm_mcmoe.kernels.packing import (
    GROUP_SIZE,
    LARGEST_EXPONENT,
    MANTISSA_BITS,
    OCTAVES,
    SMALLEST_EXPONENT,
    WIDTHS,
    PackedMatrix,
    from_groups,
    middle_zero,
    pack_codes,
    to_groups,
)

Search = Literal["mse", "minmax"]

Metadata = Literal["float16", "float8"]  # what is stored of each group beside its codes

SMALLEST_FP16 = torch.finfo(torch.float16).smallest_normal  # 6.1e-5; below it fp16 loses precision bit by bit
LARGEST_FP16 = torch.finfo(torch.float16).max
SMALLEST: Mapping[Metadata, float] = MappingProxyType({"float16": SMALLEST_FP16, "float8": 2.0**SMALLEST_EXPONENT})
DROPPED_BITS: Mapping[Metadata, int] = MappingProxyType({"float16": 13, "float8": 23 - MANTISSA_BITS})
# How much refinement may raise a row's largest scale. At 1 bit it does (python benchmarks/output_hessian.py --only-with
# --bits 1 2 --metadata float8 --headroom 1.25 2 4).
HEADROOM, ONE_BIT_HEADROOM = 2.0, 4.0
TOLERATED_FLUSH = 1e-3  # share of a matrix's squared norm that may lie in groups too small for any scale


def has_zeros(bits: int, metadata: Metadata) -> bool:
    """Whether zeros are fitted and stored."""
    return metadata == "float16" and bits > 1


def scale_ranges(scales: torch.Tensor, bits: int, metadata: Metadata) -> torch.Tensor:
    """The smallest and largest scale that each row can have: float32 [out, 2].

    scales: float32 [out, groups], as they would be without limits. With float8, a factor of 252 lies between the two.
    Groups that need less than the smallest get it: their weights are then off by at most half of it, which is a 60th of
    the row's largest scale, or less; at 1 bit a 30th.
    """
    if metadata == "float16":
        return torch.stack([torch.full_like(scales[:, 0], limit) for limit in (SMALLEST_FP16, LARGEST_FP16)], dim=1)
    headroom = ONE_BIT_HEADROOM if bits == 1 else HEADROOM
    exponents = (scales.amax(1) * headroom).clamp_min(1e-30).log2().floor() - (OCTAVES - 1)
    smallest = exponents.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT).exp2()
    return torch.stack([smallest, smallest * (2.0**OCTAVES - 2.0 ** (OCTAVES - 1 - MANTISSA_BITS))], dim=1)


def storable_scales(scales: torch.Tensor, metadata: Metadata, ranges: torch.Tensor) -> torch.Tensor:
    """The nearest scales that the checkpoint can hold. scales, result: float32 [out, groups]."""
    scales = torch.minimum(torch.maximum(scales, ranges[:, :1]), ranges[:, 1:])
    if metadata == "float16":
        return scales.half().float()
    shifted = scales * (2.0 ** DROPPED_BITS[metadata] + 1)  # Veltkamp: the last bits are lost in the difference
    return shifted - (shifted - scales)


@dataclass(frozen=True)
class QuantizedMatrix:
    """One linear map, quantised but not yet packed.

    bits    1, 2, 3, 4 or 8
    codes   uint8   [out, in], each below 2**bits
    scales  float16 [out, groups], > 0
    zeros   float16 [out, groups] in units of codes, not rounded; None where it is the middle of the codes
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        zeros = middle_zero(self.bits) if self.zeros is None else self.zeros.float()[..., None]
        weight = self.scales.float()[..., None] * (to_groups(self.codes).float() - zeros)
        return from_groups(weight, self.codes.shape[-1])

    def pack(self) -> PackedMatrix:
        """The same matrix as the checkpoint stores it."""
        return PackedMatrix(self.bits, pack_codes(self.codes, self.bits), self.scales, self.zeros)

    def part(self, rows: slice) -> "QuantizedMatrix":
        """Some rows, which own their memory where they are packed."""
        zeros = None if self.zeros is None else self.zeros[rows].clone()
        return QuantizedMatrix(self.bits, self.codes[rows], self.scales[rows].clone(), zeros)


@dataclass
class Grid:
    """Scales and zeros of every row and group while a matrix is being quantised.

    bits      width
    metadata  what the checkpoint can hold
    scales    float32 [out, groups], every value one of those
    zeros     float32 [out, groups], every value representable in fp16; the middle of the codes where none are stored
    ranges    float32 [out, 2], as scale_ranges gives them
    """

    bits: int
    metadata: Metadata
    scales: torch.Tensor
    zeros: torch.Tensor
    ranges: torch.Tensor

    @property
    def has_zeros(self) -> bool:
        return has_zeros(self.bits, self.metadata)

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 [out, in] -> nearest codes, float32, same shape."""
        codes = to_groups(weight) / self.scales[..., None] + self.zeros[..., None]
        return from_groups(codes.round_().clamp_(0, (1 << self.bits) - 1), weight.shape[-1])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes, float32 [out, in] -> weights, float32, same shape."""
        return from_groups(self.scales[..., None] * (to_groups(codes) - self.zeros[..., None]), codes.shape[-1])

    def matrix(self, codes: torch.Tensor) -> QuantizedMatrix:
        """codes: float32 [out, in] -> the quantised matrix."""
        zeros = self.zeros.half() if self.has_zeros else None
        return QuantizedMatrix(self.bits, codes.to(torch.uint8), self.scales.half(), zeros)


def check_weight(weight: torch.Tensor, bits: int, name: str) -> None:
    """Raises ValueError naming the matrix where it cannot be quantised to this width."""
    if bits not in WIDTHS:
        raise ValueError(f"{name}: bit-width {bits} is not one of {WIDTHS}")
    if weight.ndim != 2:
        raise ValueError(f"{name}: shape {list(weight.shape)}, expected [out, in]")
    if not all(math.isfinite(extreme) for extreme in weight.aminmax()):  # NaN is both minimum and maximum
        bad = int(weight.numel() - torch.isfinite(weight).sum())
        raise ValueError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; repair the model first")


def quantize_rtn(
    weight: torch.Tensor,
    bits: int,
    *,
    search: Search = "mse",
    importance: torch.Tensor | None = None,
    metadata: Metadata = "float16",
    name: str = "weight",
) -> QuantizedMatrix:
    """Round every weight to the nearest value of its group's grid.

    weight      [out, in], any float dtype
    search      "minmax": the grid spans the group's range; "mse": scale and zero minimise the squared error
                (at 1 bit both give scale/2 = mean |w|, which is the minimiser)
    importance  float [in], weight of each column's squared error under "mse", e.g. the Hessian's diagonal
    metadata    "float16" scales and zeros, or "float8" scales around the middle of the codes
    name        what errors call the matrix

    Raises ValueError naming the matrix for NaN or infinite weights, an unknown width, or magnitudes that stored scales
    cannot express.
    """
    check_weight(weight, bits, name)
    weight = weight.float()
    grid = search_grid(weight, bits, metadata, search, importance, name=name)
    return grid.matrix(grid.encode(weight))


def search_grid(
    weight: torch.Tensor,
    bits: int,
    metadata: Metadata = "float16",
    search: Search = "mse",
    importance: torch.Tensor | None = None,
    ranges: torch.Tensor | None = None,
    name: str = "weight",
) -> Grid:
    """Scale and zero of every row and group, from the weights alone. weight: float32 [out, in]; importance: as above;
    ranges: of the scales, where weight is a part of a matrix that has them already.

    A last group of fewer columns is searched on those it has.
    """
    importance = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    parts = list(zip(_by_size(weight), map(_column_weight, _by_size(importance)), strict=True))

    def per_group(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.cat([function(groups, column_weight) for groups, column_weight in parts], dim=1)

    energy = per_group(lambda groups, _: groups.square().sum(-1))

    def storable(scales: torch.Tensor, zeros: torch.Tensor) -> Grid:
        return storable_grid(energy, bits, metadata, scales, zeros, ranges, name)

    if bits == 1:
        scales = per_group(lambda groups, column_weight: 2 * (groups.abs() * column_weight).sum(-1))
        scales /= per_group(lambda groups, column_weight: column_weight.sum(-1).expand(groups.shape[:-1]))
        return storable(scales, torch.full_like(scales, middle_zero(bits)))
    low, high = per_group(lambda groups, _: groups.amin(-1)), per_group(lambda groups, _: groups.amax(-1))
    spanning = _spanning if has_zeros(bits, metadata) else _spanning_around_zero
    grid = storable(*spanning(bits, low, high))
    return grid if search == "minmax" else storable(*_least_squares_grid(parts, grid))


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


def _spanning(bits: int, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros whose first code means low and whose last means high; all [out, groups]."""
    scales = (high - low) / ((1 << bits) - 1)
    # A constant group is exact as scale |w|, zero -1 or 1, code 0 (or any scale and zero 0, where it is 0).
    constant = high <= low
    scales = torch.where(constant, low.abs(), scales)
    return scales, torch.where(constant, -low.sign(), -low / scales.clamp_min(1e-30))


def _spanning_around_zero(bits: int, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where the zero is the middle of the codes: the range around 0 that has both in it."""
    scales = torch.maximum(high, -low) / middle_zero(bits)
    return scales, torch.full_like(scales, middle_zero(bits))


# Shares of the range's lower and upper half the search starts from, in all 16 combinations, and least-squares steps
# from each: within 0.3% of the squared error of 256 starts at 2 and 3 bits and 3% at 4, in a fourteenth of the time
# (1024 x 256 Gaussian weights, 0.03 s on one thread).
_RANGE_SHARES = np.array([1.0, 0.85, 0.7, 0.55], dtype=np.float32)
_FIT_STEPS = 5


def _least_squares_grid(
    parts: list[tuple[torch.Tensor, torch.Tensor]], spanning: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
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
            not spanning.has_zeros,
            written=(scales, zeros),
        )
        found.append((scales, zeros))
    scales, zeros = (torch.cat(values, dim=1) for values in zip(*found, strict=True))
    return scales, zeros


def storable_grid(
    energy: torch.Tensor,
    bits: int,
    metadata: Metadata,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    ranges: torch.Tensor | None,
    name: str,
) -> Grid:
    """Round scales and zeros to what can be stored, keeping float16 scales out of fp16's subnormal range.

    energy: squared norm of every group, like scales and zeros float32 [out, groups]; ranges: as search_grid takes them.

    A scale below 6.1e-5 (float8: 1.9e-6) is raised to it: the group's weights are then at most half of that off.
    Raises ValueError as check_scales does.
    """
    check_scales(energy, scales, metadata, name)
    if ranges is None:
        ranges = scale_ranges(scales, bits, metadata)
    stored = storable_scales(scales, metadata, ranges)
    if has_zeros(bits, metadata):
        # The offset scale * zero is what the weights see; keep it where the scale had to be rounded.
        zeros = (zeros * (scales / stored)).clamp(-LARGEST_FP16, LARGEST_FP16).half().float()
    return Grid(bits, metadata, stored, zeros, ranges)


def check_scales(energy: torch.Tensor, scales: torch.Tensor, metadata: Metadata, name: str) -> None:
    """Raises ValueError where scales exceed the range, or too many are below it. energy, scales: as storable_grid's.

    A scale below the smallest is harmless in a few negligible groups and fatal for a matrix made of them: they may hold
    0.1% of the matrix's squared norm.
    """
    flushed = scales < SMALLEST[metadata]
    if flushed.any():
        share = float(energy[flushed].sum() / energy.sum().clamp_min(1e-45))
        if share > TOLERATED_FLUSH:
            raise ValueError(
                f"{name}: {int(flushed.sum())} of {flushed.numel()} groups, {share:.1%} of the squared norm, need "
                f"scales below {metadata}'s smallest {SMALLEST[metadata]:.1e}; scale the matrix up"
            )
    if float(scales.max()) > LARGEST_FP16:
        raise ValueError(f"{name}: scale {float(scales.max()):.3g} exceeds fp16's largest value {LARGEST_FP16:g}")
