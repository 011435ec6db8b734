"""The matrix products in 256-bit vectors: byte multiply-add of AVX2, and VNNI where it comes without AVX-512.

AVX2 multiplies 32 unsigned by 32 signed bytes and adds neighbours in 16 bits, saturating. Codes are small, so that many
of these sums fit in 16 bits before they must be widened: with codes below 2**b one adds at most 2 * 127 * (2**b - 1),
which leaves room for a whole group of 128 inputs at 1 and 2 bits, half of one at 3 and a quarter at 4. Levels of
trellis codes have 5 to 7 bits, and leave room for 16, 8 and 4 inputs. Codes of 8 bits are multiplied as two digits of
4. The sums are those of the definition, exactly. VNNI sums in 32 bits.

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
from vllm_mcmoe.kernels.cpu.codes import PORTION_QUADS, READERS_256, VECTOR_BYTES, Codes, largest_value
from vllm_mcmoe.kernels.cpu.intrinsics import I8, I32, I64, internal_function
from vllm_mcmoe.kernels.cpu.layout import (
    Record,
    family_records,
    linear_record,
    linear_record_bytes_compiled,
    record_bytes_compiled,
)
from vllm_mcmoe.kernels.cpu.products import (
    add_scaled,
    constant_zero,
    multiply_by,
    multiply_linear,
    prefetch_ahead,
    products_by,
    record_room,
    scale_and_zero,
    unpack_function,
)
from vllm_mcmoe.kernels.cpu.vectors import (
    V8X32,
    V16X16,
    V32X8,
    V32X16,
    VI32,
    call,
    constant,
    halves,
    join,
    load,
    splat,
)
from vllm_mcmoe.kernels.packing import GROUP_SIZE

INT16_MAX, INT8_MAX = 2**15 - 1, 127

llvm.initialize_native_asmparser()  # of _assembled


def _multiply_add_bytes(builder: ir.IRBuilder, weights: ir.Value, inputs: ir.Value) -> ir.Value:
    """16-bit sums of two products each: weights unsigned, inputs signed bytes, both 512 bits -> int16 [32]."""
    pairs = zip(halves(builder, weights, V32X8), halves(builder, inputs, V32X8), strict=True)
    return join(builder, *(call(builder, "llvm.x86.avx2.pmadd.ub.sw", V16X16, w, a) for w, a in pairs))


def _widen(builder: ir.IRBuilder, sums: ir.Value) -> ir.Value:
    """int16 [32] -> int32 [16], neighbours added."""
    ones = ir.Constant(V16X16, [1] * 16)
    pair = halves(builder, sums, V16X16)
    return join(builder, *(call(builder, "llvm.x86.avx2.pmadd.wd", V8X32, half, ones) for half in pair))


def fitting_quads(largest: int) -> int:
    """Quads (4 inputs) whose products AVX2 can sum in 16 bits, a power of two. largest: of their bytes."""
    most = INT16_MAX // (2 * INT8_MAX * largest)
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


def sums_avx2(builder, largest: int, group_size: int, codes_from, activations, tokens: int, tile_stride):
    """sum_k code * a_code of one group: int32 [16] per token.

    largest: of the codes. codes_from(portion) gives a class of codes.py, Unpacked or Digit, whose quads are counted
    from that portion of 8 quads on.
    """
    fitting, quads = fitting_quads(largest), group_size // 4
    step = max(PORTION_QUADS, min(fitting, tile_inputs(group_size) // 4))

    def add(total, weights, inputs):
        product = _multiply_add_bytes(builder, weights, inputs)
        return product if total is None else builder.add(total, product)

    if fitting >= quads:  # all sums stay in 16 bits
        totals = _loop(builder, V32X16, step, add, group_size, codes_from, activations, tokens, tile_stride)
        return [_widen(builder, total) for total in totals]
    widening = min(fitting, step), partial(_widen, builder)
    return _loop(builder, VI32, step, add, group_size, codes_from, activations, tokens, tile_stride, widening)


def sums_by(dot):
    """As sums_avx2, by a `dot` of products.py, which sums in 32 bits."""

    def sums(builder, largest: int, *rest) -> list[ir.Value]:
        return _loop(builder, VI32, PORTION_QUADS, partial(dot, builder), *rest)

    return sums


def _loop(
    builder, kind, step: int, add, group_size: int, codes_from, activations, tokens: int, tile_stride, widening=None
):
    """Sums of type `kind` per token, carried through turns of `step` quads.

    add(sum, weights, inputs) adds a quad to the carried sum. With `widening` it adds to a narrower one, None at first,
    which after so many quads is made a `kind` by the function there.
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
    totals, narrow = list(carried), [None] * tokens
    for quad in range(step):
        weights = codes.quad(quad)
        for token in range(tokens):
            inputs = splat(builder, load(builder, I32, base, token * tile + quad * 4))
            if widening is None:
                totals[token] = add(totals[token], weights, inputs)
                continue
            fitting, widen = widening
            narrow[token] = add(narrow[token], weights, inputs)
            if quad % fitting == fitting - 1:
                totals[token] = builder.add(totals[token], widen(narrow[token]))
                narrow[token] = None
    following = builder.add(turn, I64(1))
    turn.add_incoming(following, loop)
    for phi, total in zip(carried, totals, strict=True):
        phi.add_incoming(ir.Constant(kind, [0] * kind.count), before)
        phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, I64(group_size // 4 // step)), loop, done)
    builder.position_at_end(done)
    return totals


def _sums_of_bytes(builder, sums, kind: Record, codes, *rest) -> list[ir.Value]:
    """Of codes that are bytes at the address `codes`; AVX2 multiplies 8-bit ones digit by digit."""
    if sums is not sums_avx2:
        return sums(builder, largest_value(kind), kind.group_size, partial(Unpacked, builder, codes), *rest)
    if kind.bits < 8:
        return _sums_of_small_bytes(builder, kind, codes, *rest)
    low, high = (sums(builder, 15, kind.group_size, partial(Digit, builder, codes, shift), *rest) for shift in (0, 4))
    return [builder.add(x, builder.shl(y, constant(VI32, 4))) for x, y in zip(low, high, strict=True)]


def _sums_of_small_bytes(builder, kind: Record, codes, activations, tokens: int, tile_stride) -> list[ir.Value]:
    """sums_avx2 of codes below 128 that are bytes, without a loop."""
    fitting, quads = fitting_quads(largest_value(kind)), kind.group_size // 4
    tile = tile_inputs(kind.group_size)
    if fitting <= MOST_WIDENED:
        totals = [constant(VI32, 0)] * tokens
        for first in range(0, quads, tile // 4):
            tile_codes = builder.add(codes, I64(first * VECTOR_BYTES))
            totals = _assembled_widening(builder, fitting, tile // 4, tile_codes, activations, tokens, tile, totals)
            activations = builder.add(activations, tile_stride)
        return totals
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
    carried = [] if sums is None else [half for total in sums for half in halves(builder, total, V16X16)]
    return _assembly(builder, lines, V16X16, tokens, 4, [codes, activations], carried)


MOST_WIDENED = 2  # quads summed in 16 bits; sums of more are widened seldom enough to leave that to LLVM


def _assembled_widening(
    builder, fitting: int, quads: int, codes, activations, tokens: int, tile: int, totals: list[ir.Value]
) -> list[ir.Value]:
    """int32 [16] per token: `totals` plus the products of some quads, of which 16 bits hold the sum of `fitting`."""
    if tokens > BATCH:
        fitting = 1  # or registers run out
    registers, temporaries = 2 * tokens, 4 * fitting
    temporary = [f"${registers + i}" for i in range(temporaries)]
    products, inputs, weights = temporary[:fitting], temporary[fitting : 2 * fitting], temporary[2 * fitting :]
    at_codes, at_activations, ones = (f"(${registers + temporaries + i})" for i in range(3))
    lines = []
    for first in range(0, quads, fitting):
        for i, register in enumerate(weights):
            lines.append(f"vmovdqu {first * VECTOR_BYTES + 32 * i}{at_codes}, {register}")
        for token in range(tokens):
            for i, register in enumerate(inputs):
                lines.append(f"vpbroadcastd {token * tile + 4 * (first + i)}{at_activations}, {register}")
            for half in range(2):
                total = f"${2 * token + half}"
                for i, product in enumerate(products):
                    lines.append(f"vpmaddubsw {inputs[i]}, {weights[2 * i + half]}, {product}")
                    if i:
                        lines.append(f"vpaddw {product}, {products[0]}, {products[0]}")
                lines.append(f"vpmaddwd {ones}, {products[0]}, {products[0]}")
                lines.append(f"vpaddd {products[0]}, {total}, {total}")
    carried = [half for total in totals for half in halves(builder, total, V8X32)]
    return _assembly(builder, lines, V8X32, tokens, temporaries, [codes, activations, _ones(builder.module)], carried)


def _ones(module: ir.Module) -> ir.Value:
    """Address of 16 int16, as an operand in memory costs no register."""
    name = "mcmoe_avx2_ones"
    constants = module.globals.get(name)
    if constants is None:
        constants = ir.GlobalVariable(module, V16X16, name)
        constants.initializer, constants.global_constant = ir.Constant(V16X16, [1] * 16), True
        constants.linkage = "internal"
    return constants.ptrtoint(I64)


def _assembly(builder, lines: list[str], kind, tokens: int, temporaries: int, addresses, carried) -> list[ir.Value]:
    """Two registers of `kind` per token, joined. Operands of the lines are these, then so many temporary registers,
    then the addresses; carried: what the first begin with, or nothing."""
    registers = 2 * tokens
    pointers = [builder.inttoptr(address, I8.as_pointer()) for address in addresses]
    constraints = ["=&x"] * (registers + temporaries) + ["r"] * len(pointers)
    constraints += [*(str(i) for i in range(len(carried))), "~{memory}"]
    result = ir.LiteralStructType([kind] * registers + [V32X8] * temporaries)
    arguments = [*pointers, *carried]
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    found = builder.asm(function, "\n".join(lines), ",".join(constraints), arguments, False)
    accumulated = [builder.extract_value(found, i) for i in range(registers)]
    return [join(builder, *accumulated[2 * token : 2 * token + 2]) for token in range(tokens)]


def products_avx2(reader: type[Codes] = Codes):
    """group_products of products.multiply_by, codes read on their way."""

    def group_products(builder, kind: Record, record, *rest) -> list[ir.Value]:
        if kind.bits == 8:
            return _sums_of_bytes(builder, sums_avx2, kind, record, *rest)
        codes_from = partial(reader, builder, kind, record)
        return sums_avx2(builder, largest_value(kind), kind.group_size, codes_from, *rest)

    return group_products


def dot_vnni_256(builder: ir.IRBuilder, total: ir.Value, weights: ir.Value, quad: ir.Value) -> ir.Value:
    """products.dot_vnni in two registers of 256 bits."""
    operands = (halves(builder, value, V8X32) for value in (total, weights, quad))
    pairs = zip(*operands, strict=True)
    return join(builder, *(call(builder, "llvm.x86.avx512.vpdpbusd.256", V8X32, *pair) for pair in pairs))


def block_function(module: ir.Module, name: str, sums, kind: Record, tokens: int) -> ir.Function:
    """void name(record, codes, activations, tile_stride, scales, totals, batches), all int64.

    Adds one group of 16 rows, whose codes are bytes at `codes`, times `batches` batches of `tokens` slots to totals.
    """
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    function = internal_function(module, name, 7)
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


def _emit_block(
    builder, isa: str, sums, kind: Record, reader, record, room, activations, tile_stride, scales, totals, count
):
    """One group of 16 rows times `count` slots, more than FEW_SLOTS; codes are unpacked into `room`."""
    name = f"mcmoe_{isa}_{kind.bits}bit_{kind.group_size}{'' if kind.zero is None else '_zero'}"
    codes = room
    if kind.bits == 8:  # bytes already
        prefetch_ahead(builder, kind, record)
        codes = record
    else:
        builder.call(unpack_function(builder.module, f"{name}_unpack", kind, reader), [record, room])

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
    """multiply_block(family, bits, record, room, activations, ...): _emit_block for an expert's width, known at run
    time; family is a constant."""

    @intrinsic(prefer_literal=True)
    def multiply_block(typing_context, family, bits, record, room, activations, tile_stride, scales, totals, count):
        number = family.literal_value

        def emit(context, builder, signature, args):
            done = builder.append_basic_block("multiplied")
            switch = builder.switch(args[1], done)
            for kind in family_records(number):
                block = builder.append_basic_block(f"block_{kind.bits}bit")
                switch.add_case(I64(kind.bits), block)
                builder.position_at_end(block)
                _emit_block(builder, isa, sums, kind, READERS_256[number], *args[2:])
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(family, *[types.int64] * 8), emit

    return multiply_block


def _multiply_linear_block(isa: str, sums):
    """The same for a linear, whose bits and group size are constants."""

    @intrinsic(prefer_literal=True)
    def multiply_block(typing_context, bits, group_size, record, room, activations, tile_stride, scales, totals, count):
        kind = linear_record(bits.literal_value, group_size.literal_value)

        def emit(context, builder, signature, args):
            _emit_block(builder, isa, sums, kind, Codes, *args[2:])
            return context.get_dummy_value()

        return types.void(bits, group_size, *[types.int64] * 7), emit

    return multiply_block


def multiply_rows_by(isa: str, products_of, sums):
    """multiply_rows of an instruction set, from its ways to multiply few slots and many."""
    multiply = multiply_by(isa, products_of, READERS_256, tuple(range(1, FEW_SLOTS + 1)))
    multiply_block = _multiply_block(isa, sums)

    @njit
    def multiply_rows(
        family, bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        """As products.multiply_rows_vnni."""
        codes += first * groups * GROUP_SIZE + first_group * GROUP_SIZE * count
        scales += (first * groups + first_group * count) * 8
        size = record_bytes_compiled(family, bits)
        room = record_room()
        for block in range(row_blocks):
            record = records + (block * groups + first_group) * size
            block_totals = totals + block * count * VECTOR_BYTES
            if count <= FEW_SLOTS:
                multiply(
                    literally(family), bits, count, record, group_count, codes, count * 64, scales, count * 8,
                    block_totals,
                )  # fmt: skip
                continue
            for group in range(group_count):
                multiply_block(
                    literally(family), bits, record + group * size, room,
                    codes + group * GROUP_SIZE * count, count * 64, scales + group * count * 8, block_totals, count,
                )  # fmt: skip

    return multiply_rows


def multiply_linear_rows_by(isa: str, products_of, sums):
    """The same for linears, whose bits and group size are constants of the caller."""
    multiply = multiply_linear(isa, products_of(), tuple(range(1, FEW_SLOTS + 1)))
    multiply_block = _multiply_linear_block(isa, sums)

    @njit
    def multiply_rows(
        bits, group_size, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        tile_stride = count * tile_inputs_compiled(group_size)
        codes += first * groups * group_size + first_group * group_size * count
        scales += (first * groups + first_group * count) * 8
        size = linear_record_bytes_compiled(bits, group_size)
        room = record_room()
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
_AVX_VNNI = "avx_vnni", partial(products_by, dot_vnni_256), sums_by(dot_vnni_256)
multiply_rows_avx2, multiply_rows_avx_vnni = multiply_rows_by(*_AVX2), multiply_rows_by(*_AVX_VNNI)
multiply_linear_rows_avx2 = multiply_linear_rows_by(*_AVX2)
multiply_linear_rows_avx_vnni = multiply_linear_rows_by(*_AVX_VNNI)
