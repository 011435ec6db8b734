"""Makes the task of lm-evaluation-harness beside this file: which of four continuations does a text really have?

    python benchmarks/lm_eval/make_continuations.py

Passages are of the reference model's evaluation text, twenty of each domain; the three wrong continuations are those of
other passages of the same domain, and all four have eight words. Chance gets a quarter of them right. Nothing is
random but the order of the choices, which has a fixed seed.
"""

import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE.parent / "reference_model" / "corpus"
PER_DOMAIN, CONTEXT_WORDS, CONTINUATION_WORDS = 20, 24, 8


def passages(text: str) -> list[tuple[str, str]]:
    """Evenly spread over the text: some words as they stand there, and those that follow."""
    words = re.findall(r"\s*\S+", text.replace("<|end|>", " "))
    step = len(words) // PER_DOMAIN
    found = []
    for start in range(0, step * PER_DOMAIN, step):
        middle = start + CONTEXT_WORDS
        found.append(("".join(words[start:middle]).lstrip(), "".join(words[middle : middle + CONTINUATION_WORDS])))
    return found


def main() -> None:
    chance, lines = random.Random(0), []
    for file in sorted(CORPUS.glob("*.evaluation.txt")):
        found = passages(file.read_text(encoding="utf-8"))
        for number, (context, continuation) in enumerate(found):
            others = [found[(number + distance) % len(found)][1] for distance in (5, 10, 15)]
            choices = [continuation, *others]
            chance.shuffle(choices)
            domain = file.name.split(".")[0]
            item = {"domain": domain, "context": context, "choices": choices, "answer": choices.index(continuation)}
            lines.append(json.dumps(item, ensure_ascii=False))
    (HERE / "continuations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
