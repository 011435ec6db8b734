"""Load that a server must endure: requests of every kind at once, from clients some of which hang up."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import openai
import psutil

CLIENTS = 12  # three times what the server runs at once
NEW_TOKENS = 24
TIMEOUT = 60.0  # seconds after which a request counts as lost; alone it takes half of one
# Batched sums round another way, which turns a choice between tokens that are about as likely. An answer is compared up
# to its first such choice.
NEAR_TIE = 0.3  # nats between the two likeliest tokens; bfloat16's logits are exact to 0.04
LOGPROB_TOLERANCE = 0.35  # mean over the tokens compared; of another prompt's answer it is several nats
SAMPLE_SECONDS = 2.0


@dataclass(frozen=True)
class Expected:
    """A prompt and its greedy answer when nothing else runs.

    certain   the answer's text before its first near tie
    logprobs  of the tokens in it
    """

    prompt: list[int]
    certain: str
    logprobs: list[float]


@dataclass
class Tally:
    """What happened. faults: one line per request that was lost or wrongly answered."""

    finished: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    compared_tokens: int = 0
    memory: list[float] = field(default_factory=list)  # MB, all processes of the server, every SAMPLE_SECONDS

    def memory_growth(self) -> float:
        """MB from the second quarter to the last one; the first is still filling caches and pools."""
        quarter = len(self.memory) // 4
        return _median(self.memory[-quarter:]) - _median(self.memory[quarter : 2 * quarter])


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class Load:
    """Clients of one server. model: its name there; max_model_len: tokens it takes at most."""

    def __init__(self, url: str, model: str, max_model_len: int, seed: int = 0):
        # retries would hide what is lost
        self._client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=TIMEOUT)
        self._model, self._max_model_len = model, max_model_len
        self._chance = random.Random(seed)
        self.tally = Tally()

    async def alone(self, prompt: list[int]) -> Expected:
        """One prompt's answer, which nothing else competes with."""
        answer = (await self._complete(prompt, logprobs=2)).choices[0]
        certain, logprobs = "", []
        for token, logprob, best in zip(
            answer.logprobs.tokens, answer.logprobs.token_logprobs, answer.logprobs.top_logprobs, strict=True
        ):
            likeliest = sorted(best.values(), reverse=True)
            if len(likeliest) > 1 and likeliest[0] - likeliest[1] < NEAR_TIE:
                break
            certain += token
            logprobs.append(logprob)
        return Expected(prompt, certain, logprobs)

    async def run(self, expected: list[Expected], seconds: float) -> None:
        """Requests from CLIENTS clients for so long; returns when the last one has been answered."""
        end = time.monotonic() + seconds
        sampler = asyncio.create_task(self._sample_memory())
        await asyncio.gather(*(self._client_until(end, expected) for _ in range(CLIENTS)))
        sampler.cancel()

    async def _client_until(self, end: float, expected: list[Expected]) -> None:
        kinds = {
            self._whole: 40,
            self._streamed: 20,
            self._with_logprobs: 15,
            self._hung_up: 15,
            self._cancelled: 5,
            self._too_long: 5,
        }
        while time.monotonic() < end:
            (kind,) = self._chance.choices(list(kinds), list(kinds.values()))
            name = kind.__name__.strip("_")
            try:
                fault = await kind(self._chance.choice(expected))
            except openai.APIError as error:
                fault = f"lost: {error!r}"
            self.tally.finished[name] += 1
            if fault:
                self.tally.faults.append(f"{name}: {fault}")

    async def _complete(self, prompt: list[int], **options):
        return await self._client.completions.create(
            model=self._model, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, **options
        )

    # Each kind of request returns what was wrong, or an empty text.

    async def _whole(self, expected: Expected) -> str:
        return self._compare(expected, (await self._complete(expected.prompt)).choices[0].text)

    async def _streamed(self, expected: Expected) -> str:
        text = ""
        async for event in await self._complete(expected.prompt, stream=True):
            text += event.choices[0].text
        return self._compare(expected, text)

    async def _with_logprobs(self, expected: Expected) -> str:
        answer = (await self._complete(expected.prompt, logprobs=5)).choices[0]
        found = answer.logprobs.token_logprobs[: len(expected.logprobs)]
        differences = [abs(a - b) for a, b in zip(found, expected.logprobs, strict=True)]
        if differences and sum(differences) / len(differences) > LOGPROB_TOLERANCE:
            return f"logprobs {found} instead of {expected.logprobs}"
        return self._compare(expected, answer.text)

    async def _hung_up(self, expected: Expected) -> str:
        """The client goes away after a few tokens."""
        events = await self._complete(expected.prompt, stream=True)
        wanted = self._chance.randrange(1, 6)
        async for _ in events:
            wanted -= 1
            if not wanted:
                break
        await events.close()
        return ""

    async def _cancelled(self, expected: Expected) -> str:
        """The client goes away before the first token, or while the request waits for its turn."""
        request = asyncio.create_task(self._complete(expected.prompt))
        await asyncio.wait([request], timeout=self._chance.uniform(0, 0.5))
        if request.cancel():
            await asyncio.wait([request])
            return ""
        return self._compare(expected, request.result().choices[0].text)

    async def _too_long(self, expected: Expected) -> str:
        try:
            await self._complete(expected.prompt * (1 + self._max_model_len // len(expected.prompt)))
        except openai.BadRequestError:
            return ""
        return "a prompt beyond the model's length was answered"

    def _compare(self, expected: Expected, text: str) -> str:
        if not text.startswith(expected.certain):
            return f"{text!r} instead of {expected.certain!r}"
        self.tally.compared_tokens += len(expected.logprobs)
        return ""

    async def _sample_memory(self) -> None:
        while True:
            self.tally.memory.append(sum(process.memory_info().rss for process in _children()) / 1e6)
            await asyncio.sleep(SAMPLE_SECONDS)


def _children() -> Iterator[psutil.Process]:
    """The server's processes: this process has no others that matter."""
    for process in psutil.Process().children(recursive=True):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            yield process


def soak(url: str, model: str, prompts: list[list[int]], max_model_len: int, seconds: float) -> Tally:
    """Answers alone, the load, and the answers alone once more: whatever the load has left behind.

    Half of the prompts are used, those whose answers are certain for longest.
    """

    async def all_of_it() -> Tally:
        load = Load(url, model, max_model_len)
        expected = [await load.alone(prompt) for prompt in prompts]
        expected = sorted(expected, key=lambda one: -len(one.logprobs))[: len(prompts) // 2]
        await load.run(expected, seconds)
        for one in expected:
            fault = await load._whole(one)
            if fault:
                load.tally.faults.append(f"afterwards: {fault}")
        return load.tally

    return asyncio.run(all_of_it())
