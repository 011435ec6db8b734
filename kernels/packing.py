"""The checkpoint's packed form of one quantised matrix, shared by the writer and by every kernel backend.

    weight[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),     g = k // 128

Codes of one group of 128 are contiguous, so slicing rows or whole groups (tensor parallelism) slices bytes.
A plane of b bits stores code k at bit b*k of the group's bytes, little-endian: byte i of a 2-bit plane holds codes
4i .. 4i+3 from the low bits up. A 3-bit group is a 2-bit plane of the low bits (32 bytes), then a 1-bit plane of the
high bit (16 bytes).
"""

from dataclasses import dataclass

import torch

GROUP_SIZE = 128
WIDTHS = (1, 2, 3, 4, 8)
ONE_BIT_ZERO = 0.5  # 1-bit codes mean -scale/2 and +scale/2; no zero is stored


def planes(bits: int) -> tuple[int, ...]:
    """Bit planes a width is stored as, in file order. Raises ValueError for a width the format lacks."""
    if bits not in WIDTHS:
        raise ValueError(f"bit-width {bits} is not one of {WIDTHS}")
    return (2, 1) if bits == 3 else (bits,)


def packed_bytes_per_group(bits: int) -> int:
    """Bytes of one group of 128 codes: 16 * bits."""
    return sum(planes(bits)) * GROUP_SIZE // 8


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


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into the checkpoint layout.

    codes: uint8 [out, in], each below 2**bits, in divisible by 128 -> uint8 [out, in/128, 16*bits].
    Raises ValueError for a wrong width, an indivisible in or a code out of range.
    """
    plane_bits = planes(bits)
    out_features, in_features = codes.shape
    if in_features % GROUP_SIZE:
        raise ValueError(f"in_features {in_features} is not divisible by the group size {GROUP_SIZE}")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    groups = codes.reshape(out_features, in_features // GROUP_SIZE, GROUP_SIZE)
    parts, shift = [], 0
    for width in plane_bits:
        parts.append(_pack_plane((groups >> shift) & ((1 << width) - 1), width))
        shift += width
    return torch.cat(parts, dim=-1)


def unpack_codes(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of pack_codes: uint8 [out, in/128, 16*bits] -> uint8 [out, in]."""
    plane_bits = planes(bits)
    if qweight.shape[-1] != packed_bytes_per_group(bits):
        raise ValueError(
            f"a {bits}-bit group has {packed_bytes_per_group(bits)} bytes, this tensor has {qweight.shape[-1]}"
        )
    parts = qweight.split([width * GROUP_SIZE // 8 for width in plane_bits], dim=-1)
    codes, shift = torch.zeros(1, dtype=torch.uint8, device=qweight.device), 0
    for part, width in zip(parts, plane_bits, strict=True):
        codes = codes | (_unpack_plane(part, width) << shift)
        shift += width
    return codes.flatten(-2)


@dataclass(frozen=True)
class PackedMatrix:
    """One linear map of one expert, as the checkpoint stores it.

    bits     1, 2, 3, 4 or 8
    qweight  uint8   [out, in/128, 16*bits]  codes, see the module's text
    scales   float16 [out, in/128]           > 0
    zeros    float16 [out, in/128]           in units of codes, not rounded; None at 1 bit, where it is 0.5
    """

    bits: int
    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        return self.qweight.shape[1] * GROUP_SIZE

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint, scales and zeros included."""
        return sum(t.nbytes for t in (self.qweight, self.scales, self.zeros) if t is not None)

    def codes(self) -> torch.Tensor:
        """uint8 [out, in]."""
        return unpack_codes(self.qweight, self.bits)

    def float_zeros(self) -> torch.Tensor:
        """float32 [out, in/128], the constant 0.5 at 1 bit."""
        if self.zeros is None:
            return torch.full_like(self.scales, ONE_BIT_ZERO, dtype=torch.float32)
        return self.zeros.float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[out, in] weights; computed in float32, then cast."""
        groups = self.codes().reshape(*self.scales.shape, GROUP_SIZE).float()
        weight = self.scales.float().unsqueeze(-1) * (groups - self.float_zeros().unsqueeze(-1))
        return weight.flatten(-2).to(dtype)
