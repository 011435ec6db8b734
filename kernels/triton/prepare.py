"""What has to be done before the first GEMM of a layer, in one launch."""

import triton
import triton.language as tl

from vllm_mcmoe.kernels.triton.quantize import quantize_rows
from vllm_mcmoe.kernels.triton.routing import sort_few_slots, sort_slots

LARGEST_BLOCK = 128  # slots of a block, at most


# a prompt of another length, or memory at another address, must not compile a kernel
@triton.jit(
    do_not_specialize=["slots", "capacity", "block_tokens", "experts", "sorting_programs", "are_few", "counters"],
    do_not_specialize_on_alignment=["ids_ptr", "map_ptr"],
)
def prepare_kernel(
    x_ptr, values_ptr, scales_ptr, sums_ptr, K,
    ids_ptr, map_ptr, sorted_slots_ptr, block_expert_ptr, counters_ptr,
    slots, capacity, block_tokens, experts, sorting_programs, are_few, counters,
    BINS: tl.constexpr, MAPPED: tl.constexpr, CHUNK: tl.constexpr, FEW_SLOTS: tl.constexpr, LARGEST_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, FLOAT: tl.constexpr, RINGS: tl.constexpr,
):  # fmt: skip
    """Clears the GEMMs' counters, sorts the slots, and quantises the rows of x.

    Grid: (1 + sorting_programs + tokens * ceil(K / (128 * GROUPS)),). sorting_programs: one per slot if they are few,
    else experts + 1. counters int32 [counters]; x any float type [tokens, K]; the rest as in routing.py and
    `quantize_rows`.
    """
    program = tl.program_id(0)
    if program == 0:
        for start in range(0, counters, CHUNK):
            counter = start + tl.arange(0, CHUNK)
            tl.store(counters_ptr + counter, 0, mask=counter < counters)
    elif program <= sorting_programs:
        if are_few != 0:
            sort_few_slots(
                program - 1, ids_ptr, map_ptr, sorted_slots_ptr, block_expert_ptr, slots, block_tokens, experts,
                MAPPED, FEW_SLOTS, LARGEST_BLOCK,
            )  # fmt: skip
        else:
            sort_slots(
                program - 1, ids_ptr, map_ptr, sorted_slots_ptr, block_expert_ptr,
                slots, capacity, block_tokens, experts, BINS, MAPPED, CHUNK, LARGEST_BLOCK,
            )  # fmt: skip
    else:
        piece = program - 1 - sorting_programs
        pieces = tl.cdiv(K // 128, GROUPS)
        group = piece % pieces * GROUPS + tl.arange(0, GROUPS)
        quantize_rows((piece // pieces).to(tl.int64), group, x_ptr, values_ptr, scales_ptr, sums_ptr, K, FLOAT, RINGS)
