"""The checks that the Triton tests rely on do catch what they are there for: each test here plants a fault."""

from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels import triton_interpreter
from tests.kernels.test_triton_experts import DECODE, Tiles, assert_agrees, run
from tests.kernels.triton_cases import random_layer, random_tokens
from tests.kernels.triton_interpreter import import_interpreted, strict
from vllm_mcmoe.kernels.packing import Code

launches = import_interpreted("vllm_mcmoe.kernels.triton.launches")
layout = import_interpreted("vllm_mcmoe.kernels.triton.layout")
rings = import_interpreted("vllm_mcmoe.kernels.triton.rings")
gemm = import_interpreted("vllm_mcmoe.kernels.triton.gemm")


def launch(kernel, grid: tuple[int, ...], *arguments) -> None:
    """Interpret a plain function as a kernel, checked."""
    with strict():
        interpreter.InterpretedFunction(kernel)[grid](*arguments)


def copy_four(source_ptr, target_ptr, first):
    at = first + tl.arange(0, 4)
    tl.store(target_ptr + at, tl.load(source_ptr + at))


def copy_to_neighbour(source_ptr, target_ptr):
    at = tl.program_id(0)
    tl.store(target_ptr + at, tl.load(source_ptr + at))
    tl.store(target_ptr + at + 1, tl.load(source_ptr + at))


def shift_left_in_place(values_ptr):
    at = tl.program_id(0)
    tl.store(values_ptr + at, tl.load(values_ptr + at + 1))


def prefix_in_place(values_ptr):
    at = tl.program_id(0) + 1
    tl.store(values_ptr + at, tl.load(values_ptr + at - 1))


def store_all_lanes_to_one(values_ptr):
    tl.store(values_ptr + tl.arange(0, 4) * 0, tl.arange(0, 4))


def promise_multiple_of_16(values_ptr, at):
    tl.store(values_ptr + tl.multiple_of(at, 16), 1)


def add(left_ptr, right_ptr, out_ptr):
    tl.store(out_ptr, tl.load(left_ptr) + tl.load(right_ptr))


def test_what_is_correct_passes():
    source, target = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    launch(copy_four, (1,), source, target, 4)
    assert target.tolist() == [0, 0, 0, 0, 4, 5, 6, 7]


def test_a_load_outside_is_caught():
    with pytest.raises(Exception, match="2 loads outside every tensor"):
        launch(copy_four, (1,), torch.zeros(8, dtype=torch.int32)[:6], torch.zeros(8, dtype=torch.int32), 4)


def test_a_store_outside_is_caught():
    with pytest.raises(Exception, match="1 stores outside every tensor"):
        launch(copy_four, (1,), torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)[:7], 4)


def test_two_programs_storing_one_element_are_caught():
    with pytest.raises(Exception, match=r"race: program \(1, 0, 0\) stores"):
        launch(copy_to_neighbour, (2,), torch.zeros(2), torch.zeros(3))


def test_storing_what_another_program_has_read_is_caught():
    with pytest.raises(Exception, match=r"race: program \(1, 0, 0\) stores"):
        launch(shift_left_in_place, (2,), torch.zeros(3))


def test_loading_what_another_program_has_stored_is_caught():
    with pytest.raises(Exception, match=r"race: program \(1, 0, 0\) loads"):
        launch(prefix_in_place, (2,), torch.zeros(3))


def test_two_lanes_storing_one_element_are_caught():
    with pytest.raises(Exception, match="stores one element from two lanes"):
        launch(store_all_lanes_to_one, (1,), torch.zeros(4, dtype=torch.int32))


def test_a_false_promise_to_the_compiler_is_caught():
    launch(promise_multiple_of_16, (1,), torch.zeros(32, dtype=torch.int32), 16)
    with pytest.raises(Exception, match="multiple_of promises"):
        launch(promise_multiple_of_16, (1,), torch.zeros(32, dtype=torch.int32), 8)


