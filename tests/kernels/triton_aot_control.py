"""Prints the lane-instructions per weight that 2-bit decode would take if codes were shifted to the low bits, or, with
--trellis, if the compiler knew the tables of trellis codes to be the same in all threads.

The negative controls of the instruction bars; in a process of its own, as it replaces a part of the kernel.
"""

import sys

import triton

from tests.kernels.triton_aot import cases, figures
from vllm_mcmoe.kernels.packing import Code
from vllm_mcmoe.kernels.triton import accumulate, accumulate_rings


@triton.constexpr_function
def shift_and_mask_four_bytes(mask):
    lowest_bit = (mask & -mask).bit_length() - 1
    in_place = (mask >> lowest_bit) * 0x01010101
    return f"{{ .reg .b32 shifted; shr.b32 shifted, $1, {lowest_bit}; and.b32 $0, shifted, {in_place}; }}"


decoder = accumulate_rings.ring_decoder


@triton.constexpr_function
def decoder_of_known_tables(bits):
    return decoder(bits).replace("%lanemask_eq", "0")


def main() -> None:
    code = Code(2, "trellis") if "--trellis" in sys.argv else Code(2)
    accumulate.and_four_bytes = shift_and_mask_four_bytes
    accumulate_rings.ring_decoder = decoder_of_known_tables
    row = figures("sm80", next(case for case in cases("sm80") if case.code == code))
    print(row.instructions_per_weight)


if __name__ == "__main__":
    main()
