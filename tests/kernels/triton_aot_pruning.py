"""Prints the bytes that the pruning kernel spills when compiled for the given GPUs: "sm90 0"; needs no GPU.

In a process of its own, as Triton either interprets or compiles.
"""

import sys

from tests.kernels import triton_aot

LARGEST = {"EXPERTS": 512, "RANK": 8, "TOP_K": 10, "LANES": 16, "BLOCK_TOKENS": 4}  # Qwen3-Next: 512 experts, top-10


def main() -> None:
    triton_aot._POINTEES |= {"counts_ptr": "i64", "out_ids_ptr": "i32"}
    case = triton_aot.Case("prune", "pruning.prune_kernel", tuple(LARGEST.items()))
    for target in sys.argv[1:]:
        print(target, triton_aot.figures(target, case).spills)


if __name__ == "__main__":
    main()
