"""How the words of a ring (rings.py) become matrix operands: what is looked up, and the PTX that does it.

With PTX a quad of weights is decoded by byte permutations. `prmt` takes four nibbles of a word, here four windows, and
gives for each one of eight bytes, by its lower three bits, or, where the highest is set, that byte's sign eight times.
An entry of the table is mirrored where its own coded bit is 1, by flipping all bits of its operand's byte. So of 2-bit
codes two permutations are enough, of 32 entries:

    d0 d1 d2   differences of the window's neighbouring coded bits; s: its own coded bit; u: uncoded bit ^ s
    selector 1    (d2 ? s : u)   d0   d1   | d2        a value where d2 is 0; else flipped or not, by s
    selector 2    (d2 ? u : s)  ~d0  ~d1   | ~d2       a value where d2 is 1; else flipped or not, by s
    operand     = permuted 1 ^ permuted 2

The byte's sign is u: levels of the upper half, and only these, have the highest uncoded bit. Further uncoded bits
select by a mask of bytes: `^ (other tables, by the same selectors) & mask`. 1 bit has 16 entries, each of one selector:
the window itself, and the window with its highest bit flipped.

Operands are level - 64 of 3 and 4 bits, 2 level - 64 of 2, 2 level of 1.
"""

import triton
import triton.language as tl

from vllm_mcmoe.kernels.trellis import LARGEST_LEVEL, TRELLIS_WIDTHS, level_table

# constexpr, so that Triton's compile cache knows of them
_LEVELS = tl.constexpr({bits: level_table(bits).tolist() for bits in TRELLIS_WIDTHS})
_LARGEST = tl.constexpr(LARGEST_LEVEL)
QUADS = tl.constexpr(8)  # of a ring


@triton.constexpr_function
def factor(bits):
    """By which operands exceed levels."""
    return 2 if bits <= 2 else 1


@triton.constexpr_function
def operand_offset(bits):
    """What is subtracted then, so that they are bytes whose sign is the highest uncoded bit."""
    return 0 if bits == 1 else 64


@triton.constexpr_function
def operand_zero(bits):
    """The operand that stands for a weight of 0: 31, -1, -0.5 and -0.5."""
    doubled = factor(bits) * _LARGEST.value[bits] - 2 * operand_offset(bits)
    return doubled / 2 if doubled % 2 else doubled // 2


@triton.constexpr_function
def mirror_mask(bits):
    """The bits of an operand's byte that change where all bits of its entry do: not that of the factor."""
    return 62 if bits == 1 else 256 - factor(bits)


@triton.constexpr_function
def operands(bits):
    """The operand of every entry of the table, as a byte."""
    return [(factor(bits) * level - operand_offset(bits)) & 0xFF for level in _LEVELS.value[bits]]


@triton.constexpr_function
def _permuted_tables(bits):
    """Per selection of lower uncoded bits two tables of eight bytes, for the two selectors; as differences where more
    than one selection is added up by masks."""
    values = operands(bits)
    if bits == 1:
        return [(values[:8], values[8:])]

    def pair(lower):
        tables = ([0] * 8, [0] * 8)
        for index in range(16):
            u, d0, d1, d2 = index & 1, (index >> 1) & 1, (index >> 2) & 1, index >> 3
            window = 2 * d0 + 4 * (d0 ^ d1) + 8 * (d0 ^ d1 ^ d2)  # of the own coded bit 0
            value = values[window + 16 * (lower + (u << (bits - 2)))]
            if value >> 7 == u:
                raise ValueError(f"{bits} bits: entry {window} of the lower half has a level of the upper one")
            if d2 == 0:
                tables[0][u + 2 * d0 + 4 * d1] = value
            else:
                tables[1][u + 2 * (1 - d0) + 4 * (1 - d1)] = value ^ 0xFF
        return tables

    selected = [pair(lower) for lower in range(1 << (bits - 2))]
    bit = 1
    while bit < len(selected):  # selections that contain a bit become what it changes
        for lower in range(len(selected)):
            if lower & bit:
                selected[lower] = tuple(
                    [x ^ y for x, y in zip(with_bit, without, strict=True)]
                    for with_bit, without in zip(selected[lower], selected[lower ^ bit], strict=True)
                )
        bit <<= 1
    return selected


@triton.constexpr_function
def _word(four):
    return sum(byte << (8 * at) for at, byte in enumerate(four))


