"""Vector steps outside the matrix products: quantising, gating, accumulating, converting.

Every step works on 16 float32 lanes in generic LLVM vectors, which become one AVX-512 register, two AVX2 or four NEON
ones: one source for every CPU and, with the fused multiply-adds spelled out, the same bits on every CPU.
"""

import math

import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from vllm_mcmoe.kernels.cpu.intrinsics import F16, F32, I8, I16, I32, I64
from vllm_mcmoe.kernels.expert_function import ExpertFunction

LANES = 16
VF32, VF16 = ir.VectorType(F32, LANES), ir.VectorType(F16, LANES)
VI32, VI16, VI8 = ir.VectorType(I32, LANES), ir.VectorType(I16, LANES), ir.VectorType(I8, LANES)
V32X16, V64X8 = ir.VectorType(I16, 2 * LANES), ir.VectorType(I8, 4 * LANES)  # 512 bits, like VI32
V8X32, V16X16, V32X8 = ir.VectorType(I32, 8), ir.VectorType(I16, 16), ir.VectorType(I8, 32)  # half of that, of AVX2

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # how the compiled code names the dtype of activations and output
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2}


def constant(vector: ir.VectorType, value) -> ir.Constant:
    return ir.Constant(vector, [value] * LANES)


def splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    vector = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), constant(VI32, 0))


def load(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value, offset: int = 0, align: int = 1) -> ir.Value:
    pointer = builder.inttoptr(builder.add(address, I64(offset)), kind.as_pointer())
    return builder.load(pointer, align=align)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
    pointer = builder.inttoptr(builder.add(address, I64(offset)), value.type.as_pointer())
    builder.store(value, pointer, align=1)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic by its full name, declaring it in the module where needed."""
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def halves(builder: ir.IRBuilder, value: ir.Value, half: ir.VectorType) -> list[ir.Value]:
    """The two registers of a 512-bit value, as `half`."""
    wide = builder.bitcast(value, ir.VectorType(half.element, 2 * half.count))
    indices = [ir.Constant(ir.VectorType(I32, half.count), list(range(i, i + half.count))) for i in (0, half.count)]
    return [builder.shuffle_vector(wide, ir.Constant(wide.type, ir.Undefined), index) for index in indices]


def join(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    count = 2 * low.type.count
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, count), list(range(count))))


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call(builder, "llvm.fma.v16f32", VF32, a, b, c)


def _widen(builder: ir.IRBuilder, dtype: int, address: ir.Value, offset: int) -> ir.Value:
    if dtype == FLOAT32:
        return load(builder, VF32, address, offset)
    if dtype == FLOAT16:
        return builder.fpext(load(builder, VF16, address, offset), VF32)
    high_half = builder.zext(load(builder, VI16, address, offset), VI32)
    return builder.bitcast(builder.shl(high_half, constant(VI32, 16)), VF32)


def _narrow(builder: ir.IRBuilder, dtype: int, value: ir.Value) -> ir.Value:
    """Round float32 lanes to nearest even in `dtype`; NaN stays NaN."""
    if dtype == FLOAT32:
        return value
    if dtype == FLOAT16:
        return builder.fptrunc(value, VF16)
    bits = builder.bitcast(value, VI32)
    odd = builder.and_(builder.lshr(bits, constant(VI32, 16)), constant(VI32, 1))
    rounded = builder.add(bits, builder.add(odd, constant(VI32, 0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    quiet_nan = constant(VI32, 0x7FC00000)
    kept = builder.select(is_nan, quiet_nan, rounded)
    return builder.trunc(builder.lshr(kept, constant(VI32, 16)), VI16)


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp of 16 lanes to about 1 unit in the last place, inputs clamped to the normal range of float32.

    Cody-Waite reduction x = n ln 2 + r, then the polynomial of Cephes' expf for exp(r), |r| <= ln 2 / 2.
    """
    x = call(builder, "llvm.minimum.v16f32", VF32, x, constant(VF32, 88.0))
    x = call(builder, "llvm.maximum.v16f32", VF32, x, constant(VF32, -87.0))
    scaled = builder.fmul(x, constant(VF32, 1 / math.log(2)))
    n = call(builder, "llvm.rint.v16f32", VF32, scaled)
    r = fma(builder, n, constant(VF32, -0.693359375), x)
    r = fma(builder, n, constant(VF32, 2.12194440e-4), r)
    coefficients = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5, 1.0, 1.0)
    result = constant(VF32, coefficients[0])
    for coefficient in coefficients[1:]:
        result = fma(builder, result, r, constant(VF32, coefficient))
    exponent = call(builder, "llvm.fptosi.sat.v16i32.v16f32", VI32, n)
    power = builder.shl(builder.add(exponent, constant(VI32, 127)), constant(VI32, 23))
    return builder.fmul(result, builder.bitcast(power, VF32))


