"""Mutated files, as users' disks and editors make them; the same seed gives the same mutations."""

import json
import random
import struct
from pathlib import Path
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**9, 2**63, 1.5, -0.5, 1e308, "", "x", "3", [], [0], [None], {}, {"x": 1}, [[1]],
)  # fmt: skip


def _places(document: Any, at: tuple = ()) -> list[tuple]:
    """Paths of all values inside a JSON document."""
    if isinstance(document, dict):
        inner = [place for key, value in document.items() for place in _places(value, (*at, key))]
    elif isinstance(document, list):
        ends = {0, len(document) - 1} if document else set()
        inner = [place for index in sorted(ends) for place in _places(document[index], (*at, index))]
    else:
        inner = []
    return [at, *inner]


def _holder(document: Any, place: tuple) -> Any:
    for key in place[:-1]:
        document = document[key]
    return document


def mutated_document(document: Any, chance: random.Random) -> Any:
    """One value replaced, removed, repeated or renamed."""
    document = json.loads(json.dumps(document))
    place = chance.choice(_places(document))
    if not place:
        return chance.choice(STRANGE)
    holder, key = _holder(document, place), place[-1]
    kind = chance.choice(("replace", "replace", "replace", "remove", "number", "repeat"))
    if kind == "remove":
        del holder[key]
    elif kind == "number" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        value = holder[key]
        holder[key] = chance.choice((value + 1, value - 1, -value, value * 1000, float(value)))
    elif kind == "repeat" and isinstance(holder, list):
        holder.append(holder[key])
    elif kind == "repeat":
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = chance.choice(STRANGE)
    return document


def mutated_text(text: str, chance: random.Random) -> bytes:
    """A JSON file damaged as bytes: cut short, emptied, with other bytes in it; or one value of it changed."""
    kind = chance.choice(("value", "value", "value", "value", "cut", "empty", "bytes", "array"))
    data = text.encode()
    if kind == "value":
        return json.dumps(mutated_document(json.loads(text), chance)).encode()
    if kind == "cut":
        return data[: chance.randrange(len(data))]
    if kind == "bytes":
        at = chance.randrange(len(data))
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    return b"" if kind == "empty" else b"[1, 2]"


def mutated_safetensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header says something else, or which is damaged as bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = chance.choice(("header", "header", "header", "cut", "length", "rename", "dtype", "bytes"))
    if kind == "cut":
        return data[: chance.randrange(len(data))]
    if kind == "length":
        return struct.pack("<Q", chance.choice((0, 1, length + 1, 2**40, 2**63))) + data[8:]
    if kind == "bytes":
        at = chance.randrange(8 + length)
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    names = [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    if kind == "rename":
        header[name + chance.choice(("x", ".1", ""))[:2]] = header.pop(name)
    elif kind == "dtype":
        header[name]["dtype"] = chance.choice(("F32", "I8", "BF16", "F16", "U8", "I64", "F4", "BOOL"))
    else:
        header = mutated_document(header, chance)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + rest


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Cut short, grown, or with another byte in it."""
    kind, at = chance.choice(("cut", "grow", "byte")), chance.randrange(len(data))
    if kind == "cut":
        return data[:at]
    if kind == "grow":
        return data + b"\0"
    return data[:at] + bytes([data[at] ^ (1 + chance.randrange(255))]) + data[at + 1 :]


def mutate_file(path: Path, chance: random.Random) -> None:
    if path.suffix == ".safetensors":
        path.write_bytes(mutated_safetensors(path.read_bytes(), chance))
    elif path.suffix == ".f32":
        path.write_bytes(mutated_bytes(path.read_bytes(), chance))
    else:
        path.write_bytes(mutated_text(path.read_text(), chance))
