"""Numba intrinsics the compiled code is built from: typed views of addresses, atomics, calls through pointers.

Compiled code handles plain int64 addresses: it runs on threads Python knows nothing of, on buffers torch owns.
"""

import platform

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def internal_function(module: ir.Module, name: str, arguments: int) -> ir.Function:
    """void name(int64, ...) without a body yet, not to be inlined: LLVM then compiles it once, however often called."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    return function


def _view(element: types.Type):
    """An intrinsic that turns an int64 address into an indexable pointer to `element`."""

    @intrinsic
    def view(typing_context, address):
        def emit(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), emit

    return view


as_int32 = _view(types.int32)
as_int64 = _view(types.int64)
as_float32 = _view(types.float32)


@intrinsic
def fetch_add(typing_context, address, amount):
    """Atomically add to the int64 at `address`; returns its value from before."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def load_acquire(typing_context, address):
    """The int64 at `address`, and everything its writer wrote before it."""

    def emit(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), emit


@intrinsic
def pause(typing_context):
    """A short wait inside a spinning loop: `pause` on x86, nothing elsewhere."""

    def emit(context, builder, signature, args):
        if platform.machine() in ("x86_64", "AMD64"):
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def yield_core(typing_context):
    """Let the operating system run another thread: POSIX sched_yield."""

    def emit(context, builder, signature, args):
        function = ir.FunctionType(I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call_parallel(typing_context, function, worker, data, threads):
    """Call `GOMP_parallel(worker, data, threads, 0)` at the address `function`: run worker(data) on a team."""

    def emit(context, builder, signature, args):
        prototype = ir.FunctionType(ir.VoidType(), [I64, I64, I32, I32])  # pointers travel as int64
        pointer = builder.inttoptr(args[0], prototype.as_pointer())
        builder.call(pointer, [args[1], args[2], builder.trunc(args[3], I32), I32(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), emit


@intrinsic
def call_worker(typing_context, worker, data):
    """Call `void worker(data)` at an address, on this thread."""

    def emit(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [I64]).as_pointer())
        builder.call(pointer, [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def call_rows(
    typing_context,
    function,
    bits,
    records,
    row_blocks,
    groups,
    first_group,
    group_count,
    codes,
    scales,
    first,
    count,
    totals,
):
    """Call the products of an instruction set, products.multiply_rows_*, at an address."""

    def emit(context, builder, signature, args):
        prototype = ir.FunctionType(ir.VoidType(), [I64] * (len(args) - 1))
        builder.call(builder.inttoptr(args[0], prototype.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), emit
