"""Launch parameters by device architecture, layer shape and number of tokens.

A table written by `benchmarks/gpu_moe.py --tune` on the device is used where it has an entry. The defaults of NVIDIA
were the fastest on an H200 (docs/triton_kernel.md); those of AMD follow from registers, spills and instruction counts
of the compiled code (docs/triton_aot_3.9.md), not from measurements.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from vllm_mcmoe.kernels.packing import GROUP_SIZE
from vllm_mcmoe.kernels.triton.fields import TILE_FEATURES

TABLE_VARIABLE = "VLLM_MCMOE_TILES"  # path of a table that was tuned on this machine


@dataclass(frozen=True)
class Shape:
    """What of a layer decides its tiles. experts and intermediate_size are this rank's.

    float_activations: float16 operands. all_experts: of all ranks, where they share the experts; 0 for `experts`.
    """

    experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    float_activations: bool = False
    all_experts: int = 0

    @property
    def key(self) -> str:
        parallel = f"of{self.all_experts}" if self.all_experts > self.experts else ""
        operands = "-float" if self.float_activations else ""
        return f"E{self.experts}{parallel}-top{self.top_k}-H{self.hidden_size}-I{self.intermediate_size}{operands}"

    def local_slots(self, tokens: int) -> int:
        """How many slots of so many tokens this rank's experts get on average, rounded up."""
        return -(-tokens * self.top_k * self.experts // max(self.all_experts, self.experts))


@dataclass(frozen=True)
class Tiles:
    """block_tokens: slots per program; split_k: programs that share the groups of one tile."""

    block_tokens: int
    num_warps: int
    num_stages: int
    gate_up_split_k: int = 1
    down_split_k: int = 1


@dataclass(frozen=True)
class Device:
    """architecture: `sm90`, `gfx942`, ... or `interpreter`; multiprocessors: SMs or compute units."""

    architecture: str
    multiprocessors: int

    @property
    def is_amd(self) -> bool:
        return self.architecture.startswith("gfx")

    @property
    def smallest_block(self) -> int:
        """NVIDIA's mma has an 8-wide side; AMD's smallest int8 mfma is 16 wide."""
        return 16 if self.is_amd else 8

    @property
    def compiler_options(self) -> dict[str, int]:
        """Of every grouped GEMM. Triton would choose mfma 32x32 for prefill: one covers all rows of a 3-bit tile and 32
        tokens, so that four wavefronts compute the same, in 482 registers where 16x16 takes at most 256 (gfx942).
        """
        return {"matrix_instr_nonkdim": 16} if self.is_amd else {}


@lru_cache
def describe_device(device: torch.device) -> Device:
    if device.type == "cpu":
        return Device("interpreter", 1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Device(f"sm{properties.major}{properties.minor}", properties.multi_processor_count)


# 2 warps, because 1- and 3-bit tiles have 32 rows. NVIDIA: 32 and 64 tokens took 1.1 to 1.8 times as long as 16 at any
# length of prompt (H200). AMD: 64 tokens are the most that no width spills: 128 take 128 float32 sums a thread, beside
# operands more than 512 registers at 4 bits; 64 KiB of LDS hold 2 stages of 64 float16 activations, not 3.
_NVIDIA_TILES = {
    8: Tiles(8, num_warps=2, num_stages=3),
    16: Tiles(16, num_warps=2, num_stages=3),
}
_AMD_TILES = {
    16: Tiles(16, num_warps=2, num_stages=3),
    32: Tiles(32, num_warps=4, num_stages=3),
    64: Tiles(64, num_warps=4, num_stages=2),
}
_PROGRAMS_PER_MULTIPROCESSOR = 4  # 8 warps of loads in flight; the decode kernels fit 2 (sm86, sm89, sm120) to 8
_GROUPS_PER_PART = 4  # shorter loops are all pipeline prologue


def _split_k(programs: int, groups: int, multiprocessors: int) -> int:
    """Smallest power of two that fills the device, while every part keeps _GROUPS_PER_PART groups."""
    parts = 1
    while programs * parts < multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR and groups >= 2 * parts * _GROUPS_PER_PART:
        parts *= 2
    return parts


def tiles_by_block(device: Device) -> dict[int, Tiles]:
    """The default tiles by tokens per block, smallest first."""
    return _AMD_TILES if device.is_amd else _NVIDIA_TILES


def default_tiles(device: Device, shape: Shape, tokens: int) -> Tiles:
    """The smallest block that holds an expert's average share of the slots, with some room; split-K for small grids."""
    slots = shape.local_slots(tokens)
    busy = min(shape.experts, slots)
    average = slots / max(busy, 1)
    # up to 1.5 times the block: a second one for the busier experts costs less than tiles that are half empty
    wanted = 8 if average <= 8 else 16 if average <= 24 else 32 if average <= 48 else 64
    *smaller, largest = tiles_by_block(device).values()
    tiles = next((tiles for tiles in smaller if tiles.block_tokens >= wanted), largest)
    blocks = max(busy, slots // tiles.block_tokens)
    gate_up = blocks * (2 * shape.intermediate_size // TILE_FEATURES)
    down = blocks * -(-shape.hidden_size // TILE_FEATURES)
    return replace(
        tiles,
        gate_up_split_k=_split_k(gate_up, shape.hidden_size // GROUP_SIZE, device.multiprocessors),
        down_split_k=_split_k(down, shape.intermediate_size // GROUP_SIZE, device.multiprocessors),
    )


@lru_cache
def _table(path: str) -> dict[str, dict[str, dict[int, Tiles]]]:
    """{architecture: {shape: {tokens: tiles}}}."""
    raw = json.loads(Path(path).read_text())
    return {
        architecture: {
            shape: {int(tokens): Tiles(**tiles) for tokens, tiles in sorted(by_tokens.items(), key=lambda e: int(e[0]))}
            for shape, by_tokens in shapes.items()
        }
        for architecture, shapes in raw.items()
    }


def write_table(path: Path, table: dict[str, dict[str, dict[int, Tiles]]]) -> None:
    plain = {
        architecture: {
            shape: {str(tokens): asdict(tiles) for tokens, tiles in by_tokens.items()}
            for shape, by_tokens in shapes.items()
        }
        for architecture, shapes in table.items()
    }
    path.write_text(json.dumps(plain, indent=1) + "\n")


@lru_cache(maxsize=1 << 16)
def _chosen(device: Device, shape: Shape, tokens: int, path: str | None) -> Tiles:
    tuned = _table(path).get(device.architecture, {}).get(shape.key, {}) if path else {}
    reached = [count for count in tuned if count <= tokens]
    return tuned[max(reached)] if reached else default_tiles(device, shape, tokens)


def choose_tiles(device: Device, shape: Shape, tokens: int) -> Tiles:
    """The table's entry for the largest tuned count of at most `tokens`, or the default.

    Raises OSError or ValueError where VLLM_MCMOE_TILES names a file that is missing or is not a table.
    """
    return _chosen(device, shape, tokens, os.environ.get(TABLE_VARIABLE))
