"""Runs the Triton kernels on CPU tensors, with what Triton's own interpreter leaves unchecked.

`import_interpreted()` imports the kernels so that they are interpreted, `strict()` is the context to run them in:

- an access outside the launch's tensors, or misaligned, is an error; the interpreter would read the neighbour's memory
- two programs of one launch that touch the same element, one of them writing, are an error; on a GPU that is a race,
  the interpreter runs programs one after the other and always gets the same answer. A program may read what another
  stored before an atomic operation, if it has itself come to the same address with one since
- a false `tl.multiple_of` promise is an error; the interpreter ignores it, the compiler believes it
- bfloat16 is converted at casts, and arithmetic on it is an error; the interpreter would add raw bit patterns
- the kernels' inline assembly is emulated, instruction by instruction
- fresh memory holds NaN or the largest integer, so that reading an unwritten element shows
"""

import contextlib
import functools
import importlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import JITFunction, interpreter

NOBODY, SEVERAL = -1, -2
RELEASE_AND_ACQUIRE = "ACQUIRE_RELEASE"


class AccessError(Exception):
    """A kernel touched memory that it must not touch."""


@dataclass
class Region:
    """The bytes of one tensor argument, and which program wrote or read the element that begins at each byte."""

    begin: int
    end: int
    writer: np.ndarray
    written: np.ndarray  # how many atomic operations the writer had done before
    reader: np.ndarray

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Region":
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        begin = tensor.data_ptr()
        return cls(begin, begin + size, np.full(size, NOBODY), np.zeros(size, int), np.full(size, NOBODY))


