"""The matrix product for many tokens on AMX: 16 x 16 x 64 int8 multiply-adds per instruction.

The records of layout.py unpack straight into AMX's operand: a quad of 16 rows is one row of a tile. Per pair of row
blocks and group of 128 the codes are unpacked once into four tiles; then every 16 slots take two tiles of activations
and give two of sums, which are scaled in float32 exactly as products.py does.
"""

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from vllm_mcmoe.kernels.cpu.intrinsics import I8, I64
from vllm_mcmoe.kernels.cpu.layout import record_bytes_compiled
from vllm_mcmoe.kernels.cpu.products import (
    PORTION_QUADS,
    QUADS,
    VECTOR_BYTES,
    Codes,
    add_scaled,
    multiply_rows_vnni,
    scale_and_zero,
)
from vllm_mcmoe.kernels.cpu.vectors import VI32, call, load, store
from vllm_mcmoe.kernels.packing import GROUP_SIZE, WIDTHS

TILE_ROWS = 16
TILE_BYTES = TILE_ROWS * 64
MIN_SLOTS = 6  # below, VNNI products are faster

# Tile registers, fixed for the whole product
SUMS = (0, 1)  # per row block of the pair
INPUTS = (2, 3)  # per half of the group
WEIGHTS = ((4, 5), (6, 7))  # per row block, per half


def _tile(builder: ir.IRBuilder, name: str, *args) -> None:
    call(builder, f"llvm.x86.{name}", ir.VoidType(), *args)


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, I8.as_pointer())


def _load_tile(builder: ir.IRBuilder, tile: int, address: ir.Value) -> None:
    _tile(builder, "tileloadd64", I8(tile), _pointer(builder, address), I64(64))


