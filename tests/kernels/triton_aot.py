"""Compiles the Triton kernels ahead of time for GPUs that are not here, and reads the machine code.

    python -m tests.kernels.triton_aot [sm90 ...]         print the report
    python -m tests.kernels.triton_aot --write            replace docs/triton_aot_VERSION.md, of the installed Triton
    python -m tests.kernels.triton_aot --ci               only what the tests compile, about a third of the time
    python -m tests.kernels.triton_aot gfx942 --assembly  the code of a GEMM whose last program adds up split-K's parts

Runs in a process of its own: Triton either interprets or compiles, decided when it is imported. Long, as it has what
is compiled, how the machine code of two makers is read, and the report, which no other module wants.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mcmoe.kernels.expert_function import GPT_OSS, SILU, ExpertFunction
from vllm_mcmoe.kernels.packing import TRELLIS_WIDTHS, Code

if TYPE_CHECKING:  # whoever imports the kernels decides whether they are interpreted; this module must not be the first
    from vllm_mcmoe.kernels.triton.tiles import Tiles

DOCS = Path(__file__).parents[2] / "docs"
USERS_TRITON = ("3.7", "3.8")  # what vLLM 0.32 and 0.33 bring; the tests' own is the newest
TILE_WEIGHTS = 256 * 128
DIVISIBLE_BY_16 = ("N", "K")  # as the launcher finds them: both are multiples of 16 in every model

# Largest shared memory of one block, bytes: CUDA programming guide, "technical specifications per compute capability";
# LDS per workgroup from AMD's CDNA3 and CDNA4 instruction set guides
SHARED_MEMORY = {
    "sm80": 163 << 10,
    "sm86": 99 << 10,
    "sm89": 99 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "sm120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
# Of each kind of matrix instructions one: the tests compile all decode kernels of these and one kernel of the others,
# which differ little (docs/triton_aot_3.9.md); the report has everything.
WHOLE_IN_CI = ("sm80", "sm90", "gfx942")
DECODE_WIDTHS = (1, 2, 3, 4, 8)
TRELLIS_TARGETS = ("sm80", "sm90", "sm100", "gfx942")  # the others differ little
TRELLIS_IN_CI = (2, 3)  # without and with masks for further uncoded bits
SPLIT_AND_WHOLE = (2, 3)  # a width with whole fields and one with split ones
SLOWEST = 3  # split fields take the most registers and instructions
GEMM = "gemm.grouped_gemm_kernel"


@dataclass(frozen=True)
class Case:
    """One kernel to compile. code: it has a GEMM loop over tiles of this one alone, whose figures are read.

    in_ci: the tests compile it again; the rest is compiled for the report only, because it takes minutes.
    """

    name: str
    kernel: str
    constants: tuple[tuple[str, object], ...]
    num_warps: int = 4
    num_stages: int = 3
    code: Code | None = None
    in_ci: bool = True

    @property
    def block_tokens(self) -> int:
        return dict(self.constants)["BLOCK_TOKENS"]

    @property
    def is_float(self) -> bool:
        return dict(self.constants)["FLOAT"]

    @property
    def is_trellis(self) -> bool:
        return self.code is not None and self.code.kind == "trellis"


@dataclass(frozen=True)
class Figures:
    """One row of the report. Empty strings where a figure means nothing for the kernel."""

    target: str
    kernel: str
    registers: int
    spills: int
    shared_memory: int
    matrix_instruction: str
    instructions_per_weight: float | str
    bytes_per_weight: float | str
    weight_load_bytes: int | str

    @property
    def key(self) -> tuple[str, str]:
        return self.target, self.kernel


HEADINGS = (
    "target",
    "kernel",
    "registers",
    "spilled bytes",
    "shared memory",
    "matrix instruction",
    "lane-instructions per weight",
    "bytes per weight",
    "bytes per weight load",
)


def _gemm(
    target: str,
    tiles: "Tiles",
    widths: Sequence[int],
    function: ExpertFunction | None = None,
    biased: bool = False,
    is_float: bool = False,
    combines: bool = False,
    stored_zeros: bool = True,
    trellis: bool = False,
    in_ci: bool = True,
) -> Case:
    from vllm_mcmoe.kernels.triton import gemm

    codes = [Code(width, "trellis" if trellis else "scalar") for width in widths]
    constants = {
        "WIDTHS": sum(1 << code.number for code in codes),
        "STORED_ZEROS": stored_zeros,
        "MAPPED": True,
        "BLOCK_TOKENS": tiles.block_tokens,
        "STAGES": tiles.num_stages,
        "BIASED": biased,
        "ACTIVATION": function and function.activation,
        "GATED": function is None or function.gated,
        "LIMIT": function and function.limit,
        "ALPHA": function.alpha if function else 1.0,
        "BETA": function.beta if function else 0.0,
        "INLINE_ASM": not _is_amd(target),
        "AMD": _is_amd(target),
        "FLOAT": is_float,
        "COMBINE": combines,
        "GROUP": gemm.BLOCKS_PER_GROUP,
        "ROWS": gemm.SUMMED_ROWS,
    }
    code = codes[0] if len(codes) == 1 else None
    names = {None: "", SILU: ", SiLU", GPT_OSS: ", clamped SiLU"}
    details = [", float"] * is_float + [names.get(function, f", {function}")]
    details += [", biases"] * biased + [", combining"] * combines + [", no zeros"] * (not stored_zeros)
    kind = "-bit trellis" if trellis else " bit"
    name = f"{tiles.block_tokens} tokens, {'+'.join(map(str, widths))}{kind}{''.join(details)}"
    return Case(name, GEMM, tuple(constants.items()), tiles.num_warps, tiles.num_stages, code, in_ci)


def _is_amd(target: str) -> bool:
    return target.startswith("gfx")


def trellis_codes(target: str) -> list[Code]:
    """Those with a decode kernel to themselves; of AMD, which takes long to compile the definition, one."""
    widths = TRELLIS_IN_CI[:1] if _is_amd(target) else TRELLIS_WIDTHS
    return [Code(bits, "trellis") for bits in widths if target in TRELLIS_TARGETS]


def cases(target: str, only_ci: bool = False) -> list[Case]:
    """Every kernel of the backend, the GEMM with its default tiles: decode of each width, and mixed widths.

    The largest tile is also compiled for single widths, for their instructions, and, with all of its widths and the
    fused epilogue, for the most registers and shared memory that any layer can ask for.
    """
    from vllm_mcmoe.kernels.triton import routing
    from vllm_mcmoe.kernels.triton.prepare import LARGEST_BLOCK
    from vllm_mcmoe.kernels.triton.quantize import GROUPS_PER_PROGRAM
    from vllm_mcmoe.kernels.triton.tiles import Device, tiles_by_block

    decode, *larger = tiles_by_block(Device(target, 1)).values()
    prepare = {
        "BINS": 128, "MAPPED": True,
        "CHUNK": routing.CHUNK, "FEW_SLOTS": routing.FEW_SLOTS, "LARGEST_BLOCK": LARGEST_BLOCK,
        "GROUPS": GROUPS_PER_PROGRAM, "FLOAT": False, "RINGS": False,
    }  # fmt: skip
    combine = {"MAPPED": True, "BLOCK": routing.COMBINE_BLOCK, "ROWS": routing.COMBINE_ROWS}
    small = [("prepare", "prepare.prepare_kernel", prepare), ("combine", "routing.combine_kernel", combine)]
    every = [
        *(_gemm(target, decode, [bits]) for bits in DECODE_WIDTHS),
        _gemm(target, decode, [SLOWEST], stored_zeros=False),
        _gemm(target, decode, (1, 2, 3, 4), SILU, stored_zeros=False),
        *(_gemm(target, decode, [bits], is_float=True, in_ci=bits == SLOWEST) for bits in SPLIT_AND_WHOLE),
        _gemm(target, decode, (1, 2, 3, 4), SILU, in_ci=False),
        _gemm(target, decode, (1, 2, 3, 4), GPT_OSS, biased=True),
        _gemm(target, decode, (1, 2, 3, 4), ExpertFunction("relu2", gated=False), in_ci=False),
        _gemm(target, decode, (1, 2, 3, 4), combines=True),
        *(_gemm(target, tiles, DECODE_WIDTHS, SILU, in_ci=False) for tiles in larger),
        *(_gemm(target, larger[-1], [bits], in_ci=bits == SLOWEST) for bits in SPLIT_AND_WHOLE),
        *(_gemm(target, larger[-1], [bits], is_float=True, in_ci=False) for bits in SPLIT_AND_WHOLE),
        *(Case(name, kernel, tuple(constants.items())) for name, kernel, constants in small),
        *(
            _gemm(target, decode, [code.bits], trellis=True, in_ci=code.bits in TRELLIS_IN_CI)
            for code in trellis_codes(target)
        ),
    ]
    if only_ci and target not in WHOLE_IN_CI:
        return [case for case in every if case.name.endswith("SiLU, no zeros")]
    return [case for case in every if case.in_ci or not only_ci]


# by argument name, and by kernel where the name alone does not say; the rest are float32 pointers
_POINTEES = {
    "codes_ptr": "u8", "scales_ptr": "i32", "offsets_ptr": "i64", "bits_ptr": "i32", "sorted_slots_ptr": "i32",
    "block_expert_ptr": "i32", "ids_ptr": "i32", "map_ptr": "i32", "counters_ptr": "i32",
    "counts_ptr": "i64", "out_ids_ptr": "i32",
    "prepare.x_ptr": "bf16", "prepare.values_ptr": "i8", "prepare.scales_ptr": "fp32", "out_ptr": "bf16",
}  # fmt: skip


def _pointee(case: Case, name: str) -> str:
    if case.kernel == GEMM and name in ("x_ptr", "out_ptr"):
        constants = dict(case.constants)
        operand = "fp16" if constants["FLOAT"] else "i8"
        return operand if name == "x_ptr" or constants["ACTIVATION"] else "bf16"
    module = case.kernel.split(".")[0]
    return _POINTEES.get(f"{module}.{name}", _POINTEES.get(name, "fp32"))


def compile_case(target: str, case: Case):
    """Triton's compiled kernel for the target; needs no GPU."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_mcmoe.kernels.triton import tiles

    module, name = case.kernel.split(".")
    kernel = getattr(importlib.import_module(f"vllm_mcmoe.kernels.triton.{module}"), name)
    constants = dict(case.constants)
    signature = {
        argument: "constexpr"
        if argument in constants
        else f"*{_pointee(case, argument)}"
        if argument.endswith("_ptr")
        else "i32"
        for argument in kernel.arg_names
    }
    aligned = [n for n in kernel.arg_names if signature[n][0] == "*" or n in DIVISIBLE_BY_16]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    amd = _is_amd(target)
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[2:]), 32)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    if case.kernel == GEMM:
        options |= tiles.Device(target, 1).compiler_options
    return triton.compile(source, target=gpu, options=options)