def test_a_misaligned_access_is_caught():
    memory = torch.zeros(64, dtype=torch.uint8)
    with mock.patch.object(torch.Tensor, "data_ptr", lambda self: memory.untyped_storage().data_ptr() + 2):
        arguments = (memory.view(torch.int32), memory.view(torch.int32), 0)
        with pytest.raises(Exception, match="not aligned to 4 bytes"):
            launch(copy_four, (1,), *arguments)


def test_arithmetic_on_bfloat16_is_caught():
    one = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="arithmetic on bfloat16"):
        launch(add, (1,), one, one, torch.zeros(1))


def test_the_plain_interpreter_adds_the_bit_patterns_of_bfloat16():
    """Why arithmetic on it is refused: 1 + 1 is not 2 there. Once this fails, the check can go."""
    one, out = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    with strict(bf16=False):
        interpreter.InterpretedFunction(add)[(1,)](one, one, out)
    assert out.item() != 2


def test_packing_that_forgets_to_flip_the_top_bit_is_caught():
    with (
        mock.patch.object(layout, "is_sign_flipped", lambda bits, field: False),
        pytest.raises(AssertionError),
    ):
        assert_agrees(random_layer([2, 3], 128, 128), *random_tokens(3, 128, 2, 2))


def test_packing_that_takes_gate_for_up_is_caught():
    def swapped(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (2, -1, 128)).flip(0).transpose(0, 1).flatten(0, 2)

    with mock.patch.object(layout, "interleave_gate_up", swapped), pytest.raises(AssertionError):
        assert_agrees(random_layer([2, 3], 128, 128), *random_tokens(3, 128, 2, 2))


TRELLIS = [Code(2, "trellis"), Code(3, "trellis")]


def test_uncoded_bits_that_are_stored_as_they_are_are_caught():
    def unflipped(qweight: torch.Tensor, bits: int) -> torch.Tensor:
        words = rings.ring_words(qweight, bits)
        coded = qweight.clone()
        coded[..., 16:] = 0  # whose words are the coded bits themselves, where the uncoded ones stand
        words[:, :, 1] ^= rings.ring_words(coded, bits)[:, :, 1]
        return words

    with mock.patch.object(layout, "ring_words", unflipped), pytest.raises(AssertionError):
        assert_agrees(random_layer(TRELLIS, 128, 128), *random_tokens(2, 128, 2, 2))


def test_scalar_codes_beside_trellis_codes_whose_inputs_keep_their_order_are_caught():
    with mock.patch.object(layout, "to_ring_order", lambda codes: codes), pytest.raises(AssertionError):
        assert_agrees(random_layer([2, TRELLIS[0]], 128, 128), *random_tokens(2, 128, 2, 1))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x28;", "0x3c;"),
        ("shf.r.wrap.b32 s2, b, b, 17;", "shf.r.wrap.b32 s2, b, b, 1;"),
        ("ones, 2155905152", "ones, 0"),
    ],
    ids=["mask", "rotation", "selection"],
)
def test_one_wrong_instruction_of_the_assembly_is_caught(right, wrong):
    """The interpreter runs the kernels' own text."""
    run_ptx = triton_interpreter._run_ptx

    replaced = []

    def run_wrong(assembly, operands):
        replaced.append(right in assembly)
        run_ptx(assembly.replace(right, wrong), operands)

    with (
        mock.patch.object(launches, "_has_ptx", lambda _: True),
        mock.patch.object(triton_interpreter, "_run_ptx", run_wrong),
        pytest.raises(AssertionError),
    ):
        assert_agrees(random_layer([TRELLIS[1]], 128, 128), *random_tokens(2, 128, 1, 1))
    assert any(replaced)


def test_an_instruction_that_is_not_emulated_is_refused():
    with pytest.raises(NotImplementedError, match="bfind"):
        triton_interpreter._run_ptx("bfind.u32 $0, $1;", {"$1": np.zeros(2, np.uint32)})


