"""What commands print: messages on standard error, results on standard output."""

import json
import sys
from typing import Any

from rich.console import Console

messages = Console(stderr=True)  # everything but results; stdout is for what a program might read


def log(message: str) -> None:
    messages.print(message, highlight=False, markup=False)


def print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")
