"""Where each code stands inside the bytes of the GPU layout: known to the packer and, at compile time, to the kernels.

"bits" is a width of scalar codes, and wherever trellis codes have an answer, too, a `number`: packing.Code.number.

Everything a kernel looks up is a triton.constexpr_function, because Triton's compile cache hashes their source text: a
change of this table recompiles the kernels.
"""

from typing import NamedTuple

import triton

TILE_FEATURES = 256  # 1- and 3-bit tiles then have 32 rows: two m16 operands, one for each of the decode kernel's warps


class Piece(NamedTuple):
    """Bits [code_bit, code_bit + width) of a code stand at bits [byte_bit, byte_bit + width) of a plane's byte."""

    plane: int
    byte_bit: int
    code_bit: int
    width: int


@triton.constexpr_function
def fields(bits):
    """The fields of a width, each a tuple of pieces, the piece with the code's highest bit first."""
    table = {
        1: [[(0, f, 0, 1)] for f in range(8)],
        2: [[(0, 2 * f, 0, 2)] for f in range(4)],
        # 2 * 3 bits leave two bits of each byte; they hold two more fields, split so that nothing needs a shift
        3: [[(f // 2, 3 * (f % 2), 0, 3)] for f in range(6)]
        + [[(0, 6, 1, 2), (2, 6, 0, 1)], [(1, 6, 1, 2), (2, 7, 0, 1)]],
        4: [[(0, 4 * f, 0, 4)] for f in range(2)],
        8: [[(f, 0, 0, 8)] for f in range(2)],
    }
    return [[Piece(*piece) for piece in field] for field in table[bits]]


@triton.constexpr_function
def is_trellis(number):
    return number > 16


@triton.constexpr_function
def code_width(number):
    """Bits of a weight."""
    return number - 16 if is_trellis(number) else number


@triton.constexpr_function
def has_trellis(widths):
    """Whether a set of numbers, bit n for number n, has one of a trellis code."""
    return widths >> 17 != 0


@triton.constexpr_function
def field_count(number):
    return 8 if is_trellis(number) else len(fields(number))


@triton.constexpr_function
def plane_count(bits):
    return 1 + max(piece.plane for field in fields(bits) for piece in field)


@triton.constexpr_function
def tile_rows(number):
    """Features of a field. Of scalar codes also rows of a plane: a byte there belongs to one feature of each field."""
    return TILE_FEATURES // field_count(number)


@triton.constexpr_function
def is_sign_flipped(bits, field):
    """Whether the code's highest bit stands at bit 7, where an int8 operand has its sign."""
    highest = fields(bits)[field][0]
    return highest.byte_bit + highest.width == 8


@triton.constexpr_function
def zero_offset(bits, field, flipped_back=False):
    """What flipping the top bit subtracts from every code of the field."""
    return float(1 << (bits - 1)) if is_sign_flipped(bits, field) and not flipped_back else 0.0


@triton.constexpr_function
def field_shift(bits, field):
    """log2 of the factor by which the field's dot product exceeds that of its codes."""
    lowest = fields(bits)[field][-1]
    return lowest.byte_bit - lowest.code_bit


@triton.constexpr_function
def piece_count(bits, field):
    return len(fields(bits)[field])


@triton.constexpr_function
def piece_plane(bits, field, piece):
    return fields(bits)[field][piece].plane


@triton.constexpr_function
def piece_mask(bits, field, piece):
    where = fields(bits)[field][piece]
    return ((1 << where.width) - 1) << where.byte_bit


@triton.constexpr_function
def piece_flip(bits, field, piece):
    """The bit that was flipped, if this piece has it: an operand that is not signed must flip it back."""
    return 128 if piece == 0 and is_sign_flipped(bits, field) else 0


@triton.constexpr_function
def piece_factor(bits, field, piece, unsigned=False):
    """What the piece's dot product is multiplied by, so that the pieces add up to code * 2**field_shift."""
    where = fields(bits)[field][piece]
    factor = 1 << (field_shift(bits, field) - where.byte_bit + where.code_bit)
    # as int8, a low piece at bit 7 reads as minus its value
    return -factor if piece > 0 and where.byte_bit + where.width == 8 and not unsigned else factor