def test_a_capacity_that_is_too_small_is_caught():
    def averaged(slots: int, experts: int, block_tokens: int) -> int:
        return -(-slots // block_tokens)

    with (
        mock.patch.object(launches, "block_capacity", averaged),
        pytest.raises(Exception, match="stores outside every tensor"),
    ):
        run(random_layer([2, 3], 128, 128), *random_tokens(9, 128, 2, 2))


def test_a_workspace_without_room_for_every_part_of_split_k_is_caught():
    """Parts that share their sums would race on a GPU and look right in the interpreter's order."""
    split = Tiles(8, 2, 3, gate_up_split_k=2)
    real_empty = torch.empty

    def empty_without_parts(*size, **options):
        return real_empty(*(1, *size[1:]) if len(size) == 3 else size, **options)

    with (
        mock.patch.object(launches.torch, "empty", empty_without_parts),
        pytest.raises(Exception, match="outside every tensor"),
    ):
        run(random_layer([2, 3], 256, 128), *random_tokens(2, 256, 2, 2), tiles=split)


def test_a_slot_that_two_experts_compute_is_caught():
    """As a sort would leave it that counts an id twice."""
    real = launches.prepare

    def prepare_with_duplicates(launch, x, dtype, routing, counters, in_rings):
        quantized = real(launch, x, dtype, routing, counters, in_rings)
        routing.sorted_slots[:] = routing.sorted_slots[0]
        return quantized

    with mock.patch.object(launches, "prepare", prepare_with_duplicates), pytest.raises(Exception, match="race"):
        run(random_layer([2, 3], 128, 128), *random_tokens(5, 128, 2, 2), tiles=DECODE)


def count_then_store(values_ptr, counter_ptr, out_ptr):
    tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    at = tl.program_id(0)
    tl.store(values_ptr + at, at)
    if at == 1:
        tl.store(out_ptr, tl.load(values_ptr))


def store_then_count(values_ptr, counter_ptr, out_ptr):
    at = tl.program_id(0)
    tl.store(values_ptr + at, at + 5)
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == 1:
        tl.store(out_ptr, tl.load(values_ptr) + tl.load(values_ptr + 1))


def store_then_count_elsewhere(values_ptr, counter_ptr, out_ptr):
    at = tl.program_id(0)
    tl.store(values_ptr + at, at)
    tl.atomic_add(counter_ptr + at, 1, sem="acq_rel", scope="gpu")
    if at == 1:
        tl.store(out_ptr, tl.load(values_ptr))


def count_without_order(values_ptr, counter_ptr, out_ptr):
    at = tl.program_id(0)
    tl.store(values_ptr + at, at)
    if tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu") == 1:
        tl.store(out_ptr, tl.load(values_ptr))


def integers(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32)


def test_the_last_to_count_may_load_what_the_others_stored_before():
    out = integers(1)
    launch(store_then_count, (2,), integers(2), integers(1), out)
    assert out.item() == 5 + 6


@pytest.mark.parametrize("kernel", [count_then_store, store_then_count_elsewhere, count_without_order])
def test_loading_what_was_not_released_at_the_same_address_is_caught(kernel):
    with pytest.raises(Exception, match=r"race: program \(1, 0, 0\) loads"):
        launch(kernel, (2,), integers(2), integers(2), integers(1))


def test_an_atomic_operation_outside_is_caught():
    with pytest.raises(Exception, match="atomic operation outside"):
        launch(store_then_count, (2,), integers(2), integers(0), integers(1))


def test_adding_up_before_the_others_have_stored_is_caught():
    """As an arrival would that counts from one."""
    real = gemm._arrive

    def one_more(counter_ptr, AMD):
        return real(counter_ptr, AMD) + 1

    split = Tiles(8, 2, 3, gate_up_split_k=2, down_split_k=2)
    with mock.patch.object(gemm, "_arrive", one_more), pytest.raises(Exception, match="race"):
        run(random_layer([2, 3], 256, 256), *random_tokens(2, 256, 2, 2), tiles=split)
