"""What a record has of a quad, as unsigned bytes in registers: codes as they are, or the levels of trellis codes.

A class per way to find them. `quad(q)` emits the 16 rows of quad q: byte j of a lane is its row's input 4q + j. Sums of
products are the same whichever class gives the bytes, so that every product is written once for all codes.

kernels/trellis.py defines levels, docs/trellis.md counts the instructions of each way.
"""

from collections.abc import Iterator

from llvmlite import ir

from vllm_mcmoe.kernels.cpu.intrinsics import I8, I32, I64, internal_function
from vllm_mcmoe.kernels.cpu.layout import SCALAR, SCALAR_WITH_ZEROS, TRELLIS, TRELLIS_VBMI, Record
from vllm_mcmoe.kernels.cpu.vectors import (
    LANES,
    V32X8,
    V64X8,
    VI32,
    call,
    constant,
    halves,
    join,
    load,
    store,
)
from vllm_mcmoe.kernels.trellis import LARGEST_LEVEL, MEMORY, level_table

PORTION_QUADS = 8  # quads in one vector at 1 bit
VECTOR_BYTES = 4 * LANES
WINDOWS = 1 << (MEMORY + 1)  # what a window can be: entries that AVX-512 and AVX2 look up at once


def byte_mask(mask: int) -> ir.Constant:
    return constant(VI32, mask * 0x01010101)


def largest_value(kind: Record) -> int:
    """The largest byte that a quad can have."""
    return (1 << kind.bits) - 1 if kind.code.kind == "scalar" else LARGEST_LEVEL[kind.bits]