class AccessGuard:
    """Checks every load and store of one launch at a time."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.atomics: Counter[int] = Counter()  # by program
        self.seen: dict[int, Counter[int]] = {}  # by program: up to which of their atomic operations it sees others
        self.released: dict[int, Counter[int]] = {}  # the same by address: what the next one to come there will see

    def begin_launch(self, arguments: list) -> None:
        regions = {}
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                region = Region.of(argument)
                regions[region.begin, region.end] = region
        self.regions = list(regions.values())
        self.atomics, self.seen, self.released = Counter(), {}, {}

    def count(self, pointers: np.ndarray, orders: bool) -> None:
        """Atomic operations of the running program. orders: they release its stores and acquire those of others."""
        for pointer in pointers.tolist():
            if not any(region.begin <= pointer < region.end for region in self.regions):
                raise AccessError(f"an atomic operation outside every tensor, by program {_program()}")
        if not orders:
            return
        program = _program_number()
        self.atomics[program] += 1
        known = self.seen.get(program, Counter())
        for pointer in pointers.tolist():
            known = known | self.released.get(pointer, Counter())
        self.seen[program] = known
        for pointer in pointers.tolist():
            self.released[pointer] = known | Counter({program: self.atomics[program]})

    def check(self, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle, is_store: bool) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[active].astype(np.int64)
        if misaligned := int((addresses % size != 0).sum()):
            raise AccessError(f"{misaligned} addresses are not aligned to {size} bytes")
        outside = np.ones(addresses.shape, dtype=bool)
        for region in self.regions:
            inside = (addresses >= region.begin) & (addresses + size <= region.end)
            if inside.any():
                self._check_races(region, addresses[inside] - region.begin, is_store)
                outside &= ~inside
        if outside.any():
            verb = "stores" if is_store else "loads"
            raise AccessError(f"{int(outside.sum())} {verb} outside every tensor, by program {_program()}")

    def _check_races(self, region: Region, at: np.ndarray, is_store: bool) -> None:
        program = _program_number()
        writer = region.writer[at]
        racing = (writer != NOBODY) & (writer != program)
        if racing.any():
            seen = self.seen.get(program, Counter())
            racing &= region.written[at] >= np.array([seen[int(other)] for other in writer])
        if is_store:
            reader = region.reader[at]
            racing |= (reader != NOBODY) & (reader != program)
        if racing.any():
            verb = "stores" if is_store else "loads"
            raise AccessError(f"race: program {_program()} {verb} what another program of the launch has touched")
        if is_store:
            if np.unique(at).size != at.size:
                raise AccessError(f"race: program {_program()} stores one element from two lanes")
            region.writer[at], region.written[at] = program, self.atomics[program]
        else:
            seen = region.reader[at]
            region.reader[at] = np.where((seen == NOBODY) | (seen == program), program, SEVERAL)


def _program() -> tuple[int, int, int]:
    return interpreter.interpreter_builder.grid_idx


def _program_number() -> int:
    (x, y, z), (_, height, depth) = _program(), interpreter.interpreter_builder.grid_dim
    return (x * height + y) * depth + z


def _bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _bf16_patches() -> dict:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, binary, unary = builder.cast_impl, builder.binary_op, builder.unary_op

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16:
            src = handle(_bf16_to_float32(src.data), tl.float32)
        if dst_type.scalar == tl.bfloat16:
            return handle(_float32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    def refuse(operation):
        def checked(self, operand, *rest):
            if operand.dtype.scalar == tl.bfloat16:
                raise TypeError("arithmetic on bfloat16: convert to float32 first")
            return operation(self, operand, *rest)

        return checked

    return {
        "cast_impl": cast_impl,
        "create_fp_to_fp": lambda self, src, dst_type, rounding: cast_impl(self, src, dst_type),
        "binary_op": refuse(binary),
        "unary_op": refuse(unary),
    }


def _access_patches(guard: AccessGuard) -> dict:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw

    def create_masked_load(self, pointers, mask, *rest):
        guard.check(pointers, mask, is_store=False)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        guard.check(pointers, mask, is_store=True)
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self, operation, pointers, values, mask, semantics, scope):
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        orders = self.ir_sem_to_interpreter_sem[semantics].name == RELEASE_AND_ACQUIRE
        guard.count(pointers.data[active].astype(np.int64), orders)
        bits = interpreter.TensorHandle(np.ascontiguousarray(active), tl.int1)  # as they come, they may be integers
        return atomic(self, operation, pointers, values, bits, semantics, scope)

    return {
        "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
        "create_atomic_rmw": create_atomic_rmw,
    }


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Any function of three bits: bit 4 a + 2 b + c of the table."""
    result = np.uint32(0)
    for index in range(8):
        if int(table) >> index & 1:
            terms = [x if index >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def _prmt(low: np.ndarray, high: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """By each of the four lower nibbles a byte of eight, or, where the nibble's highest bit is set, its sign."""
    both, result = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32)), np.uint32(0)
    for at in range(4):
        nibble = selectors >> np.uint32(4 * at) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(np.uint32)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        result = result | (byte << np.uint32(8 * at))
    return result


_PTX = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "sub.u32": lambda a, b: a - b,
    "shr.u32": lambda a, bits: a >> bits,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "shf.r.wrap.b32": lambda low, high, bits: (low >> bits) | (high << np.uint32(32 - int(bits))) if bits else low,
    "mov.u32": lambda a: a,
}


def _run_ptx(assembly: str, operands: dict[str, np.ndarray]) -> None:
    """Instruction by instruction, over all threads at once; operands by name, results among them afterwards."""
    for statement in assembly.strip("{} \n").split(";"):
        words = statement.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        name, result, *arguments = words
        if name not in _PTX:
            raise NotImplementedError(f"inline assembly {statement!r}")
        values = [operands[x] if x in operands else np.uint32(int(x, 0)) for x in arguments]
        operands[result] = _PTX[name](*values)


