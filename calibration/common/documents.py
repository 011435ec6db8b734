"""JSON files that people and other programs may write: read with errors that say where, written whole or not at all."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_mcmoe.calibration.common.files import write_atomically
from vllm_mcmoe.errors import FormatError
from vllm_mcmoe.kernels.packing import WIDTHS

FORMAT_VERSION = 1  # of factors.json and plan.json

PerWidth = dict[int, list[float]]  # bit-width -> one value per expert


class Reader:
    """Checks of decoded JSON whose errors say where: file, then layer, then key."""

    def __init__(self, where: str):
        self.where = where

    def within(self, part: str) -> "Reader":
        return Reader(f"{self.where}: {part}")

    def fail(self, key: str, found: str, expected: str) -> None:
        raise FormatError(f"{self.where}: {key}: found {found}, expected {expected}")

    def header(self, document: Any, kind: str) -> dict[str, Any]:
        top = self.mapping(document, kind)
        version = top.pop("format_version", None)
        if version != FORMAT_VERSION:
            hint = "; upgrade vllm-mcmoe to read it" if isinstance(version, int) and version > 1 else ""
            self.fail("format_version", repr(version), f"{FORMAT_VERSION}{hint}")
        return top

    def mapping(self, value: Any, key: str) -> dict[str, Any]:
        return dict(self.instance(value, dict, key))

    def instance(self, value: Any, kind: type, key: str) -> Any:
        if not isinstance(value, kind):
            found = "nothing" if value is None else f"{type(value).__name__} {_short(value)}"
            self.fail(key, found, {dict: "an object", list: "a list", str: "a string"}[kind])
        return value

    def number(self, value: Any, key: str, minimum: float = -math.inf) -> float:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or value < minimum:
            at_least = "" if minimum == -math.inf else f" of at least {minimum}"
            self.fail(key, _short(value), f"a finite number{at_least}")
        return value

    def integer(self, value: Any, key: str, minimum: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.fail(key, _short(value), f"an integer of at least {minimum}")
        return value

    def numbers(self, value: Any, key: str, length: int | None = None, minimum: float = 0) -> list[float]:
        values = self.instance(value, list, key)
        if length is not None and len(values) != length:
            self.fail(key, f"{len(values)} entries", f"{length}, one per expert")
        return [self.number(v, f"{key}[{i}]", minimum) for i, v in enumerate(values)]

    def per_width(self, value: Any, key: str, experts: int, minimum: float = 0) -> PerWidth:
        result = {}
        for width, values in self.mapping(value, key).items():
            if width not in {str(w) for w in WIDTHS}:
                self.fail(key, f"width {width!r}", f"one of {', '.join(map(str, WIDTHS))}")
            result[int(width)] = self.numbers(values, f"{key}[{width!r}]", experts, minimum)
        return result

    def shape(self, value: Any, key: str) -> list[int]:
        sizes = self.instance(value, list, key)
        if len(sizes) != 2:
            self.fail(key, f"{len(sizes)} sizes", "[out, in]")
        return [self.integer(v, key, 1) for v in sizes]

    def widths(self, value: Any, key: str) -> list[int]:
        for i, width in enumerate(self.instance(value, list, key)):
            if not isinstance(width, int) or isinstance(width, bool) or width not in WIDTHS:
                self.fail(f"{key}[{i}]", _short(width), f"one of {WIDTHS}")
        return list(value)

    def expert_ids(self, value: Any, key: str, experts: int) -> list[int]:
        for i, expert in enumerate(self.instance(value, list, key)):
            if self.integer(expert, f"{key}[{i}]", 0) >= experts:
                self.fail(f"{key}[{i}]", str(expert), f"an expert id below {experts}")
        return list(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def some_of(names: Mapping[str, Any]) -> str:
    shown = ", ".join(repr(n) for n in list(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_document(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not a JSON file: {error}") from error


def save_document(document: Mapping[str, Any], path: str | Path) -> None:
    """Whole or not at all."""
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