class Codes:
    """The packed codes of one group of 16 rows, or of a portion of it, unpacked quad by quad."""

    def __init__(self, builder: ir.IRBuilder, kind: Record, record: ir.Value, portion: ir.Value | None = None):
        """portion: number of a run of 8 quads; quads are then counted from its first."""
        self.builder, self.bits = builder, kind.bits
        self.planes: list[tuple[int, int, ir.Value]] = []  # bits, weight shift of its codes, address of its vectors
        shift = 0
        for width in kind.planes:
            start = builder.add(record, I64(shift * kind.group_size * LANES // 8))
            if portion is not None:
                start = builder.add(start, builder.mul(portion, I64(width * VECTOR_BYTES)))
            self.planes.append((width, shift, start))
            shift += width
        self.loaded: dict[tuple[int, int], ir.Value] = {}

    def _vector(self, start: ir.Value, shift: int, index: int) -> ir.Value:
        """A vector of a plane, loaded when first needed."""
        if (shift, index) not in self.loaded:
            self.loaded[shift, index] = load(self.builder, VI32, start, index * VECTOR_BYTES)
        return self.loaded[shift, index]

    def fields(self, quad: int, first_plane: int = 0) -> Iterator[tuple[ir.Value, int, int, int]]:
        """Per plane: (vector, position of the quad's field in every byte, bits of a field, weight shift)."""
        for width, shift, start in self.planes[first_plane:]:
            per_vector = 8 // width
            yield self._vector(start, shift, quad // per_vector), quad % per_vector * width, width, shift

    def moved(self, vector: ir.Value, position: int, wanted: int) -> ir.Value:
        """The bits at `position` of every byte at the wanted one; what else is in the bytes means nothing."""
        if position > wanted:
            return self.builder.lshr(vector, constant(VI32, position - wanted))
        return self.builder.shl(vector, constant(VI32, wanted - position)) if position < wanted else vector

    def quad(self, quad: int) -> ir.Value:
        """int32 [16], four unsigned bytes each."""
        result = None
        for vector, position, width, shift in self.fields(quad):
            field = self.builder.and_(self.moved(vector, position, shift), byte_mask(((1 << width) - 1) << shift))
            result = field if result is None else self.builder.or_(result, field)
        return result


class Levels(Codes):
    """What ways to decode trellis codes have in common."""

    def __init__(self, builder: ir.IRBuilder, kind: Record, record: ir.Value, portion: ir.Value | None = None):
        super().__init__(builder, kind, record, portion)
        self.rotated_planes: dict[ir.Value, ir.Value] = {}

    def coded(self, quad: int) -> ir.Value:
        """The rings that the quad is of, a row's in each lane."""
        (_, _, start), *_ = self.planes
        return self._vector(start, 0, quad // PORTION_QUADS)

    def rotated(self, lanes: ir.Value, by: int) -> ir.Value:
        """To the right."""
        return call(self.builder, "llvm.fshr.v16i32", VI32, lanes, lanes, constant(VI32, by % 32)) if by else lanes

    def rotated_once(self, lanes: ir.Value, by: int) -> ir.Value:
        """A vector of a plane, by a number that all its quads have in common."""
        if lanes not in self.rotated_planes:
            self.rotated_planes[lanes] = self.rotated(lanes, by)
        return self.rotated_planes[lanes]

    def windows(self, quad: int) -> ir.Value:
        """In the low four bits of every byte; the others mean nothing."""
        return self.rotated(self.coded(quad), quad % PORTION_QUADS)

    def uncoded_fields(self, quad: int) -> Iterator[tuple[ir.Value, int, int]]:
        """Per plane of uncoded bits, the lowest first: (vector, position of the quad's field, bits)."""
        for vector, position, width, _ in self.fields(quad, first_plane=1):
            yield vector, position, width

    def uncoded_bits(self, quad: int) -> Iterator[tuple[ir.Value, int]]:
        """Per uncoded bit, the lowest first: (vector, its position in every byte)."""
        for vector, position, width in self.uncoded_fields(quad):
            for bit in range(width):
                yield vector, position + bit

    def entries(self, quad: int) -> ir.Value:
        """Where each level stands in the table, in the low bits of every byte; the others mean nothing."""
        builder, entries, filled = self.builder, self.windows(quad), MEMORY + 1
        for vector, position, width in self.uncoded_fields(quad):
            below, field = byte_mask((1 << filled) - 1), self.moved(vector, position, filled)
            entries = builder.or_(builder.and_(entries, below), builder.and_(field, builder.not_(below)))
            filled += width
        return entries

    def table(self) -> list[int]:
        return level_table(self.bits).tolist()


class VbmiLevels(Levels):
    """AVX-512 with VBMI: one look-up, in 64 entries or in 128."""

    def quad(self, quad: int) -> ir.Value:
        table = self.table()
        table *= max(1, 64 // len(table))  # vpermb looks at 6 bits of an entry's number
        low, *high = (ir.Constant(V64X8, table[i : i + 64]) for i in range(0, len(table), 64))
        entries = self.builder.bitcast(self.entries(quad), V64X8)
        if high:
            levels = call(self.builder, "llvm.x86.avx512.vpermi2var.qi.512", V64X8, low, entries, *high)
        else:
            levels = call(self.builder, "llvm.x86.avx512.permvar.qi.512", V64X8, low, entries)
        return self.builder.bitcast(levels, VI32)

    def entries(self, quad: int) -> ir.Value:
        """A plane of one uncoded bit, rotated so that the rotation of quad s brings bit s to its place, turns with
        the windows: merged before that rotation it costs one instruction a quad, not two."""
        by, lanes, filled, fields = quad % PORTION_QUADS, self.coded(quad), MEMORY + 1, []
        for vector, position, width in self.uncoded_fields(quad):
            if width == 1:
                windows = (WINDOWS - 1) * 0x01010101
                windows = (windows << by | windows >> 32 - by) & 0xFFFFFFFF
                lanes = self._chosen(constant(VI32, windows), lanes, self.rotated_once(vector, -filled))
            else:
                field_bits = byte_mask(((1 << width) - 1) << filled)
                fields.append((field_bits, self.moved(vector, position, filled)))
            filled += width
        entries = self.rotated(lanes, by)
        for field_bits, field in fields:
            entries = self._chosen(field_bits, field, entries)
        return entries

    def _chosen(self, mask: ir.Constant, there: ir.Value, elsewhere: ir.Value) -> ir.Value:
        """Bits of one value under the mask, of the other elsewhere: one instruction, where LLVM takes two."""
        table = 0b11001010  # by the bits of the three operands, the mask's the highest
        return call(self.builder, "llvm.x86.avx512.pternlog.d.512", VI32, mask, there, elsewhere, I32(table))


class Avx512Levels(Levels):
    """AVX-512 without VBMI: look-ups in 16 entries, among which the uncoded bits choose."""

    def quad(self, quad: int) -> ir.Value:
        builder, table = self.builder, self.table()
        windows = builder.bitcast(builder.and_(self.windows(quad), byte_mask(WINDOWS - 1)), V64X8)
        found = [
            call(builder, "llvm.x86.avx512.pshuf.b.512", V64X8, ir.Constant(V64X8, 4 * table[i : i + WINDOWS]), windows)
            for i in range(0, len(table), WINDOWS)
        ]
        for vector, position in self.uncoded_bits(quad):  # the lowest first: neighbours differ in it
            bit = builder.bitcast(builder.and_(vector, byte_mask(1 << position)), V64X8)
            is_set = builder.icmp_unsigned("!=", bit, ir.Constant(V64X8, [0] * 64))
            found = [builder.select(is_set, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        return builder.bitcast(found[0], VI32)


class Avx2Levels(Levels):
    """AVX2: the same with two registers for a vector. Signs of bytes are what chooses; the highest uncoded bit mirrors,
    so that half of the table is enough."""

    def quad(self, quad: int) -> ir.Value:
        builder, table = self.builder, self.table()
        windows, signs = self.windows(quad), [self.moved(*bit, 7) for bit in self.uncoded_bits(quad)]
        mirrored = None
        if signs:
            is_set = builder.icmp_signed("<", builder.bitcast(signs.pop(), V64X8), ir.Constant(V64X8, [0] * 64))
            mirrored = builder.bitcast(builder.sext(is_set, V64X8), VI32)
            windows = builder.xor(windows, mirrored)
            signs = [halves(builder, builder.xor(sign, mirrored), V32X8) for sign in signs]
            table = table[: len(table) // 2]
        windows = halves(builder, builder.and_(windows, byte_mask(WINDOWS - 1)), V32X8)
        pair = [self._looked_up(table, windows[half], [sign[half] for sign in signs]) for half in (0, 1)]
        levels = builder.bitcast(join(builder, *pair), VI32)
        if mirrored is None:
            return levels
        return builder.xor(levels, builder.and_(mirrored, byte_mask(LARGEST_LEVEL[self.bits])))

    def _looked_up(self, table: list[int], windows: ir.Value, signs: list[ir.Value]) -> ir.Value:
        """One register. signs: of the lowest uncoded bit first."""
        found = [
            call(self.builder, "llvm.x86.avx2.pshuf.b", V32X8, ir.Constant(V32X8, 2 * table[i : i + WINDOWS]), windows)
            for i in range(0, len(table), WINDOWS)
        ]
        for sign in signs:
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [call(self.builder, "llvm.x86.avx2.pblendvb", V32X8, *pair, sign) for pair in pairs]
        return found[0]

    def windows(self, quad: int) -> ir.Value:
        """A rotation takes three instructions: one is enough, after which all windows lie within bytes."""
        place = quad % PORTION_QUADS
        lanes = self.coded(quad) if place <= MEMORY else self.rotated_once(self.coded(quad), MEMORY + 1)
        return self.moved(lanes, place % (MEMORY + 1), 0)


class PortableLevels(Levels):
    """Any CPU: a portion is decoded byte by byte into memory, by a function of its own."""

    def __init__(self, builder: ir.IRBuilder, kind: Record, record: ir.Value, portion: ir.Value):
        super().__init__(builder, kind, record, portion)
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(I8, PORTION_QUADS * VECTOR_BYTES))
            room.align = VECTOR_BYTES
        self.decoded = builder.ptrtoint(room, I64)
        builder.call(_decode_function(builder.module, kind), [record, portion, self.decoded])

    def quad(self, quad: int) -> ir.Value:
        return load(self.builder, VI32, self.decoded, quad * VECTOR_BYTES)


def _decode_function(module: ir.Module, kind: Record) -> ir.Function:
    """void name(record, portion, out): the levels of a portion as bytes [quad][row][4]."""
    name = f"mcmoe_decode_{kind.bits}bit_trellis"
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    function = internal_function(module, name, 3)
    record, portion, out = function.args
    entry, loop, done = (function.append_basic_block(label) for label in ("entry", "loop", "done"))
    builder = ir.IRBuilder(entry)
    levels = Levels(builder, kind, record, portion)
    table = levels.table()
    last = byte_mask(len(table) - 1)
    for quad in range(PORTION_QUADS):
        store(builder, builder.and_(levels.entries(quad), last), out, quad * VECTOR_BYTES)
    kept = ir.GlobalVariable(module, ir.ArrayType(I8, len(table)), f"{name}_table")
    kept.initializer, kept.global_constant, kept.linkage = ir.Constant(kept.value_type, table), True, "internal"
    builder.branch(loop)
    builder.position_at_end(loop)
    position = builder.phi(I64)
    position.add_incoming(I64(0), entry)
    byte = builder.inttoptr(builder.add(out, position), I8.as_pointer())
    number = builder.zext(builder.load(byte), I64)
    builder.store(builder.load(builder.gep(kept, [I64(0), number])), byte)
    following = builder.add(position, I64(1))
    position.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, I64(PORTION_QUADS * VECTOR_BYTES)), loop, done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


# What reads the records of each family, by instruction set
_SCALAR = {SCALAR: Codes, SCALAR_WITH_ZEROS: Codes}
READERS_512 = _SCALAR | {TRELLIS: Avx512Levels, TRELLIS_VBMI: VbmiLevels}
READERS_256 = _SCALAR | {TRELLIS: Avx2Levels}
PORTABLE_READERS = _SCALAR | {TRELLIS: PortableLevels}
