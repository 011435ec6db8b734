"""A layer's records on disk: the same experts, mapped read-only, or an error that says what is wrong with the file."""

import hashlib
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.kernels.matrices import random_call, random_layer
from vllm_mcmoe.kernels.cpu import LAYOUT_VERSION, CpuExperts, RecordsError, remove_abandoned
from vllm_mcmoe.kernels.cpu.layout import ROWS, expert_record, gate_up_row_blocks, matrix_bytes, repack
from vllm_mcmoe.kernels.cpu.records_file import RecordsWriter
from vllm_mcmoe.kernels.cpu.threads import thread_pool
from vllm_mcmoe.kernels.packing import CODES, GROUP_SIZE, Code, StoredMatrix, packed_bytes_per_group
from vllm_mcmoe.kernels.trellis import stored_matrix

HIDDEN, INTERMEDIATE = 384, 256
MIXED = list(CODES)
KEY = {"checkpoint": "/models/some", "layer": "model.layers.0.mlp.experts", "experts": (0, 1, 2, 3, 4)}
BUFFERS = ("gate_up", "gate_up_table", "down", "down_table")


def layer() -> dict:
    return random_layer(MIXED, MIXED[::-1], HIDDEN, INTERMEDIATE)


def announced() -> dict:
    return {name: value for name, value in layer().items() if name not in ("gate_up", "down")}


def write(file: Path) -> CpuExperts:
    return CpuExperts.prepare(**layer(), file=file, key=KEY)


def read(file: Path, **changes) -> CpuExperts:
    return CpuExperts.from_file(file, **({"key": KEY} | announced() | changes))


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "cache" / "layer.records"


def mappings(file: Path) -> list[tuple[str, dict[str, int]]]:
    """Permissions and figures in kB of every mapping this process has of a file."""
    found, fields = [], None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        parts = line.split()
        if not parts[0].endswith(":"):
            fields = None
            if len(parts) > 5 and parts[5].startswith(str(file)):
                fields = {}
                found.append((parts[1], fields))
        elif fields is not None and parts[-1] == "kB":
            fields[parts[0][:-1]] = int(parts[1])
    return found


def test_what_is_written_and_what_is_read_equals_what_is_repacked_into_memory(file):
    in_memory, written, found = CpuExperts.prepare(**layer()), write(file), read(file)
    call = random_call(7, HIDDEN, len(MIXED), 2)
    for other in (written, found):
        assert all(torch.equal(getattr(in_memory, name), getattr(other, name)) for name in BUFFERS)
        assert torch.equal(in_memory(*call), other(*call))


@pytest.mark.parametrize("way", [write, read])
def test_records_are_shared_pages_and_no_private_copy(file, way):
    write(file)
    experts = way(file)
    experts(*random_call(7, HIDDEN, len(MIXED), 2))
    ((permissions, figures),) = mappings(file)
    assert permissions == "r--s"
    assert figures["Rss"] > 0
    assert figures["Anonymous"] == 0


@pytest.mark.parametrize("way", ["write", "read"])
def test_writing_to_the_records_kills_the_process_and_leaves_the_file_alone(file, way):
    """torch would let a stray operator write; the page tables do not."""
    write(file)
    before = file.read_bytes()
    script = f"""
    from pathlib import Path
    from tests.kernels import test_records_file
    test_records_file.{way}(Path({str(file)!r})).gate_up[0] = 1
    """
    assert python(script).returncode == -signal.SIGSEGV
    assert file.read_bytes() == before


def test_experts_go_on_when_their_file_is_deleted_or_replaced(file):
    write(file)
    experts, expected = read(file), CpuExperts.prepare(**layer())
    file.unlink()
    file.write_bytes(b"something else")
    assert torch.equal(experts.gate_up, expected.gate_up)
    assert torch.equal(experts.down, expected.down)


