"""The GPU layout of one projection's experts, and its exact inverse.

Why this layout: decode on a GPU is limited by instructions per weight, so a weight must become an int8 matrix operand
with as few of them as possible. Here one 32-bit AND with a constant yields four operands and nothing is ever shifted.

Planar along the output features. A tile is 256 features by one group of 128 input features:

    tile = [planes][rows][128] bytes            rows = 256 / fields
    byte (row r, k) of a plane holds one code of every field of that plane, all at input feature 128 * g + k
    field f of row r is feature 256 * tile + rows * f + r

| bits | planes | fields | rows | bits of a byte, high to low                                              |
|------|--------|--------|------|--------------------------------------------------------------------------|
| 1    | 1      | 8      | 32   | f7 f6 f5 f4 f3 f2 f1 f0                                                  |
| 2    | 1      | 4      | 64   | f3 f3 f2 f2 f1 f1 f0 f0                                                  |
| 3    | 3      | 8      | 32   | plane 0: f6.21 f1 f0; plane 1: f7.21 f3 f2; plane 2: f7.0 f6.0 f5 f4     |
| 4    | 1      | 2      | 128  | f1 f1 f1 f1 f0 f0 f0 f0                                                  |
| 8    | 2      | 2      | 128  | plane 0: f0; plane 1: f1                                                 |

`byte & mask` read as int8 is the code times 2**shift, with the field's shift; the kernel takes that power of two out
again in float32, exactly. A field that owns bit 7 reads as two's complement, so its codes are stored with their top bit
flipped, which subtracts 2**(bits-1) from the code; the kernel subtracts the same from the zero point.

Scales: one int32 per (feature, group), float16 scale in the low half and float16 zero in the high half, exactly the
checkpoint's values. Where all zeros are the middle of the codes, as at 1 bit and in checkpoints that store none, only
the float16 scales are kept.

Trellis codes have tiles of their own, see rings.py, and scales as 1-bit codes. In a layer that has any, the inputs of
scalar codes, too, are in the order of rings.py: k above then counts stored inputs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_mcmoe.kernels.packing import (
    CODES,
    GROUP_SIZE,
    Code,
    StoredMatrix,
    pack_codes,
    unpack_codes,
)
from vllm_mcmoe.kernels.trellis import stored_matrix
from vllm_mcmoe.kernels.triton.fields import (
    TILE_FEATURES,
    field_count,
    fields,
    has_trellis,
    is_sign_flipped,
    plane_count,
    tile_rows,
)
from vllm_mcmoe.kernels.triton.rings import (
    codes_of_ring_words,
    from_ring_order,
    pack_ring_tiles,
    ring_words,
    to_ring_order,
    unpack_ring_tiles,
)


def padded_features(features: int) -> int:
    """Features rounded up to whole tiles; the padding has scale 0."""
    return -(-features // TILE_FEATURES) * TILE_FEATURES


def code_bytes(features: int, in_features: int, bits: int) -> int:
    return padded_features(features) * in_features * bits // 8


def scale_words(features: int, in_features: int, has_zeros: bool) -> int:
    """int32 words of scales and zeros; half a word per group without zeros."""
    values = padded_features(features) * (in_features // GROUP_SIZE)
    return values if has_zeros else values // 2


def _to_fields(per_feature: torch.Tensor, number: int) -> torch.Tensor:
    """[features, groups, ...] -> [tiles, groups, fields, rows, ...], features padded with zeros."""
    features = per_feature.shape[0]
    padding = per_feature.new_zeros(padded_features(features) - features, *per_feature.shape[1:])
    tiled = torch.cat([per_feature, padding]).unflatten(0, (-1, field_count(number), tile_rows(number)))
    return tiled.movedim(3, 1)


def _from_fields(fielded: torch.Tensor, features: int) -> torch.Tensor:
    """Inverse of _to_fields."""
    return fielded.movedim(1, 3).flatten(0, 2)[:features]


def pack_tiles(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes: uint8 [features, in], each below 2**bits -> uint8 [tiles, groups, planes, rows, 128].

    Runs on the codes' device. Padding features hold code 0.
    """
    fielded = _to_fields(codes.unflatten(1, (-1, GROUP_SIZE)), bits)
    tiles, groups, _, rows, _ = fielded.shape
    packed = codes.new_zeros(tiles, groups, plane_count(bits), rows, GROUP_SIZE)
    for index, pieces in enumerate(fields(bits)):
        stored = fielded[:, :, index] ^ (1 << (bits - 1) if is_sign_flipped(bits, index) else 0)
        for piece in pieces:
            part = (stored >> piece.code_bit) & ((1 << piece.width) - 1)
            packed[:, :, piece.plane] |= part << piece.byte_bit
    return packed


