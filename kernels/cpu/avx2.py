"""The matrix products in 256-bit vectors: byte multiply-add of AVX2, and VNNI where it comes without AVX-512.

AVX2 multiplies 32 unsigned by 32 signed bytes and adds neighbours in 16 bits, saturating. Codes are small, so that many
of these sums fit in 16 bits before they must be widened: with codes below 2**b one adds at most 2 * 127 * (2**b - 1),
which leaves room for a whole group of 128 inputs at 1 and 2 bits, half of one at 3 and a quarter at 4. Codes of 8 bits
are multiplied as two digits of 4. The sums are those of the definition, exactly. VNNI sums in 32 bits.

A few slots are multiplied as products.py does, codes unpacked in registers on their way. For more, the codes of a
record are unpacked once, to bytes that stay in L1, and the slots follow in batches: as many as registers hold sums for.
That inner loop is what prefill consists of. It is at the limit of instructions a core takes in, and written in assembly
for AVX2, since LLVM reorders it until registers run out: 4% fewer cycles at 2 bits, 7% at 3, 9% at 4.

Long for the reason of products.py: emitted code and the loops that call it know each other's registers.

A record's 16 rows (layout.py) are two registers here: 16 lanes of 32 bits are written as one generic vector, which LLVM
splits.
"""

from functools import partial

import llvmlite.binding as llvm
from llvmlite import ir
from numba import literally, njit
from numba.core import types
from numba.extending import intrinsic

from vllm_mcmoe.kernels.cpu.chunks import tile_inputs, tile_inputs_compiled
from vllm_mcmoe.kernels.cpu.intrinsics import I8, I16, I32, I64
from vllm_mcmoe.kernels.cpu.layout import (
    Record,
    expert_record,
    linear_record,
    linear_record_bytes_compiled,
    record_bytes_compiled,
)
from vllm_mcmoe.kernels.cpu.products import (
    PORTION_QUADS,
    QUADS,
    VECTOR_BYTES,
    Codes,
    add_scaled,
    constant_zero,
    multiply_by,
    multiply_linear,
    prefetch_ahead,
    products_by,
    scale_and_zero,
    unpack_function,
)
from vllm_mcmoe.kernels.cpu.vectors import VI32, call, constant, load, splat
from vllm_mcmoe.kernels.packing import GROUP_SIZE, WIDTHS

INT16_MAX, INT8_MAX = 2**15 - 1, 127

llvm.initialize_native_asmparser()  # of _assembled

# Vectors of one AVX2 register
V8X32, V16X16, V32X8 = ir.VectorType(I32, 8), ir.VectorType(I16, 16), ir.VectorType(I8, 32)
# ... and of two: 16 rows
V32X16, V64X8 = ir.VectorType(I16, 32), ir.VectorType(I8, 64)


def _halves(builder: ir.IRBuilder, value: ir.Value, half: ir.VectorType) -> list[ir.Value]:
    """The two registers of a 512-bit value, as `half`."""
    wide = builder.bitcast(value, ir.VectorType(half.element, 2 * half.count))
    indices = [ir.Constant(ir.VectorType(I32, half.count), list(range(i, i + half.count))) for i in (0, half.count)]
    return [builder.shuffle_vector(wide, ir.Constant(wide.type, ir.Undefined), index) for index in indices]


def _join(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    count = 2 * low.type.count
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, count), list(range(count))))


def _multiply_add_bytes(builder: ir.IRBuilder, weights: ir.Value, inputs: ir.Value) -> ir.Value:
    """16-bit sums of two products each: weights unsigned, inputs signed bytes, both 512 bits -> int16 [32]."""
    pairs = zip(_halves(builder, weights, V32X8), _halves(builder, inputs, V32X8), strict=True)
    return _join(builder, *(call(builder, "llvm.x86.avx2.pmadd.ub.sw", V16X16, w, a) for w, a in pairs))


def _widen(builder: ir.IRBuilder, sums: ir.Value) -> ir.Value:
    """int16 [32] -> int32 [16], neighbours added."""
    ones = ir.Constant(V16X16, [1] * 16)
    halves = _halves(builder, sums, V16X16)
    return _join(builder, *(call(builder, "llvm.x86.avx2.pmadd.wd", V8X32, half, ones) for half in halves))


