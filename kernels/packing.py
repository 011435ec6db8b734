"""The checkpoint's packed form of one quantised matrix, shared by the writer and by every kernel backend.

    weight[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),     g = k // 128

Zeros are stored in units of codes, or else all of them are the middle of the codes; at 1 bit they always are that.

Codes of one group of 128 are contiguous, so slicing rows or whole groups (tensor parallelism) slices bytes.
A plane of b bits stores code k at bit b*k of the group's bytes, little-endian: byte i of a 2-bit plane holds codes
4i .. 4i+3 from the low bits up. A 3-bit group is a 2-bit plane of the low bits (32 bytes), then a 1-bit plane of the
high bit (16 bytes).

Where `in` is no multiple of 128 the last group is filled up with codes 0. They stand for no weight: readers crop them,
and kernels, which compute whole groups, meet activations of 0 there.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F

GROUP_SIZE = 128
WIDTHS = (1, 2, 3, 4, 8)
TRELLIS_WIDTHS = (1, 2, 3, 4)

Kind = Literal["scalar", "trellis"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRELLIS_NUMBERS = 16  # Code.number of a trellis code is this and its width


class Code(NamedTuple):
    """What the weights of one matrix are written in.

    bits  of a weight
    kind  "scalar": each weight has a code of its own, this module's; "trellis": those of trellis.py
    """

    bits: int
    kind: Kind = "scalar"

    @property
    def number(self) -> int:
        """What compiled kernels know it by: its width, and 16 more of a trellis code."""
        return self.bits + (TRELLIS_NUMBERS if self.kind == "trellis" else 0)

    def has_zeros(self, stored_zeros: bool) -> bool:
        """Whether matrices have zeros where scalar codes of more than 1 bit do."""
        return stored_zeros and self.kind == "scalar" and self.bits > 1

    def __str__(self) -> str:
        if self.kind == "trellis":
            return f"{self.bits}-bit trellis"
        return f"{self.bits} bit" if self.bits == 1 else f"{self.bits} bits"


CODES = (*(Code(bits) for bits in WIDTHS), *(Code(bits, "trellis") for bits in TRELLIS_WIDTHS))


def middle_zero(bits: int) -> float:
    """The zero of codes that lie evenly around it: 0.5, 1.5, 3.5, 7.5, 127.5."""
    return ((1 << bits) - 1) / 2


# Scales of one byte, b = 32 e + m: (1 + m/32) * 2^(e + the row's exponent), which float16 holds exactly.
MANTISSA_BITS = 5
OCTAVES = 8
SMALLEST_EXPONENT, LARGEST_EXPONENT = -19, 8  # of a row: float16 holds 2^-19 * (1 + m/32) and 2^15 * (1 + m/32)
_EXPONENT_BIAS, _DROPPED_BITS = 127, 23 - MANTISSA_BITS  # of float32


def scales_to_bytes(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 [out, groups], in every row positive and within a factor of 128 of the largest, five bits of mantissa ->
    uint8 of the same shape and the rows' exponents, int8 [out]. Raises ValueError for scales that are not so."""
    bits = scales.float().view(torch.int32)
    exponents = (bits.amax(1) >> 23) - _EXPONENT_BIAS - (OCTAVES - 1)
    exponents = exponents.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT).to(torch.int8)
    first = (exponents.to(torch.int32) + _EXPONENT_BIAS) << MANTISSA_BITS
    stored = ((bits >> _DROPPED_BITS) - first[:, None]).clamp(0, 255).to(torch.uint8)
    if not torch.equal(scales_from_bytes(stored, exponents), scales):
        raise ValueError("scales that a byte cannot hold beside the others of their row")
    return stored, exponents