def flip(position: int):
    def damage(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[position] ^= 0x10
        return bytes(changed)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "begins with .* expected b'mcmoerec'"),
        (lambda content: b"safetens" + content[8:], "begins with b'safetens', expected b'mcmoerec'"),
        (lambda content: content[:30], "header does not match the header's checksum"),
        (lambda content: content[:200], "header does not match the header's checksum"),
        (flip(8), "header does not match the header's checksum"),
        (flip(15), "header does not match the header's checksum"),
        (flip(20), "header does not match the header's checksum"),
        (flip(100), "header does not match the header's checksum"),
        (lambda content: content[:-1], "bytes, expected"),
        (lambda content: content[: len(content) // 2], "bytes, expected"),
        (lambda content: content + b"\0", "bytes, expected"),
        (flip(-1), "checksum of down, matrix 8, does not match"),
        (lambda content: content[:-4096] + bytes(4096), "checksum of down, matrix 8, does not match"),
    ],
)
def test_damage_is_noticed(file, damage, message):
    write(file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RecordsError, match=message):
        read(file)


@pytest.mark.parametrize("name", ["gate_up", "down"])
@pytest.mark.parametrize("expert", range(len(MIXED)))
def test_a_changed_byte_of_any_expert_is_noticed(file, name, expert):
    experts = write(file)
    records = getattr(experts, name).numpy().tobytes()
    start = file.read_bytes().index(records)
    offset = int(getattr(experts, f"{name}_table")[expert, 1])
    file.write_bytes(flip(start + offset)(file.read_bytes()))
    with pytest.raises(RecordsError, match=f"checksum of {name}, matrix {expert}, does not match"):
        read(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": KEY | {"checkpoint": "/models/other"}},
        {"key": KEY | {"experts": (0, 1, 2, 3, 5)}},
        {"gate_up_codes": MIXED[::-1]},
        {"down_codes": MIXED[::-1][:4]},
        {"intermediate_size": 128},
    ],
)
def test_a_file_made_for_something_else_is_not_used(file, changes):
    write(file)
    with pytest.raises(RecordsError, match="made from another checkpoint, for another part of one, or by another ver"):
        read(file, **changes)


def test_a_missing_file_is_an_os_error(file):
    with pytest.raises(FileNotFoundError):
        read(file)


def test_a_person_can_read_what_a_file_was_made_from(file):
    write(file)
    head = file.read_bytes()[:1000].decode(errors="replace")
    assert '"checkpoint": "/models/some"' in head
    assert '"layer": "model.layers.0.mlp.experts"' in head


def test_the_file_has_its_name_only_when_it_is_complete(file):
    seen = []

    def watched(matrices):
        for matrix in matrices:
            seen.append([path.name for path in file.parent.iterdir()])
            yield matrix

    expected = layer()
    CpuExperts.prepare(**(expected | {"down": watched(expected["down"])}), file=file, key=KEY)
    assert len(seen) == len(MIXED)
    assert all(len(names) == 1 and names[0].endswith(".partial") for names in seen)
    assert list(file.parent.iterdir()) == [file]


def test_a_failed_repack_leaves_nothing_behind(file):
    with pytest.raises(ValueError, match="down: 9 codes were given, but only 1 matrices"):
        CpuExperts.prepare(**(layer() | {"down": layer()["down"][:1]}), file=file, key=KEY)
    assert list(file.parent.iterdir()) == []


def python(script: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, **options
    )


def test_a_file_that_may_not_grow_is_an_os_error_and_no_dead_process(file):
    """Storing to a mapping that has no disk behind it would be SIGBUS."""
    script = f"""
    from pathlib import Path
    from tests.kernels import test_records_file
    try:
        test_records_file.write(Path({str(file)!r}))
    except OSError as error:
        print(error.strerror)
    """
    limited = python(script, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18)))
    assert limited.stdout == "File too large\n", limited.stderr
    assert list(file.parent.iterdir()) == []


