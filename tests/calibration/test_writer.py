import json

import pytest
import torch
from safetensors.torch import load_file

from vllm_mcmoe.calibration.quantizers import quantize_rtn
from vllm_mcmoe.calibration.writer import writing_checkpoint
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import PackedMatrix


def names_in(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_tensors_are_spread_over_shards_that_the_index_names(tmp_path):
    tensors = {f"t{i}": torch.full((256,), float(i)) for i in range(5)}
    with writing_checkpoint(tmp_path / "out", shard_bytes=2048) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names_in(tmp_path / "out") == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 1024
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / "out" / index["weight_map"][name])[name], tensor)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    with writing_checkpoint(tmp_path / "out", shard_bytes=100) as writer:
        writer.add("small", torch.zeros(4))
        writer.add("large", torch.zeros(400))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), writing_checkpoint(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(4))
        raise RuntimeError("half way")
    assert names_in(tmp_path) == []


def test_nothing_has_the_final_name_before_the_end(tmp_path):
    with writing_checkpoint(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(4))
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").is_dir()


def test_others_may_read_the_directory(tmp_path):
    with writing_checkpoint(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(4))
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_directory_with_anything_in_it_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with (
        pytest.raises(FormatError, match="out exists and is not an empty directory"),
        writing_checkpoint(tmp_path / "out"),
    ):
        pass
    assert names_in(tmp_path / "out") == ["precious"]


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with writing_checkpoint(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(4))
    assert "model-00001-of-00001.safetensors" in names_in(tmp_path / "out")


def test_a_name_written_twice_is_refused(tmp_path):
    with (
        pytest.raises(FormatError, match="tensor t would be written twice"),
        writing_checkpoint(tmp_path / "out") as writer,
    ):
        writer.add("t", torch.zeros(4))
        writer.add("t", torch.zeros(4))


@pytest.mark.parametrize("bits", [1, 3])
def test_matrices_get_their_suffixes_and_one_bit_stores_no_zeros(tmp_path, bits):
    matrix = quantize_rtn(torch.randn(8, 128), bits).pack()
    with writing_checkpoint(tmp_path / "out") as writer:
        writer.add_matrix("e.w1", matrix)
        suffixes = ["qweight", "scales"] if bits == 1 else ["qweight", "scales", "zeros"]
        assert list(writer.nbytes) == [f"e.w1.{suffix}" for suffix in suffixes]
        assert sum(writer.nbytes.values()) == matrix.nbytes


@pytest.mark.parametrize("scale", [1e-6, float("inf")])
def test_scales_that_fp16_cannot_hold_are_refused(tmp_path, scale):
    scales = torch.full((8, 1), scale).half()
    matrix = PackedMatrix(1, torch.zeros(8, 1, 16, dtype=torch.uint8), scales, None)
    with (
        pytest.raises(FormatError, match=r"e\.w1\.scales: .* smallest normal"),
        writing_checkpoint(tmp_path / "out") as writer,
    ):
        writer.add_matrix("e.w1", matrix)


def test_side_files_are_copied_and_weights_are_not(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "config.json", "README.md"):
        (model / name).write_text(name)
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        (model / name).write_text(name)
    with writing_checkpoint(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(4))
        writer.copy_side_files(model)
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} < set(names_in(tmp_path / "out"))
    assert not {"config.json", "README.md", "model.safetensors", "pytorch_model.bin"} & set(names_in(tmp_path / "out"))
