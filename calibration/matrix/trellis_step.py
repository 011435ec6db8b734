"""One step of the Viterbi algorithm for 16 rows at once, in LLVM's vectors.

Written out because numba's loops over 16 lanes took three times as long and, with more uncoded bits, ten times: each is
compiled with checks whether its arrays overlap, and these loops are short.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from vllm_mcmoe.kernels.cpu.intrinsics import F32, I64, internal_function
from vllm_mcmoe.kernels.cpu.vectors import LANES, VF32, VI32, call, constant, fma, load, splat, store
from vllm_mcmoe.kernels.trellis import MEMORY, RING, TRELLIS_WIDTHS

STATES = 1 << MEMORY
VECTOR = 4 * LANES  # bytes
# What is known of the survivors of all states, float32 [rows of STATES vectors]: their sums, costs and errors.
SUMS, COSTS, ERRORS = 0, STATES * VECTOR, 2 * STATES * VECTOR
SURVIVOR_ROWS = 2 + RING


@intrinsic
def advance(typing_context, uncoded, time, factor, table, scales, targets, survivors, extended, steps):
    """From the survivors of the weights before `time` to those with the weight at `time`. All arguments are int64.

    uncoded              combinations of uncoded bits: 1, 2, 4 or 8
    time                 0 to RING - 1
    factor               address of C, float32 [RING, RING]; beyond the last column nothing is added up
    table                address of the levels around 0, float32 [uncoded, 2 * STATES]
    scales, targets      addresses of float32 [lanes]
    survivors, extended  addresses of float32 [SURVIVOR_ROWS, STATES, lanes]: those there are; those there will be.
                         Sums: what the errors so far add to the next weight's; costs; errors, by time
    steps                address of int32 [STATES, lanes], written: 2 * uncoded bits + the bit that the window loses
    """

    def emit(context, builder, signature, args):
        done = builder.append_basic_block("advanced")
        switch = builder.switch(args[0], done)
        for bits in TRELLIS_WIDTHS:
            combinations = 1 << (bits - 1)
            block = builder.append_basic_block(f"advance_{combinations}")
            switch.add_case(I64(combinations), block)
            with builder.goto_block(block):
                builder.call(_step_function(builder.module, combinations), args[1:])
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), emit


def _step_function(module: ir.Module, combinations: int) -> ir.Function:
    """void name(...): advance's arguments but for the first."""
    name = f"mcmoe_trellis_step_{combinations}"
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    function = internal_function(module, name, 8)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    time, factor, table, scales, targets, survivors, extended, steps = function.args
    step = _Step(builder, factor, time, survivors, extended)
    step.choose(combinations, table, load(builder, VF32, scales), load(builder, VF32, targets), steps)
    step.carry_over()
    builder.ret_void()
    return function