def _times_sigmoid(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """x / (1 + exp(-y))"""
    return builder.fdiv(x, builder.fadd(constant(VF32, 1.0), _exp(builder, builder.fneg(y))))


def _silu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _times_sigmoid(builder, x, x)


def _gelu_tanh(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """0.5 x (1 + tanh(u)) = x sigmoid(2u),  u = sqrt(2/pi) (x + 0.044715 x^3)"""
    square = builder.fmul(x, x)
    factor = math.sqrt(8 / math.pi)
    u2 = builder.fmul(x, fma(builder, square, constant(VF32, 0.044715 * factor), constant(VF32, factor)))
    return _times_sigmoid(builder, x, u2)


def _gelu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """0.5 x (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7."""
    z = builder.fmul(call(builder, "llvm.fabs.v16f32", VF32, x), constant(VF32, math.sqrt(0.5)))
    one = constant(VF32, 1.0)
    t = builder.fdiv(one, fma(builder, z, constant(VF32, 0.3275911), one))
    tail = constant(VF32, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0):
        tail = fma(builder, tail, t, constant(VF32, coefficient))
    tail = builder.fmul(tail, _exp(builder, builder.fneg(builder.fmul(z, z))))  # 1 - erf(z)
    erf = call(builder, "llvm.copysign.v16f32", VF32, builder.fsub(one, tail), x)
    return builder.fmul(builder.fmul(x, constant(VF32, 0.5)), builder.fadd(one, erf))


def _relu2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    positive = call(builder, "llvm.maximum.v16f32", VF32, x, constant(VF32, 0.0))  # keeps NaN
    return builder.fmul(positive, positive)


def _gate(formula):
    """gate(gate_address, up_address, out_address): out = formula(gate) * up on 16 float32."""

    @intrinsic
    def gate(typing_context, gate_address, up_address, out_address):
        def emit(context, builder, signature, args):
            gated = formula(builder, load(builder, VF32, args[0]))
            store(builder, builder.fmul(gated, load(builder, VF32, args[1])), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    return gate


def _without_gate(formula):
    """activate(up_address, out_address): out = formula(up) on 16 float32."""

    @intrinsic
    def activate(typing_context, up_address, out_address):
        def emit(context, builder, signature, args):
            store(builder, formula(builder, load(builder, VF32, args[0])), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return activate


@intrinsic
def gate_silu_with_parameters(typing_context, gate_address, up_address, out_address, parameters):
    """As gate_silu, with limit, alpha and beta of expert_function.py: float32 [3] at an address, limit may be inf."""

    def emit(context, builder, signature, args):
        limit, alpha, beta = (splat(builder, load(builder, F32, args[3], 4 * i)) for i in range(3))
        gate, up = load(builder, VF32, args[0]), load(builder, VF32, args[1])
        gate = call(builder, "llvm.minimum.v16f32", VF32, gate, limit)
        up = call(builder, "llvm.minimum.v16f32", VF32, up, limit)
        up = call(builder, "llvm.maximum.v16f32", VF32, up, builder.fneg(limit))
        gated = _times_sigmoid(builder, gate, builder.fmul(gate, alpha))
        store(builder, builder.fmul(gated, builder.fadd(up, beta)), args[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), emit


gate_silu, gate_gelu, gate_gelu_tanh, gate_relu2 = map(_gate, (_silu, _gelu, _gelu_tanh, _relu2))
silu, gelu, gelu_tanh, relu2 = map(_without_gate, (_silu, _gelu, _gelu_tanh, _relu2))

# How the compiled code names functions: the activation's position, plus WITHOUT_GATE or WITH_PARAMETERS.
ACTIVATION_NAMES = ("silu", "gelu", "gelu_tanh", "relu2")
WITHOUT_GATE, WITH_PARAMETERS = 4, 8


def function_code(function: ExpertFunction) -> int:
    code = ACTIVATION_NAMES.index(function.activation)
    return code + (0 if function.gated else WITHOUT_GATE) + (WITH_PARAMETERS if function.has_parameters else 0)


def _quantize_group(dtype: int):
    """quantize(group_size, source, low, high, scale): one group to int8.

    group_size  a constant of the caller
    source      so many activations of `dtype`
    low         the group's first 64 int8 codes, written; high: the others, if any
    scale       two float32, written: scale = max|x| / 127, and scale * (sum of the codes), which zeros multiply
    """

    @intrinsic(prefer_literal=True)
    def quantize(typing_context, group_size, source, low, high, scale):
        vectors = group_size.literal_value // LANES

        def emit(context, builder, signature, args):
            source, low, high, scale = args[1:]
            step = LANES * _BYTES[dtype]
            x = [_widen(builder, dtype, source, i * step) for i in range(vectors)]
            largest = constant(VF32, 0.0)
            for lanes in x:
                magnitude = call(builder, "llvm.fabs.v16f32", VF32, lanes)
                largest = call(builder, "llvm.maximum.v16f32", VF32, largest, magnitude)  # keeps NaN
            top = call(builder, "llvm.vector.reduce.fmaximum.v16f32", F32, largest)
            unit = builder.fdiv(top, F32(127.0))
            is_zero = builder.fcmp_ordered("==", unit, F32(0.0))
            divisor = splat(builder, builder.select(is_zero, F32(1.0), unit))
            total = constant(VI32, 0)
            for i, lanes in enumerate(x):
                nearest = call(builder, "llvm.rint.v16f32", VF32, builder.fdiv(lanes, divisor))
                code = call(builder, "llvm.fptosi.sat.v16i32.v16f32", VI32, nearest)
                total = builder.add(total, code)
                store(builder, builder.trunc(code, VI8), low if i < 4 else high, i % 4 * LANES)
            code_sum = builder.sitofp(call(builder, "llvm.vector.reduce.add.v16i32", I32, total), F32)
            store(builder, unit, scale)
            store(builder, builder.fmul(unit, code_sum), scale, 4)
            return context.get_dummy_value()

        return types.void(group_size, types.int64, types.int64, types.int64, types.int64), emit

    return quantize


quantize_float32, quantize_bfloat16, quantize_float16 = map(_quantize_group, (FLOAT32, BFLOAT16, FLOAT16))


@intrinsic
def copy64(typing_context, source, destination):
    """Copy 64 bytes."""

    def emit(context, builder, signature, args):
        store(builder, load(builder, VI32, args[0]), args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def add_weighted(typing_context, total, weight, values):
    """total += weight * values on 16 float32; total and values are addresses, weight a float32."""

    def emit(context, builder, signature, args):
        summed = fma(builder, splat(builder, args[1]), load(builder, VF32, args[2]), load(builder, VF32, args[0]))
        store(builder, summed, args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), emit


@intrinsic
def scale_and_add(typing_context, values, factor, addend):
    """values = values * factor + addend on 16 float32; values and addend are addresses, factor a float32."""

    def emit(context, builder, signature, args):
        scaled = fma(builder, load(builder, VF32, args[0]), splat(builder, args[1]), load(builder, VF32, args[2]))
        store(builder, scaled, args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), emit


def _write(dtype: int):
    """write(source, destination): 16 float32 rounded to `dtype`."""

    @intrinsic
    def write(typing_context, source, destination):
        def emit(context, builder, signature, args):
            store(builder, _narrow(builder, dtype, load(builder, VF32, args[0])), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    return write


write_float32, write_bfloat16, write_float16 = map(_write, (FLOAT32, BFLOAT16, FLOAT16))


def _dot(dtype: int):
    """dot(x, y, vectors): sum of products of 16 * vectors numbers, x of `dtype`, y float32, both addresses."""

    @intrinsic
    def dot(typing_context, x, y, vectors):
        def emit(context, builder, signature, args):
            total = cgutils.alloca_once_value(builder, constant(VF32, 0.0))
            with cgutils.for_range(builder, args[2]) as loop:
                x_address = builder.add(args[0], builder.mul(loop.index, I64(LANES * _BYTES[dtype])))
                y_address = builder.add(args[1], builder.mul(loop.index, I64(LANES * _BYTES[FLOAT32])))
                lanes = _widen(builder, dtype, x_address, 0)
                builder.store(fma(builder, lanes, load(builder, VF32, y_address), builder.load(total)), total)
            return call(builder, "llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), builder.load(total))

        return types.float32(types.int64, types.int64, types.int64), emit

    return dot


dot_float32, dot_bfloat16, dot_float16 = map(_dot, (FLOAT32, BFLOAT16, FLOAT16))