def fitting_quads(bits: int) -> int:
    """Quads (4 inputs) whose products AVX2 can sum in 16 bits, a power of two."""
    most = INT16_MAX // (2 * INT8_MAX * ((1 << bits) - 1))
    return 1 << (most.bit_length() - 1)


class Unpacked:
    """Codes of a record as bytes [quad][row][4], from the first quad of a portion on."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value, portion: ir.Value):
        self.builder = builder
        self.start = builder.add(address, builder.mul(portion, I64(PORTION_QUADS * VECTOR_BYTES)))

    def quad(self, quad: int) -> ir.Value:
        return load(self.builder, VI32, self.start, quad * VECTOR_BYTES)


class Digit:
    """One of the two 4-bit digits of 8-bit codes."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value, shift: int, portion: ir.Value):
        self.builder, self.shift = builder, shift
        self.codes = Unpacked(builder, address, portion)

    def quad(self, quad: int) -> ir.Value:
        codes = self.codes.quad(quad)
        if self.shift:
            codes = self.builder.lshr(codes, constant(VI32, self.shift))
        return self.builder.and_(codes, constant(VI32, 0x0F0F0F0F))


def sums_avx2(builder, bits: int, group_size: int, codes_from, activations, tokens: int, tile_stride):
    """sum_k code * a_code of one group: int32 [16] per token.

    codes_from(portion) gives Codes, Unpacked or Digit, whose quads are counted from that portion of 8 quads on.
    """
    fitting, quads = fitting_quads(bits), group_size // 4
    step = min(fitting, tile_inputs(group_size) // 4)

    def add(total, weights, inputs):
        product = _multiply_add_bytes(builder, weights, inputs)
        return product if total is None else builder.add(total, product)

    if fitting >= quads:  # all sums stay in 16 bits
        totals = _loop(builder, V32X16, step, add, None, group_size, codes_from, activations, tokens, tile_stride)
        return [_widen(builder, total) for total in totals]
    widen = partial(_widen, builder)
    return _loop(builder, VI32, step, add, widen, group_size, codes_from, activations, tokens, tile_stride)


def sums_by(dot):
    """As sums_avx2, by a `dot` of products.py, which sums in 32 bits."""

    def sums(builder, bits: int, *rest) -> list[ir.Value]:
        return _loop(builder, VI32, PORTION_QUADS, partial(dot, builder), None, *rest)

    return sums


def _loop(builder, kind, step: int, add, widen, group_size: int, codes_from, activations, tokens: int, tile_stride):
    """Sums of type `kind` per token, carried through turns of `step` quads.

    add(sum, weights, inputs) adds a quad to the carried sum; where there is `widen`, to one of this turn, None at
    first, which widen makes a `kind`.
    """
    tile = tile_inputs(group_size)
    before = builder.block
    loop, done = (builder.append_basic_block(name) for name in ("portion", "portions_done"))
    builder.branch(loop)
    builder.position_at_end(loop)
    turn = builder.phi(I64)
    turn.add_incoming(I64(0), before)
    carried = [builder.phi(kind) for _ in range(tokens)]
    codes = codes_from(builder.mul(turn, I64(step // PORTION_QUADS)))
    first_input = builder.mul(turn, I64(4 * step))
    base = builder.add(activations, builder.urem(first_input, I64(tile)))
    base = builder.add(base, builder.mul(builder.udiv(first_input, I64(tile)), tile_stride))
    sums = [None] * tokens if widen else list(carried)
    for quad in range(step):
        weights = codes.quad(quad)
        for token in range(tokens):
            inputs = splat(builder, load(builder, I32, base, token * tile + quad * 4))
            sums[token] = add(sums[token], weights, inputs)
    if widen:
        sums = [builder.add(total, widen(added)) for total, added in zip(carried, sums, strict=True)]
    following = builder.add(turn, I64(1))
    turn.add_incoming(following, loop)
    for phi, total in zip(carried, sums, strict=True):
        phi.add_incoming(ir.Constant(kind, [0] * kind.count), before)
        phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, I64(group_size // 4 // step)), loop, done)
    builder.position_at_end(done)
    return sums


def _sums_of_bytes(builder, sums, kind: Record, codes, *rest) -> list[ir.Value]:
    """Of codes that are bytes at the address `codes`; AVX2 multiplies 8-bit ones digit by digit."""
    if sums is not sums_avx2:
        return sums(builder, kind.bits, kind.group_size, partial(Unpacked, builder, codes), *rest)
    if kind.bits < 8:
        return _sums_of_small_bytes(builder, kind, codes, *rest)
    low, high = (sums(builder, 4, kind.group_size, partial(Digit, builder, codes, shift), *rest) for shift in (0, 4))
    return [builder.add(x, builder.shl(y, constant(VI32, 4))) for x, y in zip(low, high, strict=True)]


def _sums_of_small_bytes(builder, kind: Record, codes, activations, tokens: int, tile_stride) -> list[ir.Value]:
    """sums_avx2 of codes below 16 that are bytes, without a loop."""
    fitting, quads = fitting_quads(kind.bits), kind.group_size // 4
    tile = tile_inputs(kind.group_size)
    step = min(fitting, tile // 4)
    sums = totals = None
    for first in range(0, quads, step):
        tile_start = builder.add(activations, builder.mul(tile_stride, I64(4 * first // tile)))
        here = builder.add(tile_start, I64(4 * first % tile))
        sums = _assembled(builder, step, builder.add(codes, I64(first * VECTOR_BYTES)), here, tokens, tile, sums)
        if fitting < quads:
            widened = [_widen(builder, total) for total in sums]
            totals = widened if totals is None else [builder.add(*pair) for pair in zip(totals, widened, strict=True)]
            sums = None
    return totals if sums is None else [_widen(builder, total) for total in sums]


def _assembled(builder, quads: int, codes, activations, tokens: int, tile: int, sums: list[ir.Value] | None):
    """int16 [32] per token: `sums`, or nothing, plus the products of some quads, whose sums must fit."""
    registers = 2 * tokens
    low, high, inputs, product = (f"${registers + i}" for i in range(4))
    lines = []
    for quad in range(quads):
        for half, weights in enumerate((low, high)):
            lines.append(f"vmovdqu {quad * VECTOR_BYTES + 32 * half}(${registers + 4}), {weights}")
        for token in range(tokens):
            lines.append(f"vpbroadcastd {token * tile + 4 * quad}(${registers + 5}), {inputs}")
            for half, weights in enumerate((low, high)):
                total = f"${2 * token + half}"
                if sums is None and quad == 0:
                    lines.append(f"vpmaddubsw {inputs}, {weights}, {total}")
                else:
                    lines.append(f"vpmaddubsw {inputs}, {weights}, {product}")
                    lines.append(f"vpaddw {product}, {total}, {total}")
    carried = [] if sums is None else [half for total in sums for half in _halves(builder, total, V16X16)]
    addresses = [builder.inttoptr(address, I8.as_pointer()) for address in (codes, activations)]
    constraints = ["=&x"] * (registers + 4) + ["r", "r"] + [str(i) for i in range(len(carried))] + ["~{memory}"]
    result = ir.LiteralStructType([V16X16] * registers + [V32X8] * 4)
    arguments = [*addresses, *carried]
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    found = builder.asm(kind, "\n".join(lines), ",".join(constraints), arguments, False)
    halves = [builder.extract_value(found, i) for i in range(registers)]
    return [_join(builder, *halves[2 * token : 2 * token + 2]) for token in range(tokens)]


def products_avx2(builder, kind: Record, record, *rest) -> list[ir.Value]:
    """group_products of products.multiply_by, codes unpacked on their way."""
    if kind.bits == 8:
        return _sums_of_bytes(builder, sums_avx2, kind, record, *rest)
    return sums_avx2(builder, kind.bits, kind.group_size, partial(Codes, builder, kind, record), *rest)


def dot_vnni_256(builder: ir.IRBuilder, total: ir.Value, weights: ir.Value, quad: ir.Value) -> ir.Value:
    """products.dot_vnni in two registers of 256 bits."""
    operands = (_halves(builder, value, V8X32) for value in (total, weights, quad))
    halves = zip(*operands, strict=True)
    return _join(builder, *(call(builder, "llvm.x86.avx512.vpdpbusd.256", V8X32, *half) for half in halves))


def block_function(module: ir.Module, name: str, sums, kind: Record, tokens: int) -> ir.Function:
    """void name(record, codes, activations, tile_stride, scales, totals, batches), all int64.

    Adds one group of 16 rows, whose codes are bytes at `codes`, times `batches` batches of `tokens` slots to totals.
    """
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 7), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    entry, loop, done = (function.append_basic_block(label) for label in ("entry", "loop", "done"))
    record, codes, activations, tile_stride, scales, totals, batches = function.args
    builder = ir.IRBuilder(entry)
    scale, zero = scale_and_zero(builder, constant_zero(kind), builder.add(record, I64(kind.code_bytes)))
    builder.branch(loop)
    builder.position_at_end(loop)
    batch = builder.phi(I64)
    batch.add_incoming(I64(0), entry)
    activations = builder.add(activations, builder.mul(batch, I64(tokens * tile_inputs(kind.group_size))))
    scales = builder.add(scales, builder.mul(batch, I64(tokens * 8)))
    totals = builder.add(totals, builder.mul(batch, I64(tokens * VECTOR_BYTES)))
    products = _sums_of_bytes(builder, sums, kind, codes, activations, tokens, tile_stride)
    for token, product in enumerate(products):
        add_scaled(builder, product, scale, zero, scales, token * 8, totals, token * VECTOR_BYTES)
    following = builder.add(batch, I64(1))
    batch.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, batches), loop, done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


FEW_SLOTS = 6  # unpacked on their way; the most that one batch takes, so that codes are never unpacked twice
BATCH = 4  # slots multiplied together: 8 registers of sums, 2 of codes
LAST_BATCH = {0: 0, 1: 5, 2: 6, 3: 3}  # slots by what is left over: a lone slot would cost as much as two in company


def _emit_block(builder, isa: str, sums, kind: Record, record, room, activations, tile_stride, scales, totals, count):
    """One group of 16 rows times `count` slots, more than FEW_SLOTS; codes are unpacked into `room`."""
    name = f"mcmoe_{isa}_{kind.bits}bit_{kind.group_size}{'' if kind.zero is None else '_zero'}"
    codes = room
    if kind.bits == 8:  # bytes already
        prefetch_ahead(builder, kind, record)
        codes = record
    else:
        builder.call(unpack_function(builder.module, f"{name}_unpack", kind), [record, room])

    def multiply(tokens, activations, scales, totals, batches):
        function = block_function(builder.module, f"{name}_block_{tokens}", sums, kind, tokens)
        builder.call(function, [record, codes, activations, tile_stride, scales, totals, batches])

    left_over, last = builder.urem(count, I64(BATCH)), I64(0)
    for slots, batch in LAST_BATCH.items():
        last = builder.select(builder.icmp_signed("==", left_over, I64(slots)), I64(batch), last)
    before_last = builder.sub(count, last)
    with builder.if_then(builder.icmp_signed(">", before_last, I64(0))):
        multiply(BATCH, activations, scales, totals, builder.udiv(before_last, I64(BATCH)))
    last_addresses = [
        builder.add(address, builder.mul(before_last, I64(stride)))
        for address, stride in ((activations, tile_inputs(kind.group_size)), (scales, 8), (totals, VECTOR_BYTES))
    ]
    done = builder.append_basic_block(f"{name}_done")
    switch = builder.switch(last, done)
    for slots in filter(None, LAST_BATCH.values()):
        case = builder.append_basic_block(f"{name}_last_{slots}")
        switch.add_case(I64(slots), case)
        with builder.goto_block(case):
            multiply(slots, *last_addresses, I64(1))
            builder.branch(done)
    builder.position_at_end(done)


def _multiply_block(isa: str, sums):
    """multiply_block(stored_zeros, bits, record, room, activations, ...): _emit_block for an expert's width, known at
    run time; stored_zeros is a constant."""

    @intrinsic(prefer_literal=True)
    def multiply_block(
        typing_context, stored_zeros, bits, record, room, activations, tile_stride, scales, totals, count
    ):
        has_zeros = bool(stored_zeros.literal_value)

        def emit(context, builder, signature, args):
            done = builder.append_basic_block("multiplied")
            switch = builder.switch(args[1], done)
            for bits in WIDTHS:
                block = builder.append_basic_block(f"block_{bits}bit")
                switch.add_case(I64(bits), block)
                builder.position_at_end(block)
                _emit_block(builder, isa, sums, expert_record(bits, has_zeros), *args[2:])
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(stored_zeros, *[types.int64] * 8), emit

    return multiply_block


def _multiply_linear_block(isa: str, sums):
    """The same for a linear, whose bits and group size are constants."""

    @intrinsic(prefer_literal=True)
    def multiply_block(typing_context, bits, group_size, record, room, activations, tile_stride, scales, totals, count):
        kind = linear_record(bits.literal_value, group_size.literal_value)

        def emit(context, builder, signature, args):
            _emit_block(builder, isa, sums, kind, *args[2:])
            return context.get_dummy_value()

        return types.void(bits, group_size, *[types.int64] * 7), emit

    return multiply_block


@intrinsic
def code_room(typing_context):
    """Address of room on the stack for one record's codes as bytes, aligned to a cache line."""

    def emit(context, builder, signature, args):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(I8, QUADS * VECTOR_BYTES))
            room.align = 64
        return builder.ptrtoint(room, I64)

    return types.int64(), emit


def multiply_rows_by(isa: str, group_products, sums):
    """multiply_rows of an instruction set, from its ways to multiply few slots and many."""
    multiply = multiply_by(isa, group_products, tuple(range(1, FEW_SLOTS + 1)))
    multiply_block = _multiply_block(isa, sums)

    @njit
    def multiply_rows(
        stored_zeros, bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        """As products.multiply_rows_vnni."""
        codes += first * groups * GROUP_SIZE + first_group * GROUP_SIZE * count
        scales += (first * groups + first_group * count) * 8
        size = record_bytes_compiled(stored_zeros, bits)
        room = code_room()
        for block in range(row_blocks):
            record = records + (block * groups + first_group) * size
            block_totals = totals + block * count * VECTOR_BYTES
            if count <= FEW_SLOTS:
                multiply(
                    literally(stored_zeros), bits, count, record, group_count, codes, count * 64, scales, count * 8,
                    block_totals,
                )  # fmt: skip
                continue
            for group in range(group_count):
                multiply_block(
                    literally(stored_zeros), bits, record + group * size, room,
                    codes + group * GROUP_SIZE * count, count * 64, scales + group * count * 8, block_totals, count,
                )  # fmt: skip

    return multiply_rows


def multiply_linear_rows_by(isa: str, group_products, sums):
    """The same for linears, whose bits and group size are constants of the caller."""
    multiply = multiply_linear(isa, group_products, tuple(range(1, FEW_SLOTS + 1)))
    multiply_block = _multiply_linear_block(isa, sums)

    @njit
    def multiply_rows(
        bits, group_size, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        tile_stride = count * tile_inputs_compiled(group_size)
        codes += first * groups * group_size + first_group * group_size * count
        scales += (first * groups + first_group * count) * 8
        size = linear_record_bytes_compiled(bits, group_size)
        room = code_room()
        for block in range(row_blocks):
            record = records + (block * groups + first_group) * size
            block_totals = totals + block * count * VECTOR_BYTES
            if count <= FEW_SLOTS:
                multiply(
                    literally(bits), literally(group_size), count, record, group_count, codes, tile_stride,
                    scales, count * 8, block_totals,
                )  # fmt: skip
                continue
            for group in range(group_count):
                multiply_block(
                    literally(bits), literally(group_size), record + group * size, room,
                    codes + group * group_size * count, tile_stride, scales + group * count * 8, block_totals, count,
                )  # fmt: skip

    return multiply_rows


_AVX2 = "avx2", products_avx2, sums_avx2
_AVX_VNNI = "avx_vnni", products_by(dot_vnni_256), sums_by(dot_vnni_256)
multiply_rows_avx2, multiply_rows_avx_vnni = multiply_rows_by(*_AVX2), multiply_rows_by(*_AVX_VNNI)
multiply_linear_rows_avx2 = multiply_linear_rows_by(*_AVX2)
multiply_linear_rows_avx_vnni = multiply_linear_rows_by(*_AVX_VNNI)