def scales_from_bytes(stored: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """uint8 [out, groups] and int8 [out] -> float16 [out, groups], exactly."""
    first = (exponents.to(torch.int32) + _EXPONENT_BIAS) << MANTISSA_BITS
    return ((stored.to(torch.int32) + first[:, None]) << _DROPPED_BITS).view(torch.float32).half()


def planes(bits: int) -> tuple[int, ...]:
    """Bit planes a width is stored as, in file order. Raises ValueError for a width the format lacks."""
    if bits not in WIDTHS:
        raise ValueError(f"bit-width {bits} is not one of {WIDTHS}")
    return (2, 1) if bits == 3 else (bits,)


def packed_bytes_per_group(bits: int) -> int:
    """Bytes of one group of 128 codes: 16 * bits."""
    return sum(planes(bits)) * GROUP_SIZE // 8


def group_count(features: int) -> int:
    """Groups of 128 that hold so many features, the last one possibly in part."""
    return -(-features // GROUP_SIZE)


def padded(features: int) -> int:
    """Features rounded up to whole groups."""
    return group_count(features) * GROUP_SIZE


def to_groups(values: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [..., ceil(in/128), 128], the last group filled up with zeros; a view where nothing is missing."""
    missing = -values.shape[-1] % GROUP_SIZE
    return (F.pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, GROUP_SIZE))


def from_groups(groups: torch.Tensor, features: int) -> torch.Tensor:
    """Inverse of to_groups: [..., ceil(in/128), 128] -> contiguous [..., in]."""
    return groups.flatten(-2)[..., :features].contiguous()


def _pack_plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes: uint8 [..., 128] below 2**bits -> uint8 [..., 16*bits]."""
    per_byte = 8 // bits
    fields = codes.reshape(*codes.shape[:-1], GROUP_SIZE // per_byte, per_byte)
    packed = torch.zeros_like(fields[..., 0])
    for position in range(per_byte):
        packed |= fields[..., position] << (bits * position)
    return packed


def _unpack_plane(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """packed: uint8 [..., 16*bits] -> uint8 [..., 128]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    fields = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(-2)


def pack_planes(codes: torch.Tensor, plane_bits: tuple[int, ...]) -> torch.Tensor:
    """Codes as bit planes of each group, that of the lowest bits first.

    codes: uint8 [out, in], each below 2**sum(plane_bits) -> uint8 [out, ceil(in/128), 16*sum(plane_bits)].
    Raises ValueError for a code out of range.
    """
    bits = sum(plane_bits)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    groups = to_groups(codes)
    parts, shift = [], 0
    for width in plane_bits:
        parts.append(_pack_plane((groups >> shift) & ((1 << width) - 1), width))
        shift += width
    return torch.cat(parts, dim=-1)


def unpack_planes(qweight: torch.Tensor, plane_bits: tuple[int, ...]) -> torch.Tensor:
    """Inverse of pack_planes, except that padding stays: uint8 [out, groups, bytes] -> uint8 [out, 128*groups]."""
    expected = sum(plane_bits) * GROUP_SIZE // 8
    if qweight.shape[-1] != expected:
        raise ValueError(f"a {sum(plane_bits)}-bit group has {expected} bytes, this tensor has {qweight.shape[-1]}")
    parts = qweight.split([width * GROUP_SIZE // 8 for width in plane_bits], dim=-1)
    codes, shift = torch.zeros(1, dtype=torch.uint8, device=qweight.device), 0
    for part, width in zip(parts, plane_bits, strict=True):
        codes = codes | (_unpack_plane(part, width) << shift)
        shift += width
    return codes.flatten(-2)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into the checkpoint layout.

    codes: uint8 [out, in], each below 2**bits -> uint8 [out, ceil(in/128), 16*bits].
    Raises ValueError for a wrong width or a code out of range.
    """
    return pack_planes(codes, planes(bits))


def unpack_codes(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of pack_codes, except that padding stays: uint8 [out, groups, 16*bits] -> uint8 [out, 128*groups]."""
    return unpack_planes(qweight, planes(bits))


@dataclass(frozen=True)
class StoredMatrix:
    """One linear map of one expert in whole groups, whose padding it does not know of. PackedMatrix has scalar codes,
    trellis.TrellisMatrix the others; each says what its qweight and its scales are.

    weight[n, k] = scale[n, g] * (level[n, k] - zero[n, g]),  g = k // 128
    """

    bits: int
    qweight: torch.Tensor
    scales: torch.Tensor

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        """Of whole groups."""
        return self.qweight.shape[1] * GROUP_SIZE

    @property
    def nbytes(self) -> int:
        """Scales, zeros and the last group's padding included."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def code(self) -> Code:
        raise NotImplementedError

    def levels(self) -> torch.Tensor:
        """The integers that kernels multiply: uint8 [out, 128*groups]."""
        raise NotImplementedError

    def float_zeros(self) -> torch.Tensor:
        """In units of levels: float32 [out, groups]."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype = torch.float32, *, in_features: int | None = None) -> torch.Tensor:
        """[out, in] weights; computed in float32, then cast.

        in_features: the matrix' own, where its last group has padding; None if it has none. Padding has no meaning as
        weights.
        """
        centred = to_groups(self.levels()).float() - self.float_zeros().unsqueeze(-1)
        weight = self.scales.float().unsqueeze(-1) * centred
        return from_groups(weight, in_features or self.in_features).to(dtype)


@dataclass(frozen=True)
class PackedMatrix(StoredMatrix):
    """One linear map of one expert, as the checkpoint stores it.

    bits     1, 2, 3, 4 or 8
    qweight  uint8   [out, groups, 16*bits]  codes, see the module's text
    scales   float16 [out, groups]           > 0; 0 in rows that a kernel's layout adds
    zeros    float16 [out, groups]           in units of codes, not rounded; None where they are the middle of the codes
    """

    zeros: torch.Tensor | None

    @property
    def code(self) -> Code:
        return Code(self.bits)

    def levels(self) -> torch.Tensor:
        return unpack_codes(self.qweight, self.bits)

    def float_zeros(self) -> torch.Tensor:
        if self.zeros is None:
            return torch.full_like(self.scales, middle_zero(self.bits), dtype=torch.float32)
        return self.zeros.float()
