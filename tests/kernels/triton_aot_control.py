"""Prints the lane-instructions per weight that 2-bit decode would take if codes were shifted to the low bits.

The negative control of the instruction bar; in a process of its own, as it replaces a part of the kernel.
"""

import triton

from tests.kernels.triton_aot import cases, figures
from vllm_mcmoe.kernels.triton import accumulate


@triton.constexpr_function
def shift_and_mask_four_bytes(mask):
    lowest_bit = (mask & -mask).bit_length() - 1
    in_place = (mask >> lowest_bit) * 0x01010101
    return f"{{ .reg .b32 shifted; shr.b32 shifted, $1, {lowest_bit}; and.b32 $0, shifted, {in_place}; }}"


def main() -> None:
    accumulate.and_four_bytes = shift_and_mask_four_bytes
    row = figures("sm80", next(case for case in cases("sm80") if case.bits == 2))
    print(row.instructions_per_weight)


if __name__ == "__main__":
    main()