@triton.constexpr_function
def _rotate(out, word, amount):
    return f"shf.r.wrap.b32 {out}, {word}, {word}, {amount};"


@triton.constexpr_function
def _permute(tables, pair):
    """A pair of tables by selectors s1 and s2, into c and e. The first half of a table is in a register."""
    by = (("c", 2 * pair, "s1"), ("e", 2 * pair + 1, "s2"))
    return [f"prmt.b32 {out}, t{at}, {_word(tables[at][4:])}, {selector};" for out, at, selector in by]


@triton.constexpr_function
def _operand(bits, tables, out):
    """Four operands by the selectors and the masks."""
    if bits == 1:
        return [*_permute(tables, 0), f"or.b32 {out}, c, e;"]
    if bits == 2:
        return [*_permute(tables, 0), f"lop3.b32 {out}, c, e, {mirror_mask(bits) * 0x01010101}, 0x28;"]
    if bits == 3:
        code = [*_permute(tables, 1), "lop3.b32 f, c, e, m0, 0x28;"]  # (c ^ e) & m0
        return [*code, *_permute(tables, 0), f"lop3.b32 {out}, c, e, f, 0x96;"]  # c ^ e ^ f
    code = [*_permute(tables, 3), "lop3.b32 f, c, e, m0, 0x28;"]
    code += [*_permute(tables, 2), "lop3.b32 f, c, e, f, 0x96;"]
    code += [*_permute(tables, 1), "lop3.b32 g, c, e, m0, 0x28;"]
    code += [*_permute(tables, 0), "lop3.b32 g, c, e, g, 0x96;"]
    return [*code, f"lop3.b32 {out}, g, f, m1, 0x78;"]  # g ^ (f & m1)


@triton.constexpr_function
def ring_decoder(bits):
    """PTX: the words of a ring, one per bit, -> eight words of four operands, quad 2 p + h in the order of rings.py.

    A constant that is or'ed with a register of zeros, of which ptxas cannot know, stays in a register; one that it
    knows to be the same in all threads it would copy for every use.
    """
    coded, *uncoded = [f"${QUADS.value + stream}" for stream in range(bits)]
    tables = [table for pair in _permuted_tables(bits) for table in pair]
    names = [f"t{index}" for index in range(len(tables))]
    temporaries = "zero, ones, own, d, d2, y1, y2, a, b, s1, s2, m0, m1, c, e, f, g"
    code = [f"{{ .reg .b32 {temporaries}, {', '.join(names)};"]
    code += ["mov.u32 c, %lanemask_eq;", "sub.u32 zero, c, 1;", "and.b32 zero, zero, c;"]
    code += [f"or.b32 {name}, zero, {_word(table[:4])};" for name, table in zip(names, tables, strict=True)]
    if bits > 1:
        code += [_rotate("own", coded, 1), f"xor.b32 d, {coded}, own;", _rotate("d2", "d", 3)]
        code += [f"lop3.b32 y1, d2, own, {uncoded[0]}, 0xca;", f"lop3.b32 y2, d2, {uncoded[0]}, own, 0xca;"]
    if bits > 2:
        code += [f"or.b32 ones, zero, {0x80808080};"]
    for rotation in range(4):
        mask = 0x11111111 << rotation
        if bits > 1:
            code += [f"lop3.b32 a, {mask}, y1, d, 0xca;", f"lop3.b32 b, {mask}, y2, d, 0xc5;"]
        for half in range(2):
            out, amount = f"${2 * rotation + half}", rotation + 16 * half
            if bits == 1:
                code += [_rotate("s1", coded, amount), f"xor.b32 s2, s1, {0x88888888};"]
            else:
                code += [_rotate("s1", "a", amount), _rotate("s2", "b", amount)]
            for index, word in enumerate(reversed(uncoded[1:])):
                code += [_rotate(f"m{index}", word, amount), f"prmt.b32 m{index}, ones, {0x80808080}, m{index};"]
            code += _operand(bits, tables, out)
    return "\n".join([*code, "}"])


@triton.constexpr_function
def decoder_constraints(bits):
    return ",".join(["=r"] * QUADS.value + ["r"] * bits)


@triton.constexpr_function
def eight_operands(bits, first):
    """Operands of the entries from 8 * first on, as a signed integer of 64 bits."""
    return int.from_bytes(bytes(operands(bits)[8 * first : 8 * first + 8]), "little", signed=True)
