"""The matrix product for many tokens on AMX: 16 x 16 x 64 int8 multiply-adds per instruction.

The records of layout.py unpack straight into AMX's operand: a quad of 16 rows is one row of a tile. Per pair of row
blocks and group of inputs the codes are unpacked once; then every 32 slots ("a step") take two tiles of activations per
64 inputs, and leave four tiles of sums, which are scaled in float32 exactly as products.py does.

Long for the reason of products.py: emitted code and the loops that call it know each other's registers.

Two waits are hidden by doing something else first: the codes of the next group are unpacked before the tiles of this
one are multiplied, and the sums of a step are scaled while the tiles of the next are being multiplied.
"""

import numpy as np
from llvmlite import ir
from numba import literally, njit
from numba.core import types
from numba.extending import intrinsic

from vllm_mcmoe.kernels.cpu.chunks import TILE
from vllm_mcmoe.kernels.cpu.codes import READERS_512, VECTOR_BYTES, Codes
from vllm_mcmoe.kernels.cpu.intrinsics import I8, I64
from vllm_mcmoe.kernels.cpu.layout import (
    SCALAR_WITH_ZEROS,
    Record,
    code_bytes_compiled,
    constant_zero_compiled,
    family_records,
    linear_record,
    linear_record_bytes_compiled,
    record_bytes_compiled,
)
from vllm_mcmoe.kernels.cpu.products import (
    add_scaled,
    multiply_linear_rows_vnni,
    multiply_rows_vnni,
    scale_and_zero,
    unpack_function,
)
from vllm_mcmoe.kernels.cpu.vectors import VF32, VI32, call, constant, load, splat
from vllm_mcmoe.kernels.packing import GROUP_SIZE

TILE_ROWS = 16
TILE_BYTES = TILE_ROWS * 64
STEP_SLOTS = 2 * TILE_ROWS
MIN_SLOTS = 6  # of an expert; below, VNNI products are faster
MIN_TOKENS = 2  # of a linear, likewise

# Tile registers
SUMS = ((0, 1), (2, 3))  # per row block of the pair, per 16 slots of the step
INPUTS = (4, 5)  # per 16 slots
WEIGHTS = (6, 7)  # per row block

# Scratch memory of a thread: codes of two groups, each [row block][64 inputs] tiles, in room for groups of 128; sums of
# two steps, [row block][32][16]
PAIR_BYTES = 4 * TILE_BYTES
SUMS_START = 2 * PAIR_BYTES
SUMS_BYTES = 4 * TILE_BYTES