def _create_inline_asm(self, assembly, constraints, values, types, is_pure, pack):
    """The kernels' PTX on 32-bit words, which hold `pack` elements each that follow each other in a row."""
    data = [np.ascontiguousarray(value.data) for value in values]
    outputs = len(types)
    if constraints != ",".join(["=r"] * outputs + ["r"] * len(data)) or any(x.itemsize * pack != 4 for x in data):
        raise NotImplementedError(f"inline assembly with {constraints!r} and {pack} elements at a time")
    operands = {f"${outputs + index}": x.view(np.uint32) for index, x in enumerate(data)}
    operands["%lanemask_eq"] = np.uint32(1 << 31)  # of the last lane
    _run_ptx(assembly, operands)
    handles = []
    for index, kind in enumerate(types):
        dtype = interpreter._get_np_dtype(kind.scalar)
        result = np.ascontiguousarray(operands[f"${index}"]).view(dtype).reshape(data[0].shape)
        handles.append(interpreter.TensorHandle(result, kind.scalar))
    return mock.Mock(get_result=handles.__getitem__)


def _check_promise(handle: interpreter.TensorHandle, name: str, values: list[int]) -> None:
    """Replaces TensorHandle.set_attr, where tl.multiple_of and its relatives end."""
    if name == "tt.divisibility" and (handle.data % np.asarray(values) != 0).any():
        raise AccessError(f"tl.multiple_of promises {values}, the value is {handle.data}")


@contextlib.contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """torch fills what torch.empty returns while deterministic algorithms are asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def _interpreted_standard_library() -> Iterator[None]:
    """tl.sum, tl.cdiv and their like are compiled kernels themselves if triton was imported without interpreting."""
    with contextlib.ExitStack() as stack:
        for module in (tl, tl.standard):
            compiled = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
            for name, function in compiled.items():
                stack.enter_context(mock.patch.object(module, name, _interpreted(function)))
        yield


@functools.cache
def _interpreted(function: JITFunction) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function.fn)


def _call_without_patching_again(self: interpreter.InterpretedFunction, *args, **kwargs):
    """A device function: the original patches `tl` again, which the launch has done, and takes most of the time."""
    return self.rewrite()(*args, **kwargs)


@contextlib.contextmanager
def _patched_core() -> Iterator[None]:
    """tl.core, which the standard library uses instead of tl."""
    patches = interpreter._patch_lang(tl.sum.fn)
    try:
        yield
    finally:
        patches.restore()


@contextlib.contextmanager
def strict(bf16: bool = True) -> Iterator[None]:
    """Run interpreted kernels with every check; bf16=False leaves the interpreter's own bfloat16."""
    guard = AccessGuard()
    convert = interpreter.GridExecutor._init_args_hst

    def begin_launch(self, arguments, keywords):
        converted, converted_keywords = convert(self, arguments, keywords)
        guard.begin_launch([*converted, *converted_keywords.values()])
        return converted, converted_keywords

    patches = _access_patches(guard) | (_bf16_patches() if bf16 else {}) | {"create_inline_asm": _create_inline_asm}
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.multiple(interpreter.InterpreterBuilder, **patches),
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", begin_launch),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", _call_without_patching_again),
        mock.patch.object(interpreter.TensorHandle, "set_attr", _check_promise),
        _interpreted_standard_library(),
        _patched_core(),
        _poisoned_allocations(),
    ):
        yield


@contextlib.contextmanager
def programs_backwards() -> Iterator[None]:
    """The programs of every launch run from the last to the first; a GPU promises no order."""
    builder = interpreter.interpreter_builder
    place = type(builder).set_grid_idx

    def mirrored(self, *at: int) -> None:
        place(self, *(size - 1 - index for size, index in zip(self.grid_dim, at, strict=True)))

    with mock.patch.object(type(builder), "set_grid_idx", mirrored):
        yield


def import_interpreted(name: str) -> ModuleType:
    """A module of the Triton kernels, interpreted. Triton decides that once, when a kernel is decorated."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        module = importlib.import_module(name)
        gemm = importlib.import_module("vllm_mcmoe.kernels.triton.gemm")
    if not isinstance(gemm.grouped_gemm_kernel, interpreter.InterpretedFunction):
        raise RuntimeError("the Triton kernels were imported for a GPU before these tests; run them in another process")
    return module
