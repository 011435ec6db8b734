import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer

from vllm_mcmoe.calibration.model.text import load_sequences
from vllm_mcmoe.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(reference_model):
    return AutoTokenizer.from_pretrained(reference_model)


def write(path, words: int, word: str = "alpha") -> None:
    path.write_text(" ".join(f"{word}{i}" for i in range(words)))


def test_every_file_contributes_the_same_number_of_sequences(tmp_path, tokenizer):
    for name, words in (("a.txt", 400), ("b.txt", 2000), ("c.txt", 900)):
        write(tmp_path / name, words)
    loaded = load_sequences([tmp_path], tokenizer, sequences=12, length=32)
    assert loaded.tokens.shape == (12, 32)
    assert loaded.tokens.dtype == torch.int64
    assert [path.name for path in loaded.files] == ["a.txt", "b.txt", "c.txt"]
    assert loaded.file_ids.bincount().tolist() == [4, 4, 4]
    assert loaded.notice is None


def test_a_file_that_runs_out_leaves_its_share_to_the_others(tmp_path, tokenizer):
    write(tmp_path / "short.txt", 12)
    write(tmp_path / "long.txt", 2000)
    loaded = load_sequences([tmp_path / "short.txt", tmp_path / "long.txt"], tokenizer, sequences=9, length=32)
    counts = loaded.file_ids.bincount().tolist()
    assert counts[0] < 4 and sum(counts) == 9


def test_sequences_are_spread_over_the_whole_file_without_overlap(tmp_path, tokenizer):
    write(tmp_path / "a.txt", 2000)
    text = (tmp_path / "a.txt").read_text()
    stream = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    loaded = load_sequences([tmp_path / "a.txt"], tokenizer, sequences=5, length=16)
    starts = [next(i for i in range(len(stream)) if stream[i : i + 16] == row.tolist()) for row in loaded.tokens]
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert starts[0] == 0 and min(gaps) >= 16
    assert starts[-1] > 0.75 * len(stream)  # the last of 5 even parts starts at 0.8


def test_loading_twice_gives_the_same_sequences(calibration_files, tokenizer):
    first, second = (load_sequences(calibration_files, tokenizer, sequences=10, length=64) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)


def test_jsonl_documents_are_read_and_joined(tmp_path, tokenizer):
    lines = [json.dumps({"text": f"document number {i}", "url": "x"}) for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    loaded = load_sequences([tmp_path / "a.jsonl"], tokenizer, sequences=1, length=32)
    assert "document number 0" in tokenizer.decode(loaded.tokens[0])
    assert "document number 1" in tokenizer.decode(loaded.tokens[0])


CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- if message.role not in ("user", "assistant") -%}{{ raise_exception("no role " + message.role) }}{%- endif -%}
[{{ message.role }}: {{ message.content }}]
{%- endfor -%}"""


def conversation(role: str = "assistant") -> str:
    return json.dumps({"messages": [{"role": "user", "content": "hello"}, {"role": role, "content": "good day"}]})


def test_conversations_are_written_out_by_the_chat_template(tmp_path, reference_model):
    tokenizer = AutoTokenizer.from_pretrained(reference_model)
    tokenizer.chat_template = CHAT_TEMPLATE
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": "plain"}), *[conversation()] * 20]))
    loaded = load_sequences([tmp_path / "a.jsonl"], tokenizer, sequences=1, length=48)
    text = tokenizer.decode(loaded.tokens[0])
    assert text.startswith("plain")
    assert "[user: hello][assistant: good day]" in text


def test_conversations_that_cannot_be_written_out_are_refused_by_line(tmp_path, reference_model, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": "plain"}), conversation("critic")]))
    with pytest.raises(DataError, match=r"a\.jsonl:2: a conversation, and the model's tokenizer has no chat template"):
        load_sequences([tmp_path / "a.jsonl"], tokenizer)
    with_template = AutoTokenizer.from_pretrained(reference_model)
    with_template.chat_template = CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"a\.jsonl:2: the model's chat template cannot write .*: no role critic"):
        load_sequences([tmp_path / "a.jsonl"], with_template)


def test_length_is_cut_to_the_models_positions_and_says_so(tmp_path, tokenizer):
    write(tmp_path / "a.txt", 2000)
    loaded = load_sequences([tmp_path], tokenizer, sequences=2, length=512, max_position_embeddings=128)
    assert loaded.tokens.shape == (2, 128)
    assert "128 tokens instead of 512: the model has no more positions" in loaded.notice


def test_length_is_cut_to_the_longest_file_and_says_so(tmp_path, tokenizer):
    write(tmp_path / "a.txt", 10)
    loaded = load_sequences([tmp_path], tokenizer, sequences=1, length=2048)
    assert loaded.tokens.shape[1] < 100
    assert "the longest file has no more" in loaded.notice


def test_fewer_sequences_than_asked_for_are_announced(tmp_path, tokenizer):
    write(tmp_path / "a.txt", 100)
    loaded = load_sequences([tmp_path], tokenizer, sequences=1000, length=32)
    assert len(loaded.tokens) < 100
    assert f"{len(loaded.tokens)} sequences of 32 tokens instead of 1000" in loaded.notice


def test_a_file_shorter_than_one_sequence_is_left_out_by_name(tmp_path, tokenizer):
    write(tmp_path / "long.txt", 1000)
    write(tmp_path / "tiny.txt", 3)
    loaded = load_sequences([tmp_path], tokenizer, sequences=4, length=64)
    assert [path.name for path in loaded.files] == ["long.txt"]
    assert "tiny.txt" in loaded.notice


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"text": broken\n', r"a\.jsonl:2: not valid JSON"),
        ('{"text": "fine"}\n\n{"content": "x"}\n', r'a\.jsonl:3: expected an object with a "text" string'),
        ('{"text": 7}\n', r"a\.jsonl:1: expected"),
        ('["text"]\n', r"a\.jsonl:1: expected"),
        ("", r"a\.jsonl: the file has no text"),
    ],
    ids=["broken-json", "no-text-field", "text-is-a-number", "not-an-object", "empty"],
)
def test_a_bad_jsonl_file_is_refused_by_line(tmp_path, tokenizer, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_sequences([tmp_path / "a.jsonl"], tokenizer)


def test_a_missing_path_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        load_sequences([tmp_path / "nowhere.txt"], tokenizer)


def test_a_directory_without_text_files_is_refused(tmp_path, tokenizer):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl file"):
        load_sequences([tmp_path], tokenizer)


def test_an_empty_file_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"a\.txt: the file has no text"):
        load_sequences([tmp_path / "a.txt"], tokenizer)


def test_bytes_that_are_not_utf8_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8"):
        load_sequences([tmp_path / "a.txt"], tokenizer)


def test_no_path_at_all_is_refused(tokenizer):
    with pytest.raises(DataError, match="pass --data"):
        load_sequences([], tokenizer)
