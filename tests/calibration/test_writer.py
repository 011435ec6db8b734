import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from vllm_mcmoe.calibration.checkpoint.writer import Shard, copy_side_files, shard_name, write_index
from vllm_mcmoe.calibration.matrix.grids import quantize_rtn
from vllm_mcmoe.checkpoint import matrix_of, matrix_tensors, tensor_dtypes, tensor_shape
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import Code, PackedMatrix, StoredMatrix
from vllm_mcmoe.kernels.trellis import TrellisMatrix


def names_in(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_shards_are_named_as_transformers_names_them():
    assert [shard_name(i, 3) for i in range(3)] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_shard_holds_its_tensors_and_nothing_else_is_written(tmp_path):
    shard = Shard()
    shard.add("t", torch.arange(4.0))
    shard.add("transposed", torch.arange(6).view(2, 3).t())
    shard.write(tmp_path / "shard.safetensors")
    written = load_file(tmp_path / "shard.safetensors")
    assert torch.equal(written["t"], torch.arange(4.0))
    assert torch.equal(written["transposed"], torch.arange(6).view(2, 3).t())
    assert names_in(tmp_path) == ["shard.safetensors"]
    assert shard.nbytes == {"t": 16, "transposed": 48}


def test_the_index_names_every_tensors_file_and_the_bytes_of_all(tmp_path):
    write_index(tmp_path, {"a.safetensors": {"t": 16, "u": 4}, "b.safetensors": {"v": 8}})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"t": "a.safetensors", "u": "a.safetensors", "v": "b.safetensors"}
    assert index["metadata"]["total_size"] == 28


def test_a_name_written_twice_is_refused(tmp_path):
    shard = Shard()
    shard.add("t", torch.zeros(4))
    with pytest.raises(FormatError, match="tensor t would be written twice"):
        shard.add("t", torch.zeros(4))
    with pytest.raises(FormatError, match="tensor t would be written twice"):
        write_index(tmp_path, {"a": {"t": 16}, "b": {"t": 16}})


def quantized(bits: int, metadata: str) -> PackedMatrix:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    return quantize_rtn(weight, bits, metadata=metadata).pack()


@pytest.mark.parametrize(
    ("bits", "suffixes", "nbytes"),
    [(1, ["qweight", "scales"], 8 * (32 + 4)), (3, ["qweight", "scales", "zeros"], 8 * (96 + 4 + 4))],
)
def test_matrices_of_version_1_get_their_suffixes_and_one_bit_stores_no_zeros(bits, suffixes, nbytes):
    shard = Shard()
    shard.add_matrix("e.w1", quantized(bits, "float16"), version=1)
    assert list(shard.nbytes) == [f"e.w1.{suffix}" for suffix in suffixes]
    assert sum(shard.nbytes.values()) == nbytes


@pytest.mark.parametrize("bits", [1, 3])
def test_matrices_of_version_2_have_a_byte_per_group_and_one_per_row(bits):
    shard, matrix = Shard(), quantized(bits, "float8")
    shard.add_matrix("e.w1", matrix, version=2)
    assert shard.nbytes == {"e.w1.qweight": 8 * 32 * bits, "e.w1.scales": 8 * 2, "e.w1.exponents": 8}


def matrix_of_code(code: Code, version: int) -> StoredMatrix:
    scalar = quantized(code.bits, "float16" if version == 1 else "float8")
    return TrellisMatrix(code.bits, scalar.qweight, scalar.scales) if code.kind == "trellis" else scalar


@pytest.mark.parametrize(
    ("code", "version"),
    [*itertools.product(map(Code, [1, 2, 8]), [1, 2, 3]), (Code(1, "trellis"), 3), (Code(3, "trellis"), 3)],
)
def test_a_matrix_is_read_as_it_was_written(code, version):
    matrix = matrix_of_code(code, version)
    tensors = matrix_tensors(matrix, version)
    names = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16"}
    assert {suffix: names[tensor.dtype] for suffix, tensor in tensors.items()} == tensor_dtypes(code, version)
    assert all(tuple(t.shape) == tensor_shape(suffix, code, 8, 2) for suffix, t in tensors.items())
    found = matrix_of(code, version, tensors.__getitem__)
    assert type(found) is type(matrix) and found.code == code
    assert torch.equal(found.dequantize(), matrix.dequantize())


@pytest.mark.parametrize("version", [1, 2])
def test_trellis_codes_have_no_place_before_version_3(version):
    with pytest.raises(ValueError, match=f"format version {version} has no trellis codes"):
        matrix_tensors(matrix_of_code(Code(2, "trellis"), version), version)


def test_zeros_have_no_place_in_version_2():
    with pytest.raises(ValueError, match="stores qweight, scales, exponents"):
        matrix_tensors(dataclasses.replace(quantized(2, "float8"), zeros=torch.ones(8, 2).half()), 2)


@pytest.mark.parametrize(("version", "smallest"), [(1, "6.1e-05"), (2, "1.9e-06")])
@pytest.mark.parametrize("scale", [1e-6, float("inf")])
def test_scales_that_the_format_cannot_hold_are_refused(scale, version, smallest):
    scales = torch.full((8, 1), scale).half()
    matrix = PackedMatrix(1, torch.zeros(8, 1, 16, dtype=torch.uint8), scales, None)
    with pytest.raises(FormatError, match=rf"e\.w1\.scales: .* smallest that the format has, {smallest}"):
        Shard().add_matrix("e.w1", matrix, version)


def test_side_files_are_copied_and_weights_are_not(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "config.json", "README.md"):
        (model / name).write_text(name)
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        (model / name).write_text(name)
    copy_side_files(model, out)
    assert names_in(out) == ["chat_template.jinja", "generation_config.json", "tokenizer.json"]