@intrinsic
def configure_tiles(typing_context):
    """Set all eight tiles of this thread to 16 rows of 64 bytes."""

    def emit(context, builder, signature, args):
        palette, tiles = 1, range(8)
        config = bytearray(64)
        config[0] = palette
        for tile in tiles:
            config[16 + 2 * tile] = 64  # bytes per row, 16 bits
            config[48 + tile] = TILE_ROWS
        kind = ir.ArrayType(I8, 64)
        name = "mcmoe_tile_config"
        constant = builder.module.globals.get(name)
        if constant is None:
            constant = ir.GlobalVariable(builder.module, kind, name)
            constant.initializer, constant.global_constant = ir.Constant(kind, config), True
            constant.linkage = "internal"
        _tile(builder, "ldtilecfg", builder.bitcast(constant, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def release_tiles(typing_context):
    """Back to the initial state, so that no kernel of another library finds our configuration."""

    def emit(context, builder, signature, args):
        _tile(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), emit


def _unpack_function(module: ir.Module, bits: int) -> ir.Function:
    """void name(record, out): the codes of one record as bytes, [quad][row][4]: two tiles."""
    name = f"mcmoe_amx_unpack_{bits}bit"
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64, I64]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    entry, loop, done = (function.append_basic_block(label) for label in ("entry", "loop", "done"))
    record, out = function.args
    builder = ir.IRBuilder(entry)
    builder.branch(loop)
    builder.position_at_end(loop)
    portion = builder.phi(I64)
    portion.add_incoming(I64(0), entry)
    codes = Codes(builder, bits, record, portion)
    target = builder.add(out, builder.mul(portion, I64(PORTION_QUADS * VECTOR_BYTES)))
    for quad in range(PORTION_QUADS):
        store(builder, codes.quad(quad), target, quad * VECTOR_BYTES)
    following = builder.add(portion, I64(1))
    portion.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, I64(QUADS // PORTION_QUADS)), loop, done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


def _scaling_function(module: ir.Module, bits: int) -> ir.Function:
    """void name(record, next_record, weights, activations, half_stride, scales, count, sums, totals, totals_stride).

    One group of two row blocks times `count` slots, added to totals. weights: four unpacked tiles; sums: room for two.
    """
    name = f"mcmoe_amx_group_{bits}bit"
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 10), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    record, next_record, weights, activations, half_stride, scales, count, sums, totals, totals_stride = function.args
    entry, tiles, rows, tile_done, done = (
        function.append_basic_block(label) for label in ("entry", "tiles", "rows", "tile_done", "done")
    )
    builder = ir.IRBuilder(entry)
    for block in range(2):
        for half in range(2):
            _load_tile(builder, WEIGHTS[block][half], builder.add(weights, I64((2 * block + half) * TILE_BYTES)))
    rescale = [scale_and_zero(builder, bits, address) for address in (record, next_record)]
    builder.branch(tiles)

    builder.position_at_end(tiles)
    first = builder.phi(I64)
    first.add_incoming(I64(0), entry)
    address = builder.add(activations, builder.mul(first, I64(64)))
    _load_tile(builder, INPUTS[0], address)
    _load_tile(builder, INPUTS[1], builder.add(address, half_stride))
    for block in range(2):
        _tile(builder, "tilezero", I8(SUMS[block]))
    for half in range(2):
        for block in range(2):
            _tile(builder, "tdpbsud", I8(SUMS[block]), I8(INPUTS[half]), I8(WEIGHTS[block][half]))
    for block in range(2):
        target = _pointer(builder, builder.add(sums, I64(block * TILE_BYTES)))
        _tile(builder, "tilestored64", I8(SUMS[block]), target, I64(64))
    end = builder.add(first, I64(TILE_ROWS))
    end = builder.select(builder.icmp_signed("<", end, count), end, count)
    builder.branch(rows)

    builder.position_at_end(rows)
    slot = builder.phi(I64)
    slot.add_incoming(first, tiles)
    source = builder.add(sums, builder.mul(builder.sub(slot, first), I64(64)))
    token_scale = builder.add(scales, builder.mul(slot, I64(8)))
    total = builder.add(totals, builder.mul(slot, I64(VECTOR_BYTES)))
    for block, (scale, zero) in enumerate(rescale):
        product = load(builder, VI32, source, block * TILE_BYTES)
        add_scaled(builder, product, scale, zero, token_scale, 0, total, 0)
        total = builder.add(total, totals_stride)
    following = builder.add(slot, I64(1))
    slot.add_incoming(following, rows)
    builder.cbranch(builder.icmp_signed("<", following, end), rows, tile_done)

    builder.position_at_end(tile_done)
    first.add_incoming(end, tile_done)
    builder.cbranch(builder.icmp_signed("<", end, count), tiles, done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


@intrinsic
def multiply_group(
    typing_context, bits, record, next_record, activations, half_stride, scales, count, totals, totals_stride
):
    """Unpack one group of two row blocks and add its product with `count` slots to totals."""

    def emit(context, builder, signature, args):
        bits, record, next_record, activations, half_stride, scales, count, totals, totals_stride = args
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(I8, 6 * TILE_BYTES))
            room.align = 64
        weights = builder.ptrtoint(room, I64)
        sums = builder.add(weights, I64(4 * TILE_BYTES))
        done = builder.append_basic_block("group_done")
        switch = builder.switch(bits, done)
        for width in WIDTHS:
            block = builder.append_basic_block(f"amx_{width}bit")
            switch.add_case(I64(width), block)
            builder.position_at_end(block)
            unpack, multiply = _unpack_function(builder.module, width), _scaling_function(builder.module, width)
            builder.call(unpack, [record, weights])
            builder.call(unpack, [next_record, builder.add(weights, I64(2 * TILE_BYTES))])
            builder.call(
                multiply,
                [
                    record, next_record, weights, activations, half_stride, scales, count, sums, totals, totals_stride,
                ],
            )  # fmt: skip
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), emit


@njit
def multiply_rows_amx(bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals):
    """As products.multiply_rows_vnni, which it leaves few slots to; row_blocks is even."""
    if count < MIN_SLOTS:
        multiply_rows_vnni(
            bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
        )
        return
    codes += first * groups * GROUP_SIZE + first_group * GROUP_SIZE * count
    scales += (first * groups + first_group * count) * 8
    size = record_bytes_compiled(bits)
    block_bytes = count * VECTOR_BYTES
    configure_tiles()
    for block in range(0, row_blocks, 2):
        for group in range(group_count):
            record = records + (block * groups + first_group + group) * size
            multiply_group(
                bits, record, record + groups * size, codes + group * GROUP_SIZE * count, count * 64,
                scales + group * count * 8, count, totals + block * block_bytes, block_bytes,
            )  # fmt: skip
    release_tiles()
