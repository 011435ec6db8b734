"""What commands print: messages on standard error, results on standard output."""

import json
import sys
from typing import Any

from vllm_mcmoe.calibration.common.terminal import console, messages

__all__ = ["log", "messages", "print_json"]  # messages: everything but results, which a program might read from stdout


def log(message: str) -> None:
    console().print(message, highlight=False, markup=False)


def print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")