def unpack_tiles(packed: torch.Tensor, bits: int, features: int) -> torch.Tensor:
    """Inverse of pack_tiles: uint8 [tiles, groups, planes, rows, 128] -> uint8 [features, in]."""
    tiles, groups, _, rows, _ = packed.shape
    fielded = packed.new_zeros(tiles, groups, field_count(bits), rows, GROUP_SIZE)
    for index, pieces in enumerate(fields(bits)):
        for piece in pieces:
            part = (packed[:, :, piece.plane] >> piece.byte_bit) & ((1 << piece.width) - 1)
            fielded[:, :, index] |= part << piece.code_bit
        if is_sign_flipped(bits, index):
            fielded[:, :, index] ^= 1 << (bits - 1)
    return _from_fields(fielded, features).flatten(1)


def pack_scales(scales: torch.Tensor, zeros: torch.Tensor | None, number: int) -> torch.Tensor:
    """scales, zeros: float16 [features, groups], or zeros None -> int32, flat, [tiles, groups, rows, fields]."""
    halves = [scales] if zeros is None else [scales, zeros]
    laid_out = [_to_fields(half, number).transpose(2, 3) for half in halves]
    return torch.stack(laid_out, dim=-1).flatten().view(torch.int32)


def unpack_scales(
    words: torch.Tensor, number: int, features: int, groups: int, has_zeros: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inverse of pack_scales -> float16 [features, groups] scales, and zeros, or None."""
    halves = 2 if has_zeros else 1
    shape = (-1, groups, tile_rows(number), field_count(number), halves)
    laid_out = words.view(torch.float16).view(shape).transpose(2, 3)
    unpacked = [_from_fields(half, features) for half in laid_out.unbind(-1)]
    return unpacked[0], (unpacked[1] if has_zeros else None)


def interleave_gate_up(rows: torch.Tensor) -> torch.Tensor:
    """[2 * intermediate, ...] gate rows then up rows -> tiles of 128 gate rows and the 128 up rows they multiply.

    One tile then holds whole groups of the intermediate activation, so the kernel can requantise them itself.
    """
    return rows.unflatten(0, (2, -1, TILE_FEATURES // 2)).transpose(0, 1).flatten(0, 2)


def split_gate_up(rows: torch.Tensor) -> torch.Tensor:
    """Inverse of interleave_gate_up."""
    return rows.unflatten(0, (-1, 2, TILE_FEATURES // 2)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class ExpertStack:
    """One projection of all experts of a layer, in the GPU layout.

    codes    uint8 [bytes]        every expert's tiles, see pack_tiles and rings.py
    scales   int32 [words]        every expert's scales and zeros, see pack_scales
    offsets  int64 [experts, 2]   where an expert begins: byte of codes, word of scales
    bits     int32 [experts]      Code.number of each expert
    gated    rows are gate and up, interleaved by interleave_gate_up
    widths   bit n is set where some expert has the code of number n, of this layer or another that shares its kernels;
             of this layer's either projection, so that both have their inputs in one order
    stored_zeros  whether experts with scalar codes of more than 1 bit have zeros
    bias     float32 [experts, whole tiles], see pack_bias; None without biases
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    bits: torch.Tensor
    out_features: int
    in_features: int
    gated: bool
    widths: int
    stored_zeros: bool
    bias: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        return self.bits.shape[0]

    @property
    def tiles(self) -> int:
        """Of 256 output features each, the last one padded."""
        return padded_features(self.out_features) // TILE_FEATURES

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes, "scales": self.scales, "offsets": self.offsets, "bits": self.bits}

    @property
    def in_rings(self) -> bool:
        """Whether the inputs of a group are in the order of rings.py."""
        return has_trellis(self.widths)

    def matrix(self, expert: int) -> StoredMatrix:
        """The expert's matrix as the checkpoint stores it, recovered from the tiles."""
        code = _CODES_BY_NUMBER[int(self.bits[expert])]
        first_byte, first_word = self.offsets[expert].tolist()
        groups, has_zeros = self.in_features // GROUP_SIZE, code.has_zeros(self.stored_zeros)
        tiles = self.codes[first_byte : first_byte + code_bytes(self.out_features, self.in_features, code.bits)]
        words = self.scales[first_word : first_word + scale_words(self.out_features, self.in_features, has_zeros)]
        scales, zeros = unpack_scales(words, code.number, self.out_features, groups, has_zeros)
        qweight = _unpack_qweight(tiles, code, self.out_features, groups, self.in_rings)
        if self.gated:
            qweight, scales = split_gate_up(qweight), split_gate_up(scales)
            zeros = None if zeros is None else split_gate_up(zeros)
        return stored_matrix(code, qweight, scales, zeros)


_CODES_BY_NUMBER = {code.number: code for code in CODES}


def widths_of(codes: Iterable[Code]) -> int:
    """What an ExpertStack calls widths."""
    return sum(1 << code.number for code in set(codes))


def _pack_qweight(qweight: torch.Tensor, code: Code, in_rings: bool) -> torch.Tensor:
    """A checkpoint's bytes [features, groups, 16 * bits], features in the stack's order -> flat tiles."""
    if code.kind == "trellis":
        return pack_ring_tiles(_to_fields(ring_words(qweight, code.bits), code.number)).flatten()
    codes = unpack_codes(qweight, code.bits)
    return pack_tiles(to_ring_order(codes) if in_rings else codes, code.bits).flatten()


