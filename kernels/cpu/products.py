"""The matrix product: 16 output rows times a few tokens, int8 x 1-8 bits, exact inside a group.

LLVM code is emitted per kind of record and number of tokens, with the group unrolled. A vector holds, in each of its 16
lanes of 32 bits, four consecutive inputs ("a quad") of one output row: the operand of VNNI's dot product, so nothing is
ever summed across lanes. `layout.py` describes the records these loops stream through, `codes.py` how quads are read
from them, as codes or as levels of trellis codes, `chunks.py` the activations.

Long, because the code that is emitted and the loops that call it know each other's registers.
"""

from functools import partial

from llvmlite import ir
from numba import literally, njit
from numba.core import types
from numba.extending import intrinsic

from vllm_mcmoe.kernels.cpu.chunks import TILE, tile_inputs, tile_inputs_compiled
from vllm_mcmoe.kernels.cpu.codes import (
    PORTABLE_READERS,
    PORTION_QUADS,
    READERS_512,
    VECTOR_BYTES,
    Codes,
    byte_mask,
)
from vllm_mcmoe.kernels.cpu.intrinsics import I8, I32, I64, internal_function
from vllm_mcmoe.kernels.cpu.layout import (
    Record,
    family_records,
    linear_record,
    linear_record_bytes_compiled,
    record_bytes_compiled,
)
from vllm_mcmoe.kernels.cpu.vectors import (
    LANES,
    V32X16,
    VF16,
    VF32,
    VI32,
    call,
    constant,
    fma,
    load,
    splat,
    store,
)
from vllm_mcmoe.kernels.packing import GROUP_SIZE, Code

QUADS = GROUP_SIZE // 4
PREFETCH_BYTES = 4096

VI32X32 = ir.VectorType(I32, 2 * LANES)


def dot_vnni(builder: ir.IRBuilder, total: ir.Value, weights: ir.Value, quad: ir.Value) -> ir.Value:
    """total[lane] += sum over 4 bytes of weights (unsigned) * quad (signed); one vpdpbusd, which never saturates."""
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", VI32, total, weights, quad)


def dot_portable(builder: ir.IRBuilder, total: ir.Value, weights: ir.Value, quad: ir.Value) -> ir.Value:
    """The same in generic vectors, shaped so that LLVM finds multiply-add of 16-bit pairs where the CPU has it."""
    eight = ir.Constant(V32X16, [8] * 32)
    w, a = builder.bitcast(weights, V32X16), builder.bitcast(quad, V32X16)
    even = (builder.and_(w, ir.Constant(V32X16, [0xFF] * 32)), builder.ashr(builder.shl(a, eight), eight))
    odd = (builder.lshr(w, eight), builder.ashr(a, eight))
    for unsigned, signed in (even, odd):
        product = builder.mul(builder.sext(unsigned, VI32X32), builder.sext(signed, VI32X32))
        low = builder.shuffle_vector(product, product, ir.Constant(VI32, list(range(0, 32, 2))))
        high = builder.shuffle_vector(product, product, ir.Constant(VI32, list(range(1, 32, 2))))
        total = builder.add(total, builder.add(low, high))
    return total


