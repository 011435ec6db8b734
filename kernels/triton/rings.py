"""The GPU layout of trellis codes (kernels/trellis.py), and its exact inverse.

A word of 32 bits is what a ring of one feature has of one *stream*. All words of a ring meet in one thread, as
registers of matrix operands, and there decode into eight more, of four weights each (ring_decoder.py). A tile is 256
features by one group, in 8 fields of 32 features, as a 1-bit tile of scalar codes has them, two of them side by side:

    tile = [4 pairs of fields][streams][32 rows][2 fields][4 rings][4 bytes]      field f of row r: feature 32 f + r

Streams, one per bit of a weight, by position q in the ring's order; c: coded bit, u: uncoded bits, the highest first:

| bits | stream 0               | stream 1           | further streams                        |
|------|------------------------|--------------------|----------------------------------------|
| 1    | bit q: c(q)            |                    |                                        |
| 2..4 | bit q + 1: c(q)        | bit q: u(q) ^ c(q) | bit q + 3: next u(q) ^ c(q), and so on |

Flipping all bits of an entry mirrors its level. Flipped where its own coded bit is 1, an entry has 0 there: half of the
table is left, and the bits that select in it, `u ^ c` and differences of neighbouring coded bits, need not be computed
weight by weight.

**The order of inputs.** Rotated by p, a word has in its four lowest nibbles what decodes the weights at positions p,
p + 4, p + 8 and p + 12, which are an operand's four bytes. The activations of a layer that has trellis codes are
therefore stored in another order, group by group, and its scalar codes with them:

    input 16 (2 p + h) + 4 t + j of a group  is the weight at position p + 4 j + 16 h of ring t
"""

from functools import cache

import torch

from vllm_mcmoe.kernels.packing import GROUP_SIZE, pack_planes, unpack_planes
from vllm_mcmoe.kernels.trellis import RING, pack_trellis, ring_columns, unpack_trellis

RINGS = GROUP_SIZE // RING


@cache
def ring_order() -> torch.Tensor:
    """int64 [128]: the column within its group of every stored input."""
    rotation, half, ring, byte = torch.meshgrid(*map(torch.arange, (4, 2, RINGS, 4)), indexing="ij")
    position = rotation + 4 * byte + 16 * half
    return (RING * ring + ring_columns()[position]).flatten()


def to_ring_order(columns: torch.Tensor) -> torch.Tensor:
    """[..., 128 * groups], columns of each group in the order in which activations are stored."""
    return columns.unflatten(-1, (-1, GROUP_SIZE))[..., ring_order().to(columns.device)].flatten(-2)


def from_ring_order(stored: torch.Tensor) -> torch.Tensor:
    """Inverse of to_ring_order."""
    return stored.unflatten(-1, (-1, GROUP_SIZE))[..., ring_order().argsort().to(stored.device)].flatten(-2)


def _ring_codes(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """A checkpoint's bytes -> codes uint8 [features, groups, rings, 32], in the ring's order."""
    rings = unpack_trellis(qweight, bits).unflatten(-1, (-1, RINGS, RING))
    return rings[..., ring_columns().to(qweight.device)]


def _moved(stream: int, bits: int) -> int:
    """How many bits above a weight's position its bit of a stream stands."""
    return 0 if bits == 1 else (1, 0, 3, 3)[stream]


def ring_words(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """qweight: uint8 [features, groups, 16*bits], as in a checkpoint -> the streams' words, uint8 [features, groups,
    bits, 16]."""
    codes = _ring_codes(qweight, bits)
    coded = codes & 1
    streams = [coded, *(((codes >> bit) & 1) ^ coded for bit in range(bits - 1, 0, -1))]
    words = [pack_planes(stream.roll(_moved(index, bits), -1).flatten(1), (1,)) for index, stream in enumerate(streams)]
    return torch.stack(words, dim=2)


def codes_of_ring_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of ring_words."""
    stored = [unpack_planes(word, (1,)).unflatten(-1, (-1, RINGS, RING)) for word in words.unbind(2)]
    coded, *others = (stream.roll(-_moved(index, bits), -1) for index, stream in enumerate(stored))
    codes = coded.clone()
    for bit, stream in zip(range(bits - 1, 0, -1), others, strict=True):
        codes |= (stream ^ coded) << bit
    columns = torch.empty_like(codes)
    columns[..., ring_columns().to(codes.device)] = codes
    return pack_trellis(columns.flatten(1), bits)


def pack_ring_tiles(fielded: torch.Tensor) -> torch.Tensor:
    """uint8 [tiles, groups, 8, 32, bits, 16], words of every feature -> [tiles, groups, 4, bits, 32, 32]."""
    return fielded.unflatten(2, (4, 2)).permute(0, 1, 2, 5, 4, 3, 6).flatten(5)


def unpack_ring_tiles(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of pack_ring_tiles."""
    return packed.unflatten(5, (2, 16)).permute(0, 1, 2, 5, 4, 3, 6).flatten(2, 3)