def _unpack_qweight(tiles: torch.Tensor, code: Code, features: int, groups: int, in_rings: bool) -> torch.Tensor:
    """Inverse of _pack_qweight."""
    if code.kind == "trellis":
        fielded = unpack_ring_tiles(tiles.view(-1, groups, 4, code.bits, 32, 32))
        return codes_of_ring_words(_from_fields(fielded, features), code.bits)
    shaped = tiles.view(-1, groups, plane_count(code.bits), tile_rows(code.bits), GROUP_SIZE)
    codes = unpack_tiles(shaped, code.bits, features)
    return pack_codes(from_ring_order(codes) if in_rings else codes, code.bits)


def pack_bias(bias: torch.Tensor, gated: bool) -> torch.Tensor:
    """float32 [experts, features], gate before up -> [experts, features of whole tiles] in the order of the rows."""
    features = bias.shape[1]
    rows = torch.nn.functional.pad(bias, (0, padded_features(features) - features))
    return interleave_gate_up(rows.t()).t().contiguous() if gated else rows.contiguous()


def _offsets(
    codes: Sequence[Code], out_features: int, in_features: int, stored_zeros: bool
) -> tuple[list[tuple[int, int]], int, int]:
    """Where each expert begins, then the totals: bytes of codes, words of scales."""
    begins, byte, word = [], 0, 0
    for code in codes:
        begins.append((byte, word))
        byte += code_bytes(out_features, in_features, code.bits)
        word += scale_words(out_features, in_features, code.has_zeros(stored_zeros))
    return begins, byte, word


def _take(
    matrices: Iterator[StoredMatrix], expert: int, code: Code, shape: tuple[int, int], has_zeros: bool
) -> StoredMatrix:
    """The next matrix, if it is what was announced."""
    matrix = next(matrices, None)
    if matrix is None:
        raise ValueError(f"expert {expert}: no matrix; the number of codes and of matrices must agree")
    found = (str(matrix.code), matrix.out_features, matrix.in_features, matrix.zeros is not None)
    expected = (str(code), *shape, has_zeros)
    if found != expected:
        raise ValueError(
            f"expert {expert}: matrix has (code, out, in, zeros) = {found}, expected {expected}; "
            "check that the checkpoint's config.json belongs to its tensors"
        )
    return matrix


def _pack_matrix(
    matrix: StoredMatrix, gated: bool, in_rings: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat tiles and flat scale words of one expert, made on the device."""
    reorder = interleave_gate_up if gated else (lambda rows: rows)
    scales = reorder(matrix.scales.to(device))
    zeros = None if matrix.zeros is None else reorder(matrix.zeros.to(device))
    qweight = reorder(matrix.qweight.to(device))
    return _pack_qweight(qweight, matrix.code, in_rings), pack_scales(scales, zeros, matrix.code.number)


def pack_experts(
    matrices: Iterable[StoredMatrix],
    *,
    codes: Sequence[Code],
    out_features: int,
    in_features: int,
    gated: bool,
    stored_zeros: bool,
    device: torch.device,
    layer_codes: Iterable[Code] = (),
) -> ExpertStack:
    """Repack one projection of a layer. Only one matrix is held at a time, besides the packed buffers.

    matrices: in expert order, shapes [out_features, in_features], each of the code in `codes`; consumed lazily.
    layer_codes: of the layer's other projection: where either has trellis codes, both have their inputs in that order.
    Raises ValueError where a matrix is missing, left over, or of another shape or code.
    """
    if unknown := sorted(set(codes) - set(CODES)):
        supported = ", ".join(map(str, CODES))
        raise ValueError(f"the triton kernels have no matrices of {unknown[0]}; supported: {supported}")
    widths = widths_of({*codes, *layer_codes})
    in_rings = has_trellis(widths)
    begins, total_bytes, total_words = _offsets(codes, out_features, in_features, stored_zeros)
    packed = torch.empty(total_bytes, dtype=torch.uint8, device=device)
    scales = torch.empty(total_words, dtype=torch.int32, device=device)
    source = iter(matrices)
    for expert, (code, (byte, word)) in enumerate(zip(codes, begins, strict=True)):
        shape, has_zeros = (out_features, in_features), code.has_zeros(stored_zeros)
        tiles, words = _pack_matrix(_take(source, expert, code, shape, has_zeros), gated, in_rings, device)
        packed[byte : byte + tiles.numel()] = tiles
        scales[word : word + words.numel()] = words
    if next(source, None) is not None:
        raise ValueError(f"more matrices than the {len(codes)} codes that were announced")
    return ExpertStack(
        packed,
        scales,
        torch.tensor(begins, dtype=torch.int64, device=device).view(-1, 2),
        torch.tensor([code.number for code in codes], dtype=torch.int32, device=device),
        out_features,
        in_features,
        gated,
        widths=widths,
        stored_zeros=stored_zeros,
    )