def _integer_products(builder, dot, codes_of, group_size: int, activations, tokens: int, tile_stride):
    """sum_k code * a_code of one group: int32 [16] per token.

    codes_of(portion): a class of codes.py, for a portion of 8 quads. activations: address of the first token's tile of
    codes; tokens follow tile by tile, a group's second tile at tile_stride. Loops over portions, which are whole
    vectors at every width: a quarter of the code to compile.
    """
    chains = max(1, 4 // tokens)  # independent sums hide the dot product's latency of 5 cycles
    before, loop = builder.block, builder.append_basic_block("portion")
    done = builder.append_basic_block("portions_done")
    builder.branch(loop)
    builder.position_at_end(loop)
    portion = builder.phi(I64)
    portion.add_incoming(I64(0), before)
    phis = [[builder.phi(VI32) for _ in range(chains)] for _ in range(tokens)]
    codes = codes_of(portion)
    base = builder.add(activations, builder.mul(builder.lshr(portion, I64(1)), tile_stride))
    base = builder.add(base, builder.mul(builder.and_(portion, I64(1)), I64(4 * PORTION_QUADS)))
    totals = [list(chain) for chain in phis]
    for quad in range(PORTION_QUADS):
        weights = codes.quad(quad)
        for token in range(tokens):
            inputs = splat(builder, load(builder, I32, base, token * tile_inputs(group_size) + quad * 4))
            chain = quad % chains
            totals[token][chain] = dot(builder, totals[token][chain], weights, inputs)
    following = builder.add(portion, I64(1))
    portion.add_incoming(following, loop)
    for token in range(tokens):
        for phi, total in zip(phis[token], totals[token], strict=True):
            phi.add_incoming(constant(VI32, 0), before)
            phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, I64(group_size // 4 // PORTION_QUADS)), loop, done)
    builder.position_at_end(done)
    return [_sum(builder, chain) for chain in totals]


def _sum(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    total = values[0]
    for value in values[1:]:
        total = builder.add(total, value)
    return total


def _integer_product_in_place(builder, dot, kind: Record, record, activations, tile_stride) -> ir.Value:
    """The same for one token without shifting codes: a field at bit p of a byte counts 2**p times too much.

    Fields of one position share a sum, which is shifted back once per group: exact, being a multiple of 2**p.
    For one token unpacking costs as much as multiplying, and this halves it.
    """
    codes = Codes(builder, kind, record)
    totals: dict[tuple[int, int], ir.Value] = {}
    second_tile = builder.add(activations, tile_stride)
    for quad in range(kind.group_size // 4):
        base = activations if quad < TILE // 4 else second_tile
        inputs = splat(builder, load(builder, I32, base, quad % (TILE // 4) * 4))
        for vector, position, width, shift in codes.fields(quad):
            field = builder.and_(vector, byte_mask(((1 << width) - 1) << position))
            key = (position, shift)
            totals[key] = dot(builder, totals.get(key, constant(VI32, 0)), field, inputs)
    shifted = []
    for (position, shift), total in totals.items():
        if position > shift:
            total = builder.ashr(total, constant(VI32, position - shift))
        elif shift > position:
            total = builder.shl(total, constant(VI32, shift - position))
        shifted.append(total)
    return _sum(builder, shifted)


def constant_zero(kind: Record) -> ir.Value | None:
    """The zero of all groups, or None where records have theirs."""
    return None if kind.zero is None else constant(VF32, kind.zero)


def scale_and_zero(builder: ir.IRBuilder, zero: ir.Value | None, address: ir.Value) -> tuple[ir.Value, ir.Value]:
    """w_scale and zero of the group's 16 rows as float32, from behind the record's codes; zero: as constant_zero."""
    scale = builder.fpext(load(builder, VF16, address), VF32)
    if zero is None:
        zero = builder.fpext(load(builder, VF16, address, 2 * LANES), VF32)
    return scale, zero


def add_scaled(builder, product, scale, zero, token_scale: ir.Value, token_offset: int, total: ir.Value, offset: int):
    """total += w_scale * (a_scale * product - zero * a_scale * a_sum) for one token and 16 rows."""
    a_scale = splat(builder, load(builder, ir.FloatType(), token_scale, token_offset))
    a_sum = splat(builder, load(builder, ir.FloatType(), token_scale, token_offset + 4))
    value = builder.fmul(builder.sitofp(product, VF32), a_scale)
    value = fma(builder, builder.fneg(zero), a_sum, value)
    store(builder, fma(builder, scale, value, load(builder, VF32, total, offset)), total, offset)


_PRODUCT_ARGS = ("record", "groups", "activations", "tile_stride", "scales", "scale_stride", "totals")


def products_by(dot, reader: type[Codes] = Codes):
    """group_products(builder, kind, record, activations, tokens, tile_stride): a group's integer sums by this `dot`, of
    what the reader, a class of codes.py, finds in the record."""

    def group_products(builder, kind: Record, record, activations, tokens: int, tile_stride) -> list[ir.Value]:
        if tokens == 1 and reader is Codes:
            return [_integer_product_in_place(builder, dot, kind, record, activations, tile_stride)]
        codes_of = partial(reader, builder, kind, record)
        return _integer_products(builder, dot, codes_of, kind.group_size, activations, tokens, tile_stride)

    return group_products


def product_function(
    module: ir.Module, name: str, group_products, kind: Record, tokens: int, streamed: bool = True
) -> ir.Function:
    """void name(record, groups, activations, tile_stride, scales, scale_stride, totals), all int64.

    Adds `groups` consecutive groups of 16 rows times `tokens` tokens to totals, float32 [tokens, 16]. streamed: whether
    records come from memory, and those after them are to be prefetched.
    """
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    function = internal_function(module, name, len(_PRODUCT_ARGS))
    entry, loop, done = (function.append_basic_block(label) for label in ("entry", "loop", "done"))
    record, groups, activations, tile_stride, scales, scale_stride, totals = function.args
    builder = ir.IRBuilder(entry)
    group_stride = builder.shl(tile_stride, I64(1)) if kind.group_size > TILE else tile_stride
    builder.cbranch(builder.icmp_signed(">", groups, I64(0)), loop, done)

    builder.position_at_end(loop)
    moving = []
    for start, step in (
        (groups, I64(-1)),
        (record, I64(kind.nbytes)),
        (activations, group_stride),
        (scales, scale_stride),
    ):
        phi = builder.phi(I64)
        phi.add_incoming(start, entry)
        moving.append((phi, step))
    remaining, record_now, activations_now, scales_now = (phi for phi, _ in moving)
    if streamed:
        prefetch_ahead(builder, kind, record_now)
    _emit_group(builder, group_products, kind, tokens, record_now, activations_now, tile_stride, scales_now, totals)
    for phi, step in moving:
        phi.add_incoming(builder.add(phi, step), builder.block)
    builder.cbranch(builder.icmp_signed(">", remaining, I64(1)), loop, done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


def prefetch_ahead(builder: ir.IRBuilder, kind: Record, record: ir.Value) -> None:
    """Ask for what will be read PREFETCH_BYTES after this record, as many bytes as the record has."""
    for line in range(0, kind.nbytes, 64):
        ahead = builder.inttoptr(builder.add(record, I64(PREFETCH_BYTES + line)), I8.as_pointer())
        call(builder, "llvm.prefetch.p0", ir.VoidType(), ahead, I32(0), I32(3), I32(1))


def _emit_group(builder, group_products, kind, tokens, record, activations, tile_stride, scales, totals) -> None:
    products = group_products(builder, kind, record, activations, tokens, tile_stride)
    scale, zero = scale_and_zero(builder, constant_zero(kind), builder.add(record, I64(kind.code_bytes)))
    for token, product in enumerate(products):
        add_scaled(builder, product, scale, zero, scales, token * 8, totals, token * VECTOR_BYTES)


def unpack_function(module: ir.Module, name: str, kind: Record, reader: type[Codes] = Codes) -> ir.Function:
    """void name(record, out): what the reader finds in one record as bytes [quad][row][4]; of a group of 128, two AMX
    tiles."""
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    function = internal_function(module, name, 2)
    entry, loop, done = (function.append_basic_block(label) for label in ("entry", "loop", "done"))
    record, out = function.args
    builder = ir.IRBuilder(entry)
    prefetch_ahead(builder, kind, record)
    builder.branch(loop)
    builder.position_at_end(loop)
    portion = builder.phi(I64)
    portion.add_incoming(I64(0), entry)
    codes = reader(builder, kind, record, portion)
    target = builder.add(out, builder.mul(portion, I64(PORTION_QUADS * VECTOR_BYTES)))
    for quad in range(PORTION_QUADS):
        store(builder, codes.quad(quad), target, quad * VECTOR_BYTES)
    following = builder.add(portion, I64(1))
    portion.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, I64(kind.group_size // 4 // PORTION_QUADS)), loop, done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


def multiply_by(isa: str, products_of, readers: dict[int, type[Codes]], token_counts: tuple[int, ...]):
    """multiply(family, bits, tokens, ...): the product for a width and a number of tokens known only at run time.

    family: a constant of the caller, one of layout.py's. products_of(readers[family]) are its group_products.
    """

    @intrinsic(prefer_literal=True)
    def multiply(
        typing_context,
        family,
        bits,
        tokens,
        record,
        groups,
        activations,
        tile_stride,
        scales,
        scale_stride,
        totals,
    ):
        records = family_records(family.literal_value)
        group_products = products_of(readers[family.literal_value])

        def emit(context, builder, signature, args):
            done = builder.append_basic_block("multiplied")
            key = builder.add(builder.mul(args[1], I64(LANES + 1)), args[2])
            switch = builder.switch(key, done)
            for kind in records:
                for count in token_counts:
                    name = f"mcmoe_{isa}_{kind.bits}bit_{count}"
                    function = product_function(builder.module, name, group_products, kind, count)
                    block = builder.append_basic_block(name)
                    switch.add_case(I64(kind.bits * (LANES + 1) + count), block)
                    with builder.goto_block(block):
                        builder.call(function, args[3:])
                        builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(family, *[types.int64] * (2 + len(_PRODUCT_ARGS))), emit

    return multiply


def multiply_linear(isa: str, group_products, token_counts: tuple[int, ...]):
    """multiply(bits, group_size, tokens, ...): the same for a linear, whose bits and group size are constants.

    Only what the caller names is emitted and compiled, so that experts do not wait for linears nor the other way round.
    """

    @intrinsic(prefer_literal=True)
    def multiply(
        typing_context,
        bits,
        group_size,
        tokens,
        record,
        groups,
        activations,
        tile_stride,
        scales,
        scale_stride,
        totals,
    ):
        kind = linear_record(bits.literal_value, group_size.literal_value)

        def emit(context, builder, signature, args):
            done = builder.append_basic_block("multiplied")
            switch = builder.switch(args[2], done)
            for count in token_counts:
                name = f"mcmoe_{isa}_linear_{kind.bits}bit_{kind.group_size}_{count}"
                function = product_function(builder.module, name, group_products, kind, count)
                block = builder.append_basic_block(name)
                switch.add_case(I64(count), block)
                with builder.goto_block(block):
                    builder.call(function, args[3:])
                    builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(bits, group_size, *[types.int64] * (1 + len(_PRODUCT_ARGS))), emit

    return multiply


VNNI_TOKENS = (16, 8, 4, 2, 1)
PORTABLE_TOKENS = (4, 1)
multiply_vnni = multiply_by("vnni", partial(products_by, dot_vnni), READERS_512, VNNI_TOKENS)
multiply_portable = multiply_by("portable", partial(products_by, dot_portable), PORTABLE_READERS, PORTABLE_TOKENS)
multiply_linear_vnni = multiply_linear("vnni", products_by(dot_vnni), VNNI_TOKENS)
multiply_linear_portable = multiply_linear("portable", products_by(dot_portable), PORTABLE_TOKENS)


@njit
def vnni_batch(left):
    """Slots to multiply at once, one of VNNI_TOKENS, where so many are left."""
    return 16 if left >= 16 else 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@njit
def portable_batch(left):
    return 4 if left >= 4 else 1


@njit
def multiply_rows_vnni(
    family, bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
):
    """Add `group_count` groups of `row_blocks` row blocks times `count` slots to totals, float32 [block][slot][16].

    family: a constant of the caller, as of multiply_by; codes, scales: the activations of chunks.py, in which the
    `count` slots from `first` are one chunk.
    """
    codes += first * groups * GROUP_SIZE + first_group * GROUP_SIZE * count
    scales += (first * groups + first_group * count) * 8
    for block in range(row_blocks):
        record = records + (block * groups + first_group) * record_bytes_compiled(family, bits)
        slot = 0
        while slot < count:
            batch = vnni_batch(count - slot)
            multiply_vnni(
                literally(family), bits, batch, record, group_count, codes + slot * 64, count * 64,
                scales + slot * 8, count * 8, totals + (block * count + slot) * LANES * 4,
            )  # fmt: skip
            slot += batch


@njit
def multiply_rows_portable(
    family, bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
):
    """As multiply_rows_vnni."""
    codes += first * groups * GROUP_SIZE + first_group * GROUP_SIZE * count
    scales += (first * groups + first_group * count) * 8
    for block in range(row_blocks):
        record = records + (block * groups + first_group) * record_bytes_compiled(family, bits)
        slot = 0
        while slot < count:
            batch = portable_batch(count - slot)
            multiply_portable(
                literally(family), bits, batch, record, group_count, codes + slot * 64, count * 64,
                scales + slot * 8, count * 8, totals + (block * count + slot) * LANES * 4,
            )  # fmt: skip
            slot += batch


# A record of trellis codes once it is decoded: levels as codes of 8 bits, its scales, the middle as zeros
DECODED = Record(Code(8))


@intrinsic
def record_room(typing_context):
    """Address of room on the stack for one decoded record, aligned to a cache line."""

    def emit(context, builder, signature, args):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(I8, DECODED.nbytes))
            room.align = 64
        return builder.ptrtoint(room, I64)

    return types.int64(), emit


def trellis_rows(isa: str, dot, readers: dict[int, type[Codes]], token_counts: tuple[int, ...], next_batch, few):
    """multiply_rows of trellis codes, which of several batches of slots decodes each record only once.

    few: multiply_rows that decodes it for every batch; next_batch: its choice among token_counts.
    """

    @intrinsic(prefer_literal=True)
    def decode(typing_context, family, bits, record, room):
        number = family.literal_value

        def emit(context, builder, signature, args):
            _, bits, record, room = args
            done = builder.append_basic_block("decoded")
            switch = builder.switch(bits, done)
            for kind in family_records(number):
                name = f"mcmoe_{isa}_decode_{kind.bits}bit"
                function = unpack_function(builder.module, name, kind, readers[number])
                block = builder.append_basic_block(name)
                switch.add_case(I64(kind.bits), block)
                with builder.goto_block(block):
                    builder.call(function, [record, room])
                    store(builder, load(builder, VF16, record, kind.code_bytes), room, DECODED.code_bytes)
                    store(builder, constant(VF16, kind.zero), room, DECODED.code_bytes + 2 * LANES)
                    builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(family, *[types.int64] * 3), emit

    @intrinsic
    def multiply(typing_context, tokens, record, activations, tile_stride, scales, totals):
        def emit(context, builder, signature, args):
            tokens, record, activations, tile_stride, scales, totals = args
            done = builder.append_basic_block("multiplied")
            switch = builder.switch(tokens, done)
            for count in token_counts:
                name = f"mcmoe_{isa}_decoded_{count}"
                function = product_function(builder.module, name, products_by(dot), DECODED, count, streamed=False)
                block = builder.append_basic_block(name)
                switch.add_case(I64(count), block)
                with builder.goto_block(block):
                    builder.call(function, [record, I64(1), activations, tile_stride, scales, I64(0), totals])
                    builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), emit

    @njit
    def multiply_rows(
        family, bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        """As multiply_rows_vnni."""
        if next_batch(count) == count:
            few(
                family, bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
            )
            return
        codes += first * groups * GROUP_SIZE + first_group * GROUP_SIZE * count
        scales += (first * groups + first_group * count) * 8
        room = record_room()
        for block in range(row_blocks):
            for group in range(group_count):
                record = records + (block * groups + first_group + group) * record_bytes_compiled(family, bits)
                decode(literally(family), bits, record, room)
                activations, group_scales = codes + group * GROUP_SIZE * count, scales + group * count * 8
                slot = 0
                while slot < count:
                    batch = next_batch(count - slot)
                    multiply(
                        batch, room, activations + slot * 64, count * 64, group_scales + slot * 8,
                        totals + (block * count + slot) * LANES * 4,
                    )  # fmt: skip
                    slot += batch

    return multiply_rows


multiply_trellis_rows_vnni = trellis_rows("vnni", dot_vnni, READERS_512, VNNI_TOKENS, vnni_batch, multiply_rows_vnni)
multiply_trellis_rows_portable = trellis_rows(
    "portable", dot_portable, PORTABLE_READERS, PORTABLE_TOKENS, portable_batch, multiply_rows_portable
)


def linear_rows(multiply, next_batch):
    """multiply_rows(bits, group_size, ...): as multiply_rows_vnni, for the records of a linear.

    bits and group_size are constants of the caller; multiply: made by multiply_linear.
    """

    @njit
    def multiply_rows(
        bits, group_size, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
    ):
        tile = tile_inputs_compiled(group_size)
        record_size = linear_record_bytes_compiled(bits, group_size)
        codes += first * groups * group_size + first_group * group_size * count
        scales += (first * groups + first_group * count) * 8
        for block in range(row_blocks):
            record = records + (block * groups + first_group) * record_size
            slot = 0
            while slot < count:
                batch = next_batch(count - slot)
                multiply(
                    literally(bits), literally(group_size), batch, record, group_count, codes + slot * tile,
                    count * tile, scales + slot * 8, count * 8, totals + (block * count + slot) * LANES * 4,
                )  # fmt: skip
                slot += batch

    return multiply_rows


multiply_linear_rows_vnni = linear_rows(multiply_linear_vnni, vnni_batch)
multiply_linear_rows_portable = linear_rows(multiply_linear_portable, portable_batch)
