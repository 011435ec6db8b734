"""One thing that was looked at."""

from dataclasses import asdict, dataclass
from enum import StrEnum


class Status(StrEnum):
    """ok; note: serving works, but there is something to know or to gain; problem: it stops serving."""

    ok = "ok"
    note = "note"
    problem = "problem"


@dataclass(frozen=True)
class Check:
    """name: what was looked at; found: in words; advice: what to do, empty where nothing is to be done."""

    name: str
    status: Status
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def ok(name: str, found: str) -> Check:
    return Check(name, Status.ok, found)


def note(name: str, found: str, advice: str = "") -> Check:
    return Check(name, Status.note, found, advice)


def problem(name: str, found: str, advice: str) -> Check:
    return Check(name, Status.problem, found, advice)