def _nvidia_code(compiled) -> tuple[str, int, int]:
    """SASS, registers and spilled bytes."""
    from triton.backends import nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage.stdout).groups())
    return sass.stdout, registers, stack + local


def _amd_code(compiled) -> tuple[str, int, int]:
    text = compiled.asm["amdgcn"]
    kernel = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
    spilled_registers = kernel["vgpr_spill_count"] + kernel["sgpr_spill_count"]
    return text, kernel["vgpr_count"], 4 * spilled_registers + kernel["private_segment_fixed_size"]


_NVIDIA_LABEL = re.compile(r"^(\.L_x_\d+):")
_NVIDIA_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_AMD_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_AMD_LINE = re.compile(r"^\s+([a-z][a-z0-9_]+)(?:\s+([^;]*))?")
_MATRIX = re.compile(r"^[A-Z]*MMA(\.|$)|mfma")  # IMMA, HMMA, IGMMA of sm90, UTCIMMA of sm100; v_mfma


def _instructions(code: str, amd: bool) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(opcode, operands) of every instruction, and the index of the one that each label precedes."""
    label, line = (_AMD_LABEL, _AMD_LINE) if amd else (_NVIDIA_LABEL, _NVIDIA_LINE)
    labels, instructions = {}, []
    for text in code.splitlines():
        if found := label.match(text):
            labels[found[1]] = len(instructions)
        if found := line.match(text):
            instructions.append((found[1], found[2] or ""))
    return instructions, labels


def _matrix_loop(instructions: list[tuple[str, str]], labels: dict[str, int]) -> Counter:
    """Opcodes of the innermost loop with matrix instructions: what stands between a label and a branch back to it.

    AMD's compiler may leave a second one for the last group; the one with more matrix instructions is the main loop.
    """
    loops = []
    for end, (opcode, operands) in enumerate(instructions):
        goal = re.search(r"\.L(?:_x_|BB)[0-9_]+", operands) if re.match(r"BRA|s_c?branch", opcode) else None
        if goal and labels.get(goal[0], end) < end:
            body = range(labels[goal[0]], end + 1)
            if any(_MATRIX.search(instructions[at][0]) for at in body):
                loops.append(body)
    innermost = [
        body for body in loops if not any(o != body and body.start <= o.start and o.stop <= body.stop for o in loops)
    ]
    return max(
        (Counter(instructions[at][0] for at in body) for body in innermost),
        key=lambda loop: sum(count for opcode, count in loop.items() if _MATRIX.search(opcode)),
    )


def _loaded_bytes(case: Case, loop: Counter, size: int, amd: bool) -> int:
    """What the loop's loads of `size` bytes a lane bring in, by all threads."""
    amd_name, nvidia_name = {16: ("x4", "128"), 8: ("x2", "64")}[size]
    pattern = rf"(global|buffer)_load_(lds_)?dword{amd_name}" if amd else rf"LDG(STS)?\.E.*{nvidia_name}"
    return size * _threads(case, amd) * sum(n for opcode, n in loop.items() if re.match(pattern, opcode))


