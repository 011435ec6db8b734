"""Prints the bytes that the pruning kernel spills when compiled for the given GPUs: "sm90 0"; needs no GPU.

In a process of its own, as Triton either interprets or compiles.
"""

import sys

from tests.kernels import triton_aot

# Of a wide model with many experts: 512 of them, top-10, 7168 features; the default rule's rank
SHAPE = {"EXPERTS": 512, "HIDDEN": 7168, "RANK": 8, "TOP_K": 10, "LANES": 16, "RANK_LANES": 8}


def main() -> None:
    from vllm_mcmoe.kernels.triton.pruning import FEW_TOKENS, WARPS, block_sizes

    for tokens in (FEW_TOKENS, FEW_TOKENS + 1):
        block_tokens, block = block_sizes(tokens, SHAPE["TOP_K"], SHAPE["RANK"])
        constants = SHAPE | {"BLOCK_TOKENS": block_tokens, "BLOCK": block}
        case = triton_aot.Case("prune", "pruning.prune_kernel", tuple(constants.items()), num_warps=WARPS)
        for target in sys.argv[1:]:
            print(target, block_tokens, triton_aot.figures(target, case).spills)


if __name__ == "__main__":
    main()