def _tile(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    call(builder, f"llvm.x86.{name}", ir.VoidType(), *args)


def _pointer(builder: ir.IRBuilder, address: ir.Value, offset: int = 0) -> ir.Value:
    return builder.inttoptr(builder.add(address, I64(offset)), I8.as_pointer())


@intrinsic
def configure_tiles(typing_context):
    """Set all eight tiles of this thread to 16 rows of 64 bytes."""

    def emit(context, builder, signature, args):
        config = bytearray(64)
        config[0] = 1  # palette 1, the only one there is
        for tile in range(8):
            config[16 + 2 * tile] = 64  # bytes per row, a 16-bit field
            config[48 + tile] = TILE_ROWS
        kind = ir.ArrayType(I8, 64)
        variable = ir.GlobalVariable(builder.module, kind, builder.module.get_unique_name("mcmoe_tile_config"))
        variable.initializer, variable.global_constant = ir.Constant(kind, config), True
        variable.linkage = "internal"
        _tile(builder, "ldtilecfg", builder.bitcast(variable, I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def release_tiles(typing_context):
    """Back to the initial state, so that no kernel of another library finds our configuration."""

    def emit(context, builder, signature, args):
        _tile(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def scratch_memory(typing_context):
    """Address of scratch memory on the stack, aligned to a cache line."""

    def emit(context, builder, signature, args):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(I8, SUMS_START + 2 * SUMS_BYTES))
            room.align = 64
        return builder.ptrtoint(room, I64)

    return types.int64(), emit


def _emit_unpack_pair(builder: ir.IRBuilder, kind: Record, reader: type[Codes], record, next_record, out) -> None:
    """Codes of one group of two row blocks as tiles [row block][64 inputs]."""
    name = f"mcmoe_amx_unpack_{kind.bits}bit_{kind.group_size}"
    unpack = unpack_function(builder.module, name, kind, reader)
    builder.call(unpack, [record, out])
    builder.call(unpack, [next_record, builder.add(out, I64(kind.group_size // TILE * TILE_BYTES))])


@intrinsic(prefer_literal=True)
def unpack_pair(typing_context, family, bits, record, next_record, out):
    """Of an expert, whose width is known at run time; family is a constant."""
    number = family.literal_value

    def emit(context, builder, signature, args):
        done = builder.append_basic_block("unpacked")
        switch = builder.switch(args[1], done)
        for kind in family_records(number):
            block = builder.append_basic_block(f"unpack_{kind.bits}bit")
            switch.add_case(I64(kind.bits), block)
            builder.position_at_end(block)
            _emit_unpack_pair(builder, kind, READERS_512[number], *args[2:])
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(family, *[types.int64] * 4), emit


@intrinsic(prefer_literal=True)
def unpack_linear_pair(typing_context, bits, group_size, record, next_record, out):
    """Of a linear, whose width and group size are constants."""
    kind = linear_record(bits.literal_value, group_size.literal_value)

    def emit(context, builder, signature, args):
        _emit_unpack_pair(builder, kind, Codes, *args[2:])
        return context.get_dummy_value()

    return types.void(bits, group_size, *[types.int64] * 3), emit


def _multiply_tiles(tiles: int):
    """multiply(group_size, weights, activations, tile_stride): sums of 16 * tiles slots and two row blocks, in
    registers; group_size is a constant."""

    @intrinsic(prefer_literal=True)
    def multiply(typing_context, group_size, weights, activations, tile_stride):
        portions = group_size.literal_value // TILE

        def emit(context, builder, signature, args):
            _, weights, activations, tile_stride = args
            stride = I64(64)
            for row_block in range(2):
                for tile in range(tiles):
                    _tile(builder, "tilezero", I8(SUMS[row_block][tile]))
            for portion in range(portions):
                for row_block in range(2):
                    source = _pointer(builder, weights, (portions * row_block + portion) * TILE_BYTES)
                    _tile(builder, "tileloadd64", I8(WEIGHTS[row_block]), source, stride)
                for tile in range(tiles):
                    source = _pointer(builder, activations, tile * TILE_BYTES)
                    _tile(builder, "tileloadd64", I8(INPUTS[tile]), source, stride)
                for tile in range(tiles):
                    for row_block in range(2):
                        operands = (SUMS[row_block][tile], INPUTS[tile], WEIGHTS[row_block])
                        _tile(builder, "tdpbsud", *map(I8, operands))
                activations = builder.add(activations, tile_stride)
            return context.get_dummy_value()

        return types.void(group_size, types.int64, types.int64, types.int64), emit

    return multiply


def _store_sums(tiles: int):
    """store_sums(out): what multiply left in registers, int32 [row block][32 slots][16]."""

    @intrinsic
    def store_sums(typing_context, out):
        def emit(context, builder, signature, args):
            for row_block in range(2):
                for tile in range(tiles):
                    target = _pointer(builder, args[0], (2 * row_block + tile) * TILE_BYTES)
                    _tile(builder, "tilestored64", I8(SUMS[row_block][tile]), target, I64(64))
            return context.get_dummy_value()

        return types.void(types.int64), emit

    return store_sums


multiply_one, multiply_two = _multiply_tiles(1), _multiply_tiles(2)
store_one, store_two = _store_sums(1), _store_sums(2)


def _emit_scale_rows(builder: ir.IRBuilder, zero, rescale, next_rescale, scales, slots, sums, totals, stride):
    """Add a step's sums to totals.

    zero: float32 [16], the zero of all groups, or None where records have theirs; rescale, next_rescale: scales and
    zeros in a record of either row block; stride: from one's totals to the next's.
    """
    factors = [scale_and_zero(builder, zero, address) for address in (rescale, next_rescale)]
    before, loop = builder.block, builder.append_basic_block("slot")
    done = builder.append_basic_block("scaled")
    builder.branch(loop)
    builder.position_at_end(loop)
    slot = builder.phi(I64)
    slot.add_incoming(I64(0), before)
    source = builder.add(sums, builder.mul(slot, I64(VECTOR_BYTES)))
    token_scale = builder.add(scales, builder.mul(slot, I64(8)))
    total = builder.add(totals, builder.mul(slot, I64(VECTOR_BYTES)))
    for row_block, (scale, zero) in enumerate(factors):
        product = load(builder, VI32, source, row_block * 2 * TILE_BYTES)
        add_scaled(builder, product, scale, zero, token_scale, 0, total, 0)
        total = builder.add(total, stride)
    following = builder.add(slot, I64(1))
    slot.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, slots), loop, done)
    builder.position_at_end(done)


@intrinsic
def scale_rows_with_zeros(typing_context, rescale, next_rescale, scales, slots, sums, totals, totals_stride):
    """Of an expert whose records have zeros."""

    def emit(context, builder, signature, args):
        _emit_scale_rows(builder, None, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), emit


@intrinsic
def scale_rows(typing_context, zero, rescale, next_rescale, scales, slots, sums, totals, totals_stride):
    """Of an expert whose zeros all are `zero`, a float32."""

    def emit(context, builder, signature, args):
        _emit_scale_rows(builder, splat(builder, args[0]), *args[1:])
        return context.get_dummy_value()

    return types.void(types.float32, *[types.int64] * 7), emit


@intrinsic(prefer_literal=True)
def scale_linear_rows(
    typing_context, bits, group_size, rescale, next_rescale, scales, slots, sums, totals, totals_stride
):
    kind = linear_record(bits.literal_value, group_size.literal_value)

    def emit(context, builder, signature, args):
        _emit_scale_rows(builder, constant(VF32, kind.zero), *args[2:])
        return context.get_dummy_value()

    return types.void(bits, group_size, *[types.int64] * 7), emit


# What the loop over groups needs to know of its records: of an expert its family, a constant, and its width, known at
# run time; of a linear its width and group size, both constants.
@njit
def _expert_bytes(family, bits, group_size):
    return record_bytes_compiled(family, bits)


@njit
def _unpack_expert(family, bits, group_size, record, next_record, out):
    unpack_pair(literally(family), bits, record, next_record, out)


@njit
def _scale_expert(family, bits, group_size, record, next_record, scales, slots, sums, totals, totals_stride):
    rescale, next_rescale = record + code_bytes_compiled(bits), next_record + code_bytes_compiled(bits)
    if family == SCALAR_WITH_ZEROS and bits > 1:
        scale_rows_with_zeros(rescale, next_rescale, scales, slots, sums, totals, totals_stride)
    else:
        zero = np.float32(constant_zero_compiled(family, bits))
        scale_rows(zero, rescale, next_rescale, scales, slots, sums, totals, totals_stride)


@njit
def _linear_bytes(family, bits, group_size):
    return linear_record_bytes_compiled(bits, group_size)


@njit
def _unpack_linear(family, bits, group_size, record, next_record, out):
    unpack_linear_pair(literally(bits), literally(group_size), record, next_record, out)


@njit
def _scale_linear(family, bits, group_size, record, next_record, scales, slots, sums, totals, totals_stride):
    start = code_bytes_compiled(bits, group_size)
    scale_linear_rows(
        literally(bits), literally(group_size), record + start, next_record + start,
        scales, slots, sums, totals, totals_stride,
    )  # fmt: skip


def _pair_multiplier(record_bytes, unpack, scale):
    """multiply_pair: two row blocks, of which record is in the first and record + record_stride in the second."""

    @njit
    def multiply_pair(
        family, bits, group_size, record, record_stride, group_count, codes, scales, count, totals, scratch
    ):
        size = record_bytes(family, bits, group_size)
        totals_stride = count * VECTOR_BYTES
        waiting_slots = waiting_first = waiting_group = step = 0
        unpack(family, bits, group_size, record, record + record_stride, scratch)
        for group in range(group_count):
            weights = scratch + group % 2 * PAIR_BYTES
            if group + 1 < group_count:
                following = record + (group + 1) * size
                other_weights = scratch + (group + 1) % 2 * PAIR_BYTES
                unpack(family, bits, group_size, following, following + record_stride, other_weights)
            for first in range(0, count, STEP_SLOTS):
                slots = min(STEP_SLOTS, count - first)
                activations = codes + group * group_size * count + first * 64
                sums = scratch + SUMS_START + step % 2 * SUMS_BYTES
                other_sums = scratch + SUMS_START + (step + 1) % 2 * SUMS_BYTES
                if slots > TILE_ROWS:
                    multiply_two(literally(group_size), weights, activations, count * 64)
                else:
                    multiply_one(literally(group_size), weights, activations, count * 64)
                if waiting_slots:
                    waiting = record + waiting_group * size
                    scale(
                        family, bits, group_size, waiting, waiting + record_stride,
                        scales + (waiting_group * count + waiting_first) * 8, waiting_slots, other_sums,
                        totals + waiting_first * VECTOR_BYTES, totals_stride,
                    )  # fmt: skip
                if slots > TILE_ROWS:
                    store_two(sums)
                else:
                    store_one(sums)
                waiting_slots, waiting_first, waiting_group = slots, first, group
                step += 1
        waiting = record + waiting_group * size
        scale(
            family, bits, group_size, waiting, waiting + record_stride,
            scales + (waiting_group * count + waiting_first) * 8, waiting_slots,
            scratch + SUMS_START + (step + 1) % 2 * SUMS_BYTES, totals + waiting_first * VECTOR_BYTES, totals_stride,
        )  # fmt: skip

    return multiply_pair


_multiply_expert_pair = _pair_multiplier(_expert_bytes, _unpack_expert, _scale_expert)
_multiply_linear_pair = _pair_multiplier(_linear_bytes, _unpack_linear, _scale_linear)


@njit
def multiply_rows_amx(
    family, bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
):
    """As products.multiply_rows_vnni, which it leaves few slots to; row_blocks is even."""
    if count < MIN_SLOTS:
        multiply_rows_vnni(
            family, bits, records, row_blocks, groups, first_group, group_count, codes, scales, first, count,
            totals,
        )  # fmt: skip
        return
    codes += first * groups * GROUP_SIZE + first_group * GROUP_SIZE * count
    scales += (first * groups + first_group * count) * 8
    block_stride = groups * record_bytes_compiled(family, bits)
    scratch = scratch_memory()
    configure_tiles()
    for block in range(0, row_blocks, 2):
        record = records + block * block_stride + first_group * record_bytes_compiled(family, bits)
        _multiply_expert_pair(
            family, bits, GROUP_SIZE, record, block_stride, group_count, codes, scales, count,
            totals + block * count * VECTOR_BYTES, scratch,
        )  # fmt: skip
    release_tiles()


@njit
def multiply_linear_rows_amx(
    bits, group_size, records, row_blocks, groups, first_group, group_count, codes, scales, first, count, totals
):
    """As products.multiply_linear_rows_vnni, which it leaves few tokens to, and the last of an odd number of blocks.

    bits and group_size are constants of the caller, and groups are whole tiles: 64 or 128 inputs.
    """
    block_stride = groups * linear_record_bytes_compiled(bits, group_size)
    paired = row_blocks // 2 * 2 if count >= MIN_TOKENS else 0
    if paired < row_blocks:
        multiply_linear_rows_vnni(
            bits, group_size, records + paired * block_stride, row_blocks - paired, groups, first_group, group_count,
            codes, scales, first, count, totals + paired * count * VECTOR_BYTES,
        )  # fmt: skip
    if paired == 0:
        return
    codes += first * groups * group_size + first_group * group_size * count
    scales += (first * groups + first_group * count) * 8
    scratch = scratch_memory()
    configure_tiles()
    for block in range(0, paired, 2):
        record = records + block * block_stride + first_group * linear_record_bytes_compiled(bits, group_size)
        _multiply_linear_pair(
            0, bits, group_size, record, block_stride, group_count, codes, scales, count,
            totals + block * count * VECTOR_BYTES, scratch,
        )  # fmt: skip
    release_tiles()
