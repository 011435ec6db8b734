"""Text in, token sequences out: what `--data` accepts, for calibration and for evaluation.

A path is a text file, a .jsonl file whose lines are objects with a "text" field, or with "messages" of a conversation
({"role": ..., "content": ...}; "tools" beside them), a .json file with a list of texts or of such objects, or a
directory of text and .jsonl files (not searched recursively). Conversations are written out by the model's own chat
template, as it sees them when it serves. Every file counts as one domain:
sequences are drawn evenly over the files, and inside a file evenly over its length. Nothing is random, so the same
files always give the same sequences.

Where no path is given, calibration uses the text in builtin_text/, which every model can read: its conversations are
written out plainly where the model has no chat template for them.
"""

import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_mcmoe.calibration.common.progress import Log
from vllm_mcmoe.calibration.model.description import MoeModel
from vllm_mcmoe.errors import DataError

DEFAULT_SEQUENCES = 128  # with DEFAULT_LENGTH the calibration size of the paper, section 3.2: 128 x 2048 tokens
DEFAULT_LENGTH = 2048

BUILTIN_TEXT = Path(__file__).parent / "builtin_text"  # SOURCES.md in it says what it is; 270,000 tokens

TEXT_SUFFIX, JSONL_SUFFIX, JSON_SUFFIX = ".txt", ".jsonl", ".json"  # in any case

# A file of many gigabytes is not read whole: 16 characters per wanted token are enough for any text (3-5 are usual),
# and 8 MB, which tokenise in seconds, are read in any case, so that sequences can be spread over a file.
CHARACTERS_PER_TOKEN = 16
LEAST_CHARACTERS = 8 << 20

# What chat templates that name today's date are told, so that a run may be continued on another day.
TODAY = datetime.date(2025, 1, 1)

# Messages, tools and where they are from -> text
WriteConversation = Callable[[list[Any], Any, str], str]


@dataclass(frozen=True)
class TokenSequences:
    """Token chunks of equal length, with the file each came from.

    tokens   int64 [sequences, length]
    files    the files that contributed, in order
    file_ids int64 [sequences], index into files
    notice   what was shortened and why, for the user; None when everything asked for was there
    """

    tokens: torch.Tensor
    files: tuple[Path, ...]
    file_ids: torch.Tensor
    notice: str | None


def find_data_files(paths: Sequence[str | Path] | None) -> list[Path]:
    """Files named by `--data`, directories replaced by their .txt and .jsonl files in name order; None stands for the
    built-in text.

    Raises DataError: an empty list, a path that does not exist, a directory without such files.
    """
    if paths is None:
        paths = [BUILTIN_TEXT]
    if not paths:
        raise DataError("no data given: pass --data with text files, .jsonl files or directories of them.")
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in (TEXT_SUFFIX, JSONL_SUFFIX))
            if not found:
                raise DataError(f"{path}: the directory has no {TEXT_SUFFIX} or {JSONL_SUFFIX} file.")
            files.extend(found)
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or directory.")
    return files


def is_builtin(path: Path) -> bool:
    """Whether it is a file of the text that ships with this package."""
    return path.parent.resolve() == BUILTIN_TEXT.resolve()


def name_files(files: Sequence[Path]) -> str:
    """For people: `a.txt, b.jsonl`, or `built-in (chat, ..., world)`."""
    builtin = [path.stem for path in files if is_builtin(path)]
    names = [path.name for path in files if not is_builtin(path)]
    return ", ".join(names + ([f"built-in ({', '.join(builtin)})"] if builtin else []))


def _read_jsonl(path: Path, separator: str, max_characters: int, write_conversation: WriteConversation) -> str:
    """The texts and conversations of a .jsonl file, joined by separator, up to about max_characters."""
    texts, characters = [], 0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
            texts.append(_text_of(record, f"{path}:{number}", write_conversation, or_string=False))
            characters += len(texts[-1])
            if characters >= max_characters:
                break
    return separator.join(texts)


def _text_of(record: Any, where: str, write_conversation: WriteConversation, *, or_string: bool) -> str:
    if isinstance(record, dict) and "text" not in record and isinstance(record.get("messages"), list):
        return write_conversation(record["messages"], record.get("tools"), where)
    text = record.get("text") if isinstance(record, dict) else record if or_string else None
    if not isinstance(text, str):
        expected = 'a string or an object with a "text" string' if or_string else 'an object with a "text" string'
        raise DataError(
            f'{where}: expected {expected}, found {json.dumps(record)[:60]}; a conversation has a list of "messages".'
        )
    return text


