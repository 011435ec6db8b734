"""Prints the bytes that a prefill's grouped GEMM moves, counted from the order of its programs; no GPU is needed.

    python -m tests.kernels.triton_traffic

Programs run in the order of the grid through one cache that evicts what was not used for longest, of tiles of weights
and of blocks of activations. From the cache: what all programs read. From memory: what was not in it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator

from vllm_mcmoe.kernels.triton.fields import TILE_FEATURES
from vllm_mcmoe.kernels.triton.gemm import BLOCKS_PER_GROUP
from vllm_mcmoe.kernels.triton.tiles import Shape

TOKENS = 4096
STORED_BITS = 2.75  # 2 and 3 bits, with a scale and a zero point per group
SHAPES = {
    "Mixtral-8x7B": Shape(experts=8, top_k=2, hidden_size=4096, intermediate_size=14336),
    "Qwen3-30B-A3B": Shape(experts=128, top_k=8, hidden_size=2048, intermediate_size=768),
}
CACHES = {"RTX 3090": 6 << 20, "H100": 50 << 20}  # NVIDIA's architecture white papers
Order = Callable[[int, int], Iterator[tuple[int, int]]]


def tile_by_tile(blocks: int, tiles: int) -> Iterator[tuple[int, int]]:
    """(block, tile) of each program: a block goes through all tiles before the next."""
    return ((block, tile) for block in range(blocks) for tile in range(tiles))


def grouped(blocks: int, tiles: int) -> Iterator[tuple[int, int]]:
    """As `gemm._place`."""
    for first in range(0, blocks, BLOCKS_PER_GROUP):
        for tile in range(tiles):
            for block in range(first, min(first + BLOCKS_PER_GROUP, blocks)):
                yield block, tile


def gate_up_bytes(shape: Shape, block_tokens: int, order: Order, cache_bytes: int) -> tuple[int, int]:
    """(read from the cache, read from memory) of a uniform routing's gate_up."""
    per_expert = -(-TOKENS * shape.top_k // shape.experts // block_tokens)
    tiles = 2 * shape.intermediate_size // TILE_FEATURES
    weights = int(TILE_FEATURES * shape.hidden_size * STORED_BITS / 8)
    rows = block_tokens * shape.hidden_size
    held: OrderedDict[tuple, int] = OrderedDict()
    used = from_cache = from_memory = 0
    for block, tile in order(per_expert * shape.experts, tiles):
        for key, size in ((("weights", block // per_expert, tile), weights), (("rows", block), rows)):
            from_cache += size
            if key in held:
                held.move_to_end(key)
                continue
            from_memory, used, held[key] = from_memory + size, used + size, size
            while used > cache_bytes:
                used -= held.popitem(last=False)[1]
    return from_cache, from_memory


def main() -> None:
    kinds = {"64 slots, block by block": (64, tile_by_tile), "16 slots, block by block": (16, tile_by_tile)}
    kinds[f"16 slots, {BLOCKS_PER_GROUP} blocks together"] = (16, grouped)
    print(f"| GB, {TOKENS} tokens | read by programs |", " | ".join(f"from memory, {name}" for name in CACHES), "|")
    print("|---|---:|" + "---:|" * len(CACHES))
    for model, shape in SHAPES.items():
        for kind, (block_tokens, order) in kinds.items():
            moved = [gate_up_bytes(shape, block_tokens, order, size) for size in CACHES.values()]
            cells = [f"{moved[0][0] / 1e9:.2f}", *(f"{memory / 1e9:.2f}" for _, memory in moved)]
            print(f"| {model}, {kind} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