def test_a_full_disk_is_an_os_error_and_leaves_nothing_behind(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system of its own for this test: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            write(tmp_path / "layer.records")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def filled_writer(file: Path) -> RecordsWriter:
    writer = RecordsWriter(file, KEY, {"only": [4096]})
    writer.matrix("only", 0).fill_(7)
    writer.filled("only", 0)
    return writer


def test_the_slower_of_two_writers_takes_the_fasters_file(file):
    with filled_writer(file) as first, filled_writer(file) as second:
        kept = [first.publish()]
        inode = file.stat().st_ino
        kept.append(second.publish())
    assert file.stat().st_ino == inode
    assert list(file.parent.iterdir()) == [file]
    assert [permissions for permissions, _ in mappings(file)] == ["r--s", "r--s"]
    assert all(torch.equal(buffers["only"], torch.full((4096,), 7, dtype=torch.uint8)) for buffers in kept)


@pytest.mark.parametrize("position", [100, -1], ids=["header", "records"])
def test_a_damaged_file_is_replaced(file, position):
    write(file)
    file.write_bytes(flip(position)(file.read_bytes()))
    written = write(file)
    for experts in (written, read(file)):
        assert torch.equal(experts.down, CpuExperts.prepare(**layer()).down)


def test_processes_that_write_the_same_file_at_once_all_get_the_experts(file):
    script = f"""
    import hashlib, sys
    from pathlib import Path
    from tests.kernels import test_records_file
    sys.stdin.readline()  # all are ready
    for _ in range(20):
        experts = test_records_file.write(Path({str(file)!r}))
        print(hashlib.sha256(experts.gate_up.numpy().tobytes() + experts.down.numpy().tobytes()).hexdigest())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    expected = CpuExperts.prepare(**layer())
    digest = hashlib.sha256(expected.gate_up.numpy().tobytes() + expected.down.numpy().tobytes()).hexdigest()
    for process in processes:
        assert process.communicate()[0].split() == [digest] * 20
        assert process.returncode == 0
    assert list(file.parent.iterdir()) == [file]
    assert torch.equal(read(file).gate_up, expected.gate_up)


def test_what_a_killed_writer_leaves_is_removed_and_what_a_living_one_writes_is_not(file):
    script = f"""
    import os, signal
    from pathlib import Path
    from tests.kernels import test_records_file
    writer = test_records_file.filled_writer(Path({str(file)!r}))
    os.kill(os.getpid(), signal.SIGKILL)
    """
    assert python(script).returncode == -signal.SIGKILL
    (abandoned,) = file.parent.iterdir()
    with filled_writer(file) as living:
        assert remove_abandoned(file.parent) == [abandoned]
        living.publish()
    assert list(file.parent.iterdir()) == [file]


def test_records_on_disk_are_those_of_this_layout_version():
    """Fails when the layout changes: raise LAYOUT_VERSION, or files of before are taken for files of now."""
    expected = {2: "d5164aac898d17748ead1c120c6f05db871a296cee59f66179fc601ae93b16a0"}
    digest = hashlib.sha256()
    for shape, row_blocks in (
        ((256, 256), gate_up_row_blocks(128, 2)),
        ((256, 128), torch.arange(256 // ROWS).numpy()),
    ):
        for code in CODES:
            records = torch.zeros(matrix_bytes(expert_record(code, stored_zeros=True), *shape), dtype=torch.uint8)
            repack(counting_matrix(code, *shape), row_blocks, records)
            digest.update(records.numpy().tobytes())
    assert expected.get(LAYOUT_VERSION) == digest.hexdigest()


def counting_matrix(code: Code, rows: int, columns: int) -> StoredMatrix:
    """Bytes that count up in steps that no power of two divides, the same on every machine and in every release."""
    groups = (rows, columns // GROUP_SIZE)

    def count(*shape: int) -> torch.Tensor:
        return torch.arange(math.prod(shape)).mul(37).remainder(251).reshape(shape)

    qweight, scales = count(*groups, packed_bytes_per_group(code.bits)).to(torch.uint8), count(*groups).half()
    return stored_matrix(code, qweight, scales, (count(*groups) + 1).half() if code.bits > 1 else None)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_threads_of_a_pool_run_on_the_cpus_of_torchs_team():
    """vLLM binds the thread that starts them to one CPU, which new threads inherit."""
    script = """
    import os, torch
    from vllm_mcmoe.kernels.cpu.threads import thread_pool
    torch.ones(1 << 20).sum()  # the team exists
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    with thread_pool() as pool:
        assert all(pool.submit(os.sched_getaffinity, 0).result() == cpus for _ in range(2))
    """
    bound = python(script, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert bound.returncode == 0, bound.stderr


def test_a_pool_has_as_many_threads_as_torch():
    with thread_pool() as pool:
        assert pool._max_workers == torch.get_num_threads()