def _by_template(tokenizer: PreTrainedTokenizerBase | None, messages: list[Any], tools: Any, where: str) -> str:
    """Special tokens written out."""
    if tokenizer is None or tokenizer.chat_template is None:
        raise DataError(
            f"{where}: a conversation, and the model's tokenizer has no chat template; give texts, or write the "
            'conversations out as the model was trained on them, under "text".'
        )
    today = {"strftime_now": TODAY.strftime} if "strftime_now" in str(tokenizer.chat_template) else {}
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **today)
    except Exception as error:  # templates refuse what they do not know in their own words, or fail on it
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where}: the model's chat template cannot write out these messages: {reason}") from error


def _plainly(messages: list[Any], tools: Any, where: str) -> str:
    """As people write dialogue: `User: ...`, an empty line, `Assistant: ...`."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _why_plain(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why the tokenizer cannot write out the conversations in these files, which are built-in ones; None if it can."""
    if tokenizer.chat_template is None:
        return "the tokenizer has no chat template"
    for path in files:
        try:
            _read_jsonl(path, "", LEAST_CHARACTERS, partial(_by_template, tokenizer))
        except DataError as error:
            return str(error)
    return None


def _read_json(path: Path, separator: str, max_characters: int, write_conversation: WriteConversation) -> str:
    """The texts of a .json file, joined by separator, up to about max_characters."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON: {error}; one object per line belongs in a .jsonl file.") from None
    if not isinstance(document, list):
        raise DataError(f"{path}: expected a list of texts, found a {type(document).__name__}.")
    texts, characters = [], 0
    for number, record in enumerate(document):
        texts.append(_text_of(record, f"{path}: entry {number}", write_conversation, or_string=True))
        characters += len(texts[-1])
        if characters >= max_characters:
            break
    return separator.join(texts)


def read_text(
    path: Path,
    *,
    separator: str,
    max_characters: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plain: bool = False,
) -> str:
    """Text of one data file, at most about max_characters of it; jsonl documents are joined by separator.

    tokenizer: writes out conversations, by its chat template; where there is none, they are refused
    plain: conversations are written out without it, as dialogue

    Raises DataError: bytes that are not UTF-8, a bad jsonl line (named file:line), a conversation that cannot be
    written out, an empty file.
    """
    write_conversation = _plainly if plain else partial(_by_template, tokenizer)
    try:
        if path.suffix.lower() == JSONL_SUFFIX:
            text = _read_jsonl(path, separator, max_characters, write_conversation)
        elif path.suffix.lower() == JSON_SUFFIX:
            text = _read_json(path, separator, max_characters, write_conversation)
        else:
            with path.open(encoding="utf-8") as file:
                text = file.read(max_characters)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); expected a text or .jsonl file.") from None
    if not text.strip():
        raise DataError(f"{path}: the file has no text.")
    return text


def _tokenize_files(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, max_tokens: int, plain: bool
) -> Iterator[torch.Tensor]:
    """One int64 [tokens] tensor per file; no special tokens are added around the text. plain: built-in conversations
    are written out without a chat template."""
    separator = tokenizer.eos_token or "\n\n"
    max_characters = max(LEAST_CHARACTERS, CHARACTERS_PER_TOKEN * max_tokens)
    for path in files:
        options = {"tokenizer": tokenizer, "plain": plain and is_builtin(path)}
        text = read_text(path, separator=separator, max_characters=max_characters, **options)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield torch.tensor(ids, dtype=torch.int64)


def _share_evenly(wanted: int, available: list[int]) -> list[int]:
    """Split `wanted` over files as evenly as their `available` counts allow: the shares differ by at most one
    except where a file has run out."""
    shares = [0] * len(available)
    while wanted > 0:
        open_files = [i for i, (share, limit) in enumerate(zip(shares, available, strict=True)) if share < limit]
        if not open_files:
            break
        for i in open_files[:wanted]:
            shares[i] += 1
        wanted -= len(open_files[:wanted])
    return shares


def load_sequences(
    paths: Sequence[str | Path] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    max_position_embeddings: int | None = None,
) -> TokenSequences:
    """Draw token sequences evenly over the files, or over those of the built-in text where paths is None, without
    overlap.

    `length` is cut to the model's positions and, when no file is that long, to the longest file; fewer sequences are
    returned when the data has no more. Either is said in `notice`. A file shorter than one sequence is left out, and
    that is said too. Of the built-in text no domain is left out: `length` is cut to the shortest.

    Raises DataError as find_data_files and read_text do, and when the data has less than two tokens.
    """
    if sequences < 1 or length < 2:
        raise DataError(f"expected sequences >= 1 and length >= 2, found {sequences} and {length}.")
    files = find_data_files(paths)
    notices = []
    wanted_length = length
    if max_position_embeddings is not None and length > max_position_embeddings:
        length = max_position_embeddings
        notices.append(f"sequences of {length} tokens instead of {wanted_length}: the model has no more positions")
    why_plain = _why_plain([path for path in files if is_builtin(path)], tokenizer)
    if why_plain is not None and any(is_builtin(path) for path in files):
        notices.append(f"built-in conversations are written out as plain dialogue: {why_plain.rstrip('.')}")
    streams = list(_tokenize_files(files, tokenizer, sequences * length, plain=why_plain is not None))
    longest = max(len(stream) for stream in streams)
    if longest < 2:
        raise DataError(f"{', '.join(map(str, files))}: less than two tokens of text.")
    shortest_builtin = min((len(s) for s, path in zip(streams, files, strict=True) if is_builtin(path)), default=length)
    if shortest_builtin < length:
        length = shortest_builtin
        notices.append(f"sequences of {length} tokens instead of {wanted_length}: a built-in domain has no more")
    elif longest < length:
        length = longest
        notices.append(f"sequences of {length} tokens instead of {wanted_length}: the longest file has no more")
    available = [len(stream) // length for stream in streams]
    left_out = [path.name for path, count in zip(files, available, strict=True) if count == 0]
    if left_out:
        notices.append(f"left out, shorter than {length} tokens: {', '.join(left_out)}")
    shares = _share_evenly(sequences, available)
    if sum(shares) < sequences:
        notices.append(f"{sum(shares)} sequences of {length} tokens instead of {sequences}: the data has no more")
    return _cut(files, streams, shares, available, length, "; ".join(notices) or None)


def _cut(
    files: list[Path],
    streams: list[torch.Tensor],
    shares: list[int],
    available: list[int],
    length: int,
    notice: str | None,
) -> TokenSequences:
    """Take shares[i] of the available[i] chunks of file i, spread evenly over the file."""
    chunks, file_ids, used = [], [], []
    for path, stream, share, count in zip(files, streams, shares, available, strict=True):
        if share == 0:
            continue
        for position in range(share):
            start = (position * count // share) * length
            chunks.append(stream[start : start + length])
        file_ids.extend([len(used)] * share)
        used.append(path)
    return TokenSequences(torch.stack(chunks), tuple(used), torch.tensor(file_ids), notice)


def load_calibration_data(
    description: MoeModel, data: Sequence[str | Path] | None, sequences: int, length: int, log: Log
) -> TokenSequences:
    """Token sequences of the files for this model, with its own tokenizer; that they are of the built-in text, and what
    was shortened, is logged. Whatever a model on the hub has beside weights is here afterwards."""
    description.folder.fetch_side_files()
    tokens = load_sequences(
        data,
        load_tokenizer(description.path),
        sequences=sequences,
        length=length,
        max_position_embeddings=description.config.max_position_embeddings,
    )
    largest, vocabulary = int(tokens.tokens.max()), description.config.vocab_size
    if largest >= vocabulary:
        raise DataError(
            f"{description.path}: its tokenizer makes token {largest} of the text, and the model has embeddings of "
            f"{vocabulary} tokens only. Tokens were added to the tokenizer and not to the model: resize its "
            "embeddings, or use the tokenizer that it was trained with."
        )
    if any(map(is_builtin, tokens.files)):
        count, length = tokens.tokens.shape
        log(f"Text: {name_files(tokens.files)}, {count} sequences of {length} tokens; --data takes your own.")
    if tokens.notice:
        log(f"Data: {tokens.notice}.")
    return tokens


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a missing or damaged file ends in errors of many kinds
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{path}: its tokenizer cannot be loaded; are tokenizer.json and the like there? {reason}"
        ) from error