class _Step:
    """The code of one step while it is emitted. A state is reached from the two states `first(state)` and the one
    after; its window is then 2 * state, or that plus 1."""

    def __init__(
        self, builder: ir.IRBuilder, factor: ir.Value, time: ir.Value, survivors: ir.Value, extended: ir.Value
    ):
        self.builder, self.factor, self.time = builder, factor, time
        self.survivors, self.extended = survivors, extended
        last = builder.icmp_signed("==", time, I64(RING - 1))
        self.following = builder.select(last, time, builder.add(time, I64(1)))
        self.inverse = builder.fdiv(F32(1.0), self._entry(self.following, self.following))
        self.second: list[ir.Value] = []  # per state, whether it is reached from the second of its two
        self.sums: list[ir.Value] = []

    @staticmethod
    def first(state: int) -> int:
        return 2 * state % STATES

    def _entry(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """Of C."""
        offset = self.builder.mul(self.builder.add(self.builder.mul(row, I64(RING)), column), I64(4))
        return load(self.builder, F32, self.builder.add(self.factor, offset), align=4)

    def _share(self, earlier: ir.Value) -> ir.Value:
        """By which an error at that time adds to the following weight's."""
        return splat(self.builder, self.builder.fmul(self._entry(earlier, self.following), self.inverse))

    def _errors(self, base: ir.Value, time: ir.Value) -> ir.Value:
        """Address of the errors at a time, [STATES, lanes]."""
        offset = self.builder.mul(time, I64(STATES * VECTOR))
        return self.builder.add(base, self.builder.add(offset, I64(ERRORS)))

    def choose(self, combinations: int, table: ir.Value, scale: ir.Value, target: ir.Value, steps: ir.Value) -> None:
        """For every state where it is best reached from, and with which uncoded bits."""
        builder, before = self.builder, self.survivors
        sums = [load(builder, VF32, before, SUMS + state * VECTOR) for state in range(STATES)]
        wanted = [builder.fsub(total, target) for total in sums]
        costs = [load(builder, VF32, before, COSTS + state * VECTOR) for state in range(STATES)]
        diagonal = self._entry(self.time, self.time)
        curvature = splat(builder, builder.fmul(diagonal, diagonal))
        share, errors_now = self._share(self.time), self._errors(self.extended, self.time)
        for state in range(STATES):
            ways = []
            for bit in range(2):
                origin, window = self.first(state) + bit, 2 * state + bit
                error, uncoded = self._nearest(combinations, table, window, scale, wanted[origin])
                cost = fma(builder, builder.fmul(error, error), curvature, costs[origin])
                ways.append((cost, builder.fsub(error, sums[origin]), uncoded))
            second = builder.fcmp_ordered("<", ways[1][0], ways[0][0])
            cost, error, uncoded = (builder.select(second, high, low) for low, high in zip(*ways, strict=True))
            store(builder, cost, self.extended, COSTS + state * VECTOR)
            store(builder, error, errors_now, state * VECTOR)
            step = builder.or_(builder.shl(uncoded, constant(VI32, 1)), builder.zext(second, VI32))
            store(builder, step, steps, state * VECTOR)
            self.second.append(second)
            self.sums.append(builder.fmul(error, share))

    def _nearest(self, combinations: int, table: ir.Value, window: int, scale: ir.Value, wanted: ir.Value):
        """The error of the best level of a window, and its uncoded bits as int32."""
        builder, best, choice = self.builder, None, constant(VI32, 0)
        for uncoded in range(combinations):
            level = splat(builder, load(builder, F32, table, 4 * (2 * STATES * uncoded + window), align=4))
            error = fma(builder, scale, level, wanted)
            if best is None:
                best = error
                continue
            closer = builder.fcmp_ordered("<", self._magnitude(error), self._magnitude(best))
            best = builder.select(closer, error, best)
            choice = builder.select(closer, constant(VI32, uncoded), choice)
        return best, choice

    def _magnitude(self, value: ir.Value) -> ir.Value:
        return call(self.builder, "llvm.fabs.v16f32", VF32, value)

    def carry_over(self) -> None:
        """Every state takes over the errors of the survivor that it extends, and sums up what they add."""
        builder = self.builder
        before, loop, done = builder.block, builder.append_basic_block("earlier"), builder.append_basic_block("carried")
        builder.cbranch(builder.icmp_signed(">", self.time, I64(0)), loop, done)
        builder.position_at_end(loop)
        earlier = builder.phi(I64)
        earlier.add_incoming(I64(0), before)
        totals = [builder.phi(VF32) for _ in range(STATES)]
        source, target = self._errors(self.survivors, earlier), self._errors(self.extended, earlier)
        errors = [load(builder, VF32, source, state * VECTOR) for state in range(STATES)]
        share, added = self._share(earlier), []
        for state, total in enumerate(totals):
            first = self.first(state)
            error = builder.select(self.second[state], errors[first + 1], errors[first])
            store(builder, error, target, state * VECTOR)
            added.append(fma(builder, error, share, total))
        following = builder.add(earlier, I64(1))
        earlier.add_incoming(following, loop)
        for total, begun, more in zip(totals, self.sums, added, strict=True):
            total.add_incoming(begun, before)
            total.add_incoming(more, loop)
        builder.cbranch(builder.icmp_signed("<", following, self.time), loop, done)
        builder.position_at_end(done)
        for state in range(STATES):
            result = builder.phi(VF32)
            result.add_incoming(self.sums[state], before)
            result.add_incoming(added[state], loop)
            self.sums[state] = result
        for state, total in enumerate(self.sums):
            store(builder, total, self.extended, SUMS + state * VECTOR)
