"""Calibration text where --data is left out: what is in it, and that every model can read it."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.calibration.conftest import LENGTH
from tests.calibration.test_data import CHAT_TEMPLATE
from vllm_mcmoe.calibration.model.text import BUILTIN_TEXT, find_data_files, is_builtin, load_sequences, read_text
from vllm_mcmoe.calibration.pipeline import calibrate, quantize
from vllm_mcmoe.calibration.prune.prune import prune

ROOT = Path(__file__).parents[2]
DOMAINS = ["chat", "documentation", "european", "literature", "python", "science", "systems", "web", "world"]
SMALL = {"sequences": len(DOMAINS), "length": LENGTH, "show_progress": False}


@pytest.fixture
def tokenizer(reference_model):
    return AutoTokenizer.from_pretrained(reference_model)


def records(domain: str) -> list[dict]:
    return [json.loads(line) for line in (BUILTIN_TEXT / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()]


def plain_text() -> dict[str, str]:
    return {
        path.stem: read_text(path, separator="\n\n", max_characters=10**9, plain=True) for path in find_data_files(None)
    }


def test_nine_domains_of_a_hundred_thousand_characters():
    texts = plain_text()
    assert list(texts) == DOMAINS
    assert all(80_000 < len(text) < 150_000 for text in texts.values())


def test_no_data_at_all_means_the_builtin_text(tokenizer):
    assert [path.stem for path in find_data_files(None)] == DOMAINS
    assert all(map(is_builtin, find_data_files(None)))
    loaded = load_sequences(None, tokenizer, sequences=45, length=64)
    assert loaded.file_ids.bincount().tolist() == [5] * 9


def test_the_default_number_and_length_of_sequences_is_there(tokenizer):
    loaded = load_sequences(None, tokenizer)
    assert loaded.tokens.shape == (128, 2048)
    assert loaded.file_ids.bincount().min() >= 14


def word_shingles(text: str, length: int) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_nothing_of_the_reference_models_evaluation_text_is_in_it(evaluation_files):
    """Runs of 13 words, as is usual for contamination; that the measure finds them is shown on a copy."""
    evaluation = set().union(*(word_shingles(file.read_text(), 13) for file in evaluation_files))
    assert len(evaluation) > 30_000
    for domain, text in plain_text().items():
        assert not word_shingles(text, 13) & evaluation, domain
    copied = text[:50_000] + evaluation_files[0].read_text()[3000:3200] + text[50_000:]
    assert word_shingles(copied, 13) & evaluation


def test_every_document_and_conversation_is_unlike_every_other():
    seen = [json.dumps(record) for domain in DOMAINS for record in records(domain)]
    assert len(set(seen)) == len(seen) > 200


def test_conversations_alternate_between_user_and_assistant_as_every_template_allows():
    conversations = [record["messages"] for record in records("chat")]
    assert len(conversations) > 80
    assert sum(len(messages) > 2 for messages in conversations) > 20
    for messages in conversations:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)


def test_conversations_go_through_the_models_chat_template(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    loaded = load_sequences([BUILTIN_TEXT / "chat.jsonl"], tokenizer, sequences=1, length=64)
    assert tokenizer.decode(loaded.tokens[0]).startswith("[user: A train leaves")
    assert loaded.notice is None


def test_without_a_chat_template_conversations_are_written_out_as_dialogue_and_that_is_said(tokenizer):
    loaded = load_sequences([BUILTIN_TEXT / "chat.jsonl"], tokenizer, sequences=1, length=64)
    assert tokenizer.decode(loaded.tokens[0]).startswith("User: A train leaves")
    assert "plain dialogue: the tokenizer has no chat template" in loaded.notice


def test_a_template_that_refuses_them_is_gone_without_and_that_is_said(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('system message expected') }}"
    loaded = load_sequences([BUILTIN_TEXT / "chat.jsonl"], tokenizer, sequences=1, length=64)
    assert tokenizer.decode(loaded.tokens[0]).startswith("User: A train leaves")
    assert re.search(r"plain dialogue: .*chat\.jsonl:1: .*system message expected", loaded.notice)


def test_a_template_that_names_the_date_gives_the_same_tokens_tomorrow(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}"
    loaded = load_sequences([BUILTIN_TEXT / "chat.jsonl"], tokenizer, sequences=1, length=64)
    assert tokenizer.decode(loaded.tokens[0]).startswith("01 January 2025: A train leaves")


def test_sequences_longer_than_a_domain_are_cut_so_that_none_is_left_out(tokenizer):
    loaded = load_sequences(None, tokenizer, sequences=100, length=10**6)
    assert [path.stem for path in loaded.files] == DOMAINS
    assert loaded.file_ids.bincount().min() >= 1
    assert re.search(r"sequences of \d+ tokens instead of 1000000: a built-in domain has no more", loaded.notice)
    assert f"{len(loaded.tokens)} sequences of {loaded.tokens.shape[1]} tokens instead of 100" in loaded.notice


def test_more_sequences_than_it_has_are_announced(tokenizer):
    loaded = load_sequences(None, tokenizer, sequences=10**6, length=2048)
    assert 128 < len(loaded.tokens) < 1000
    assert f"{len(loaded.tokens)} sequences of 2048 tokens instead of 1000000" in loaded.notice


def test_every_source_and_licence_is_stated():
    sources = (BUILTIN_TEXT / "SOURCES.md").read_text()
    for domain in DOMAINS:
        size = (BUILTIN_TEXT / f"{domain}.jsonl").stat().st_size
        assert re.search(rf"^\| {domain} \| {len(records(domain))} \| {size:,} \| \S", sources, re.MULTILINE), domain
    packages = re.findall(r"^\| ((?:Debian|npm|PyPI) \S+ \S+) \| [^|]+ \| ([^|]+) \|$", sources, re.MULTILINE)
    assert len(packages) > 15
    notices = (BUILTIN_TEXT / "LICENSES.md").read_text()
    assert [name for name, licence in packages if "public domain (" not in licence and f"## {name}\n" not in notices
            and licence != "public domain"] == []  # fmt: skip


def test_it_ships_in_the_wheel(tmp_path):
    """Built from a copy, for building writes beside the sources."""
    copy = shutil.copytree(
        ROOT, tmp_path / "checkout", symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "tests")
    )
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = "vllm_mcmoe/calibration/model/builtin_text"
    assert {f"{folder}/{path.name}" for path in BUILTIN_TEXT.iterdir()} <= names
    assert f"{folder}/SOURCES.md" in names and f"{folder}/LICENSES.md" in names


def test_quantising_without_data_says_what_it_calibrated_on(reference_model, tmp_path, quick_recipe):
    messages: list[str] = []
    out = tmp_path / "out"
    quantize(
        reference_model,
        out,
        bits=2.5,
        recipe=quick_recipe,
        evaluation_data=[BUILTIN_TEXT],
        log=messages.append,
        **SMALL,
    )
    named = f"built-in ({', '.join(DOMAINS)})"
    assert any(line.startswith(f"Text: {named}, {len(DOMAINS)} sequences of {LENGTH} tokens") for line in messages)
    card = (out / "README.md").read_text()
    assert f"| calibration text | {named} |" in card
    assert "of the calibration text, so somewhat flattering" in card
    factors = calibrate(reference_model, recipe="paper-code", **SMALL)
    assert factors.tokens == len(DOMAINS) * LENGTH
    assert len(prune(out, method="odp", evaluation_data=[BUILTIN_TEXT], **SMALL)) == 2


def test_text_of_ones_own_is_named_in_the_card(mixed_checkpoint, calibration_files):
    card = (mixed_checkpoint / "README.md").read_text()
    assert f"| calibration text | {', '.join(file.name for file in calibration_files)} |" in card