def _instructions_per_weight(case: Case, loop: Counter, amd: bool) -> float:
    """Lane-instructions per weight. The loop may be unrolled: how many tiles it consumes is told by how much it loads,
    or, of trellis codes, by its matrix instructions."""
    if case.is_trellis:  # 64 products of 32 rows, a matrix instruction for 16 of them and 8 tokens, or AMD's 16
        products = sum(count for opcode, count in loop.items() if _MATRIX.search(opcode)) * case.num_warps
        tiles = round(products / (64 * 2 * case.block_tokens / (16 if amd else 8)))
    else:
        activation_bytes = 128 * case.block_tokens * (2 if case.is_float else 1)
        tiles = round(_loaded_bytes(case, loop, 16, amd) / (TILE_WEIGHTS * case.code.bits // 8 + activation_bytes))
    return sum(loop.values()) * _threads(case, amd) / (TILE_WEIGHTS * tiles)


def _threads(case: Case, amd: bool) -> int:
    return case.num_warps * (64 if amd else 32)


_LOAD = re.compile(r"(?:tt\.load|async_copy_global_to_local|amdg\.buffer_load)[^\n]*")
_SHAPED = re.compile(r"<(\d+)x(\d+)x(?:!tt\.ptr<)?(i8|i16|i32|f16)[,>]")


def _weight_bytes(case: Case, ttgir: str) -> float:
    """Bytes of codes and scales that one pass of the loop loads, per weight."""
    from vllm_mcmoe.kernels.triton.fields import field_count, tile_rows

    features, fields = tile_rows(case.code.number), field_count(case.code.number)
    shapes = {(features, 128): {"i8": 1}, (features, 64): {"i16": 2}, (features, fields): {"i32": 4, "f16": 2}}
    if case.is_trellis:  # without PTX a word for each of its four bytes
        shapes[32, 32] = {"i8": 1, "i32": 1}
    body = ttgir[ttgir.index("scf.for") :]
    total = 0
    for load in _LOAD.findall(body[: body.index("scf.yield")]):
        rows, columns, element = (_SHAPED.findall(load) or [(0, 0, "")])[-1]  # the result stands last
        total += int(rows) * int(columns) * shapes.get((int(rows), int(columns)), {}).get(element, 0)
    return total / TILE_WEIGHTS


def _weight_load_bytes(case: Case, loop: Counter, amd: bool) -> int:
    """The widest load that occurs often enough in the loop to carry all of its codes."""
    enough = TILE_WEIGHTS * case.code.bits // 8
    return next((size for size in (16, 8) if _loaded_bytes(case, loop, size, amd) >= enough), 4)


def _check_ring_words(ttgir: str) -> None:
    """Raises ValueError where the decoder of trellis codes would not find a ring's word, four neighbouring bytes of a
    row, in a register: matrix operands have them, and blocks of a multiple of four bytes."""
    decoders = [line for line in ttgir.splitlines() if "tt.elementwise_inline_asm" in line and "prmt" in line]
    operand = "#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>"
    block = r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[1, (?:4|8|16)\],[^\n]* order = \[1, 0\]"
    allowed = "|".join(map(re.escape, [operand, *re.findall(block, ttgir)]))
    for line in decoders:
        if not re.search(rf": tensor<32x32xi8, (?:{allowed})>", line):
            raise ValueError(
                f"the decoder is not given four bytes of a row in a register: {line[line.rindex(' : ') :]}"
            )
    if not decoders:
        raise ValueError("trellis codes are decoded without inline assembly")


def figures(target: str, case: Case) -> Figures:
    compiled = compile_case(target, case)
    amd = _is_amd(target)
    if case.is_trellis and not amd:
        _check_ring_words(compiled.asm["ttgir"])
    code, registers, spills = (_amd_code if amd else _nvidia_code)(compiled)
    instructions, labels = _instructions(code, amd)
    matrix = sorted({opcode for opcode, _ in instructions if _MATRIX.search(opcode)})
    measured = ("", "", "")
    if case.code:
        loop = _matrix_loop(instructions, labels)
        measured = (
            round(_instructions_per_weight(case, loop, amd), 2),
            _weight_bytes(case, compiled.asm["ttgir"]),
            _weight_load_bytes(case, loop, amd),
        )
    return Figures(target, case.name, registers, spills, compiled.metadata.shared, " ".join(matrix), *measured)


def _measure(job: tuple[str, Case]) -> Figures:
    return figures(*job)


def measure(
    targets: Sequence[str], only_ci: bool, processes: int, known: Mapping[tuple[str, str], Figures]
) -> list[Figures]:
    """The cases of the targets, in their order. known: figures by target and case that need not be compiled again."""
    jobs = [(target, case) for target in targets for case in cases(target, only_ci)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        compiled = pool.map(_measure, [job for job in jobs if (job[0], job[1].name) not in known])
        return [known.get((target, case.name)) or next(compiled) for target, case in jobs]


def report_path(version: str) -> Path:
    """version: of Triton, "3.8.0" or "3.8"."""
    return DOCS / f"triton_aot_{'.'.join(version.split('.')[:2])}.md"


INTRODUCTION = """# What the Triton kernels compile to, with Triton {version}

Made by `make aot-report`. No GPU is needed: Triton brings ptxas and LLVM. Nothing here was timed.
vLLM 0.32 brings Triton 3.7, vLLM 0.33 brings 3.8, and each schedules differently. The tests compile decode and the
largest tile of sm80, sm90 and gfx942, and one kernel of every other target, again, with Triton 3.9, and fail where a
figure got worse; `make rehearse-gpu` compiles with the other two. [triton_kernel.md](triton_kernel.md) explains the
kernel.

- **kernel**: tokens per tile, the widths of the layer's experts, `float` for float16 operands instead of int8, `SiLU`
  for the fused epilogue of gate_up, `clamped SiLU, biases` for gpt-oss's. Every GEMM is compiled with the default tiles
  of its architecture.
- **lane-instructions per weight**: the instructions of the loop over groups times the threads, over the weights that
  one pass consumes. Divide by the tokens to compare tiles.
- **bytes per weight**: the codes and scales that the loop loads. **bytes per weight load**: of the widest load that
  carries all codes.
- **registers**: of AMD, vector and accumulation registers together, of 512.
- **no zeros**: of checkpoints that store none (format version 2, the default); at 1 bit none has any.
- **combining**: the down projection of few tokens, whose last program of a tile adds up each token's experts.
- **trellis**: trellis codes, which NVIDIA's kernels decode by byte permutations and AMD's by the definition.
- **float16 operands at 16 tokens and 3 bits** spill on NVIDIA: three planes and both halves of the activations are more
  than 255 registers. The float variant is not the default, and its decode tiles do not spill.
- **gfx950**: Triton copies activations straight into LDS there and loads codes into registers, so that each masked
  field goes to its matrix operand through LDS, where gfx942 loads the operand once and masks it in registers. That
  costs instructions and LDS traffic, not bytes from memory. `TRITON_HIP_USE_ASYNC_COPY=0` is the switch to measure.

"""


def to_markdown(rows: Sequence[Figures], version: str) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(astuple, rows)]
    return INTRODUCTION.format(version=version) + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def read_report(path: Path) -> tuple[str, dict[tuple[str, str], Figures]]:
    """Triton's version and the rows of a report."""
    text = path.read_text()
    rows = {}
    for line in text[text.index("| --- |") :].splitlines()[1:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        types = [str, str, int, int, int, str, float, float, int]
        row = Figures(*(kind(cell) if cell else "" for kind, cell in zip(types, cells, strict=True)))
        rows[row.key] = row
    return re.search(r"Triton (\d+(?:\.\d+)+)", text)[1], rows


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(SHARED_MEMORY))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--ci", action="store_true", help="only what the tests compile")
    parser.add_argument(
        "--missing", action="store_true", help="keep the rows of this Triton's report: after cases were added"
    )
    parser.add_argument("--assembly", action="store_true", help="print the code of the decode GEMM with SiLU")
    parser.add_argument("--write", action="store_true", help="replace this Triton's report in docs/")
    parser.add_argument("--output", type=Path, help="write the report to this file instead")
    arguments = parser.parse_args()
    if arguments.assembly:
        for target in arguments.targets:
            case = next(case for case in cases(target) if case.name.endswith(", SiLU"))
            code = compile_case(target, case).asm
            print(code["amdgcn"] if _is_amd(target) else code["ptx"])
        return
    known = read_report(report_path(triton.__version__))[1] if arguments.missing else {}
    figures_of_all = measure(arguments.targets, arguments.ci, arguments.processes, known)
    report = to_markdown(figures_of_all, triton.__version__)
    output = report_path(triton.__version__) if arguments.write else arguments.output
    if output:
        output.write_text(report)
    else:
        sys.stdout.write(report)


if __name__ == "__main__":
    main()
