"""Evaluation of a model that a server has: perplexity, and distance to another model, from logprobs of prompts.

    result = evaluate_served("http://localhost:8000/v1", ["wikitext.txt"], against="mixtral")

Text goes to `/completions` as token ids, and vLLM's `prompt_logprobs` come back: of every position the actual token's
logprob, exact, and those of the likeliest tokens. How many, the server decides (`vllm serve --max-logprobs`, 20 unless
told otherwise, -1 for all). Perplexity needs the first kind alone. KL needs whole distributions: where the server gives
the likeliest only, all other tokens count as one with the mass that is left. That is a lower bound of the KL, since
merging events never moves distributions apart.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from vllm_mcmoe.calibration.common.device import choose_device
from vllm_mcmoe.calibration.common.progress import Log, progress
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import open_weights
from vllm_mcmoe.calibration.evaluate.scores import (
    Activations,
    Evaluation,
    FinalStates,
    about_directory,
    check_vocabularies,
    distance_of,
    next_token_losses,
    perplexities,
    pruners_of,
)
from vllm_mcmoe.calibration.measure.sensitivity import token_kl
from vllm_mcmoe.calibration.model.folder import ModelFolder, find_model
from vllm_mcmoe.calibration.model.text import (
    DEFAULT_LENGTH,
    DEFAULT_SEQUENCES,
    TokenSequences,
    load_calibration_data,
    load_sequences,
    load_tokenizer,
)
from vllm_mcmoe.errors import DataError, EndpointError, UnsupportedModelError

AT_ONCE = 8  # requests under way: a server computes them together, and their answers wait in memory
CONNECT_SECONDS, ANSWER_SECONDS = 10, 1800  # a CPU takes minutes for long prompts, eight of them at once
# Whole distributions are some 60 bytes of JSON per token and vocabulary entry: of one prompt no more than this many
# numbers are asked for, 600 MB, and of larger ones the likeliest tokens, MOST_LIKELY at most.
LARGEST_ANSWER, MOST_LIKELY = 10_000_000, 1000
# A served distribution's logprobs are float32: what is left of 1 after adding thousands is exact to about this.
LEAST_REST = 1e-6


def is_endpoint(model: str | Path | ModelFolder) -> bool:
    """Whether it is the address of a server, and no directory or name on the hub."""
    return str(model).startswith(("http://", "https://"))


@dataclass(frozen=True)
class Prediction:
    """What a model predicts along one sequence of L tokens: L - 1 distributions, the first after the first token.

    losses    float32 [L - 1], nats, of the tokens that followed
    first     int64 [L - 1], the likeliest tokens
    ids       int64 [L - 1, K], tokens whose logprobs are known, ascending in each row, -1 for none; None where all are
    logprobs  float32 [L - 1, K], or [L - 1, vocabulary]
    """

    losses: torch.Tensor
    first: torch.Tensor
    ids: torch.Tensor | None
    logprobs: torch.Tensor


def kl_of(expected: Prediction, found: Prediction) -> torch.Tensor:
    """KL(expected || found) at every position, float32 [L - 1], nats: of whole distributions, or, where one of them is
    known for some tokens only, of those that both know and of all others as one."""
    if expected.ids is None and found.ids is None:
        return token_kl(expected.logprobs, found.logprobs)
    ids = found.ids if expected.ids is None else expected.ids
    known, p, q = ids >= 0, _at(expected, ids), _at(found, ids)
    known &= ~(p.isnan() | q.isnan())
    p, q = (torch.where(known, logprobs, -math.inf).double() for logprobs in (p, q))
    rest_p, rest_q = ((1 - logprobs.exp().sum(-1)).clamp(min=LEAST_REST) for logprobs in (p, q))
    terms = torch.where(known, p.exp() * (p - q), 0.0).sum(-1) + rest_p * (rest_p / rest_q).log()
    return terms.clamp(min=0).float()  # below 0 by rounding, or by the least rest


def _at(prediction: Prediction, ids: torch.Tensor) -> torch.Tensor:
    """Its logprobs at ids, which ascend in each row; NaN where it knows none."""
    if prediction.ids is None:
        return prediction.logprobs.gather(1, ids.clamp(min=0))
    if prediction.ids is ids:
        return prediction.logprobs
    place = torch.searchsorted(prediction.ids, ids).clamp(max=prediction.ids.shape[1] - 1)
    return torch.where(prediction.ids.gather(1, place) == ids, prediction.logprobs.gather(1, place), math.nan)


class Endpoint:
    """A model behind an OpenAI-compatible address that gives prompt logprobs, which vLLM's servers do.

    name           as the server calls the model
    context        tokens that a request may have, the generated one included; None where the server does not say
    directory      the model's, where the server is told one; of the server's machine
    most_logprobs  how many likeliest tokens it gives per position; None for the whole vocabulary
    vocabulary     its size, where most_logprobs is None
    """

    def __init__(self, url: str, name: str | None = None, api_key: str | None = None):
        """Raises EndpointError: no answer, no such model, no prompt logprobs."""
        self.url = url.rstrip("/")
        self.session = requests.Session()
        # read: a server may close a connection that it kept open just as the next request goes out, and asking again
        # changes nothing there.
        retries = Retry(
            3, connect=0, read=1, backoff_factor=1, status_forcelist=(429, 502, 503, 504), allowed_methods=None
        )
        for scheme in ("http://", "https://"):
            adapter = HTTPAdapter(max_retries=retries, pool_maxsize=AT_ONCE)
            self.session.mount(scheme, adapter)
        if api_key:
            self.session.headers["Authorization"] = f"Bearer {api_key}"
        card = self._choose_model(name)
        self.name, self.context, self.directory = card["id"], card.get("max_model_len"), card.get("root")
        self.most_logprobs, self.vocabulary = self._probe()

    def __str__(self) -> str:
        return f"{self.name} at {self.url}"

    def _request(self, method: str, url: str, **options: Any) -> requests.Response:
        try:
            return self.session.request(method, url, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **options)
        except requests.exceptions.RequestException as error:
            reason = " ".join(str(error).split())[:300]
            raise EndpointError(f"{self.url}: no answer from a server there; is it running? {reason}") from error

    def _choose_model(self, name: str | None) -> dict[str, Any]:
        answer = self._request("GET", f"{self.url}/models")
        if answer.status_code in (401, 403):
            raise EndpointError(f"{self.url}: the server refuses the key; set OPENAI_API_KEY or give --api-key.")
        try:
            cards = {card["id"]: card for card in answer.json()["data"]} if answer.ok else None
        except (requests.exceptions.JSONDecodeError, KeyError, TypeError):
            cards = None
        if not cards:
            raise EndpointError(
                f"{self.url}/models: HTTP {answer.status_code} and no list of models; the address should be the one "
                "that OpenAI's clients take, for vLLM http://HOST:8000/v1."
            )
        if name is None and len(cards) > 1:
            raise EndpointError(f"{self.url} serves {', '.join(cards)}: choose one with --model.")
        chosen = next(iter(cards)) if name is None else name
        if chosen not in cards:
            raise EndpointError(f"{self.url} serves {', '.join(cards)}, but no {chosen}.")
        return cards[chosen]

    def _complete(self, tokens: Sequence[int], logprobs: int) -> requests.Response:
        # One token has to be generated; sampled from the distribution as it is, lest a server's defaults change it.
        body = {"model": self.name, "prompt": list(tokens), "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        return self._request("POST", f"{self.url}/completions", json=body | {"prompt_logprobs": logprobs})

    def _probe(self) -> tuple[int | None, int | None]:
        """How many logprobs there are to be had: all, as many as the refusal says, or one."""
        answer = self._complete([0, 0], -1)
        allowed = None
        if not answer.ok:
            named = re.search(r"max allowed: (\d+)", answer.text)
            allowed = int(named[1]) if named else 1
            answer = self._complete([0, 0], allowed)
        rows = _prompt_logprobs(answer) if answer.ok else None
        if rows is None:
            found = f"HTTP {answer.status_code}: {_reason(answer)}" if not answer.ok else "an answer without them"
            raise EndpointError(
                f"{self}: the server gives no prompt_logprobs, which `vllm serve` does ({found}). Where another "
                "serves the model, evaluate its directory."
            )
        return (allowed, None) if allowed is not None else (None, len(rows[1]))

    def check_tokenizer(self, tokens: TokenSequences, tokenizer: Any, source: str | Path, log: Log) -> None:
        """Raises UnsupportedModelError where the server splits the text into other tokens than `tokenizer` does."""
        sample = tokenizer.decode(tokens.tokens[0][:64])
        expected = tokenizer(sample, add_special_tokens=False)["input_ids"]
        body = {"model": self.name, "prompt": sample, "add_special_tokens": False}
        answer = self._request("POST", f"{self.url.removesuffix('/v1')}/tokenize", json=body)
        if not answer.ok:
            log(f"{self}: no /tokenize there, so whether it has the tokenizer of {source} was not checked.")
        elif answer.json()["tokens"] != expected:
            raise UnsupportedModelError(
                f"{self} makes other tokens of the text than the tokenizer of {source}; the text must be given as the "
                "served model's own tokens: is this the right directory (--tokenizer, --against)?"
            )

    def check_length(self, tokens: TokenSequences) -> None:
        length = tokens.tokens.shape[1]
        if self.context is not None and length + 1 > self.context:
            raise DataError(
                f"{self} takes {self.context} tokens, the one it has to generate included, and sequences have "
                f"{length}: give --length {self.context - 1}, or serve it with a larger --max-model-len."
            )

    def predict(self, tokens: torch.Tensor, logprobs: int) -> Prediction:
        """Of one sequence, int64 [L]. logprobs: how many likeliest tokens, -1 for the whole vocabulary."""
        answer = self._complete(tokens.tolist(), logprobs)
        rows = _prompt_logprobs(answer) if answer.ok else None
        if rows is None or len(rows) != len(tokens):
            raise EndpointError(f"{self}: HTTP {answer.status_code}, no logprobs of the prompt: {_reason(answer)}")
        following = tokens[1:].tolist()
        losses = torch.tensor([-row[token]["logprob"] for row, token in zip(rows[1:], following, strict=True)])
        if logprobs < 0:
            whole = torch.full((len(following), self.vocabulary), -math.inf)
            for position, row in enumerate(rows[1:]):
                ids = torch.tensor(list(row))
                whole[position, ids] = torch.tensor([entry["logprob"] for entry in row.values()])
            return Prediction(losses, whole.argmax(-1), None, whole)
        # the following token comes beside the likeliest ones unless it is one of them
        ids = torch.full((len(following), logprobs + 1), -1)
        known = torch.full(ids.shape, -math.inf)
        for position, row in enumerate(rows[1:]):
            ordered = sorted(row)
            ids[position, -len(ordered) :] = torch.tensor(ordered)
            known[position, -len(ordered) :] = torch.tensor([row[token]["logprob"] for token in ordered])
        return Prediction(losses, ids.gather(1, known.argmax(-1, keepdim=True)).squeeze(1), ids, known)


def _prompt_logprobs(answer: requests.Response) -> list[dict[int, dict[str, Any]] | None] | None:
    """Per position of the prompt, token id -> {"logprob", "rank", ...}; None where the answer has none."""
    try:
        rows = answer.json()["choices"][0]["prompt_logprobs"]
    except (requests.exceptions.JSONDecodeError, KeyError, IndexError, TypeError):
        return None
    if not rows or any(not row for row in rows[1:]):
        return None
    return [None if row is None else {int(token): entry for token, entry in row.items()} for row in rows]


def _reason(answer: requests.Response) -> str:
    try:
        document = answer.json()
        return " ".join(str(document.get("error", document).get("message", document)).split())[:300]
    except (requests.exceptions.JSONDecodeError, AttributeError):
        return " ".join(answer.text.split())[:300]


def evaluate_served(
    model: str | Path | ModelFolder,
    data: Sequence[str | Path],
    *,
    against: str | Path | ModelFolder | None = None,
    served_name: str | None = None,
    against_served_name: str | None = None,
    api_key: str | None = None,
    tokenizer: str | Path | None = None,
    top_logprobs: int | None = None,
    activations: Activations = "int8",
    pruning: str | float = "on",
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    device: str | torch.device = "auto",
    log: Callable[[str], None] = lambda message: None,
    show_progress: bool = True,
) -> Evaluation:
    """evaluate where the model, or what it is compared with, or both, are served: `http://HOST:PORT/v1`.

    served_name, against_served_name   the servers' names of the models; None takes the only one
    api_key       for both
    tokenizer     a directory or a name on the hub, with the served model's tokenizer; None takes that of the model
                  which is no server's, or the directory that the server was given, if it is here
    top_logprobs  likeliest tokens to ask for per position; None takes the whole vocabulary where the server gives it
                  and an answer stays below 600 MB, else as many as it gives
    the rest      as evaluate takes it, for what no server has

    Distributions are those after every token but a sequence's last. Raises EndpointError, and what evaluate raises,
    before any long work.
    """
    device = choose_device(device, log)
    endpoints = [
        Endpoint(str(address), name, api_key) if address is not None and is_endpoint(address) else None
        for address, name in ((model, served_name), (against, against_served_name))
    ]
    served = [endpoint for endpoint in endpoints if endpoint is not None]
    weights = [
        open_weights(find_model(name, log=log)) if name is not None and endpoint is None else None
        for name, endpoint in zip((model, against), endpoints, strict=True)
    ]
    pruners = {} if weights[0] is None else pruners_of(weights[0], pruning)
    text = _load_text(served, weights, tokenizer, data, sequences, length, log)
    count = 0 if against is None else _how_many_logprobs(served, weights, top_logprobs, text.tokens.shape[1], log)
    sources = []
    for endpoint, local, rules in zip(endpoints, weights, (pruners, None), strict=True):
        if endpoint is not None:
            # one bar is enough, and two at once are not to be had
            sources.append(_asked(endpoint, text.tokens, count, show_progress and endpoint is served[0]))
        elif local is not None:
            states = FinalStates(local, device, text.tokens, activations, show_progress, rules)
            sources.append(_computed(states, text.tokens))
    losses, distance = _compare(*sources)
    if distance and count >= 0:
        distance["kl_over"] = f"the {count} likeliest served tokens and all others as one"
    local = weights[0]
    return Evaluation(
        model=str(endpoints[0] or model),
        against=None if against is None else str(endpoints[1] or against),
        **perplexities(losses, text),
        **({"activations": "served"} if local is None else about_directory(local, activations, pruners)),
        **distance,
    )


def _load_text(
    served: list[Endpoint],
    weights: list[Any],
    tokenizer: str | Path | None,
    data: Sequence[str | Path],
    sequences: int,
    length: int,
    log: Log,
) -> TokenSequences:
    """Of the data, by the model's tokenizer; every server has been asked whether it is its own."""
    local = next((each.model for each in weights if each is not None), None)
    if local is not None and tokenizer is None:
        text = load_calibration_data(local, data, sequences, length, log)
        source, found = local.folder, load_tokenizer(local.path)
    else:
        roots = (endpoint.directory for endpoint in served)
        source = tokenizer or next((root for root in roots if root and Path(root).is_dir()), None)
        if source is None:
            raise DataError(
                f"{served[0]}: no directory with its tokenizer is known here; give one with --tokenizer, or the "
                "model's name on the hub."
            )
        folder = find_model(source, log=log)
        folder.fetch_side_files()
        found = load_tokenizer(folder.path)
        text = load_sequences(data, found, sequences=sequences, length=length)
        if text.notice:
            log(f"Data: {text.notice}.")
    for endpoint in served:
        endpoint.check_length(text)
        endpoint.check_tokenizer(text, found, source, log)
    return text


def _how_many_logprobs(served: list[Endpoint], weights: list[Any], wanted: int | None, length: int, log: Log) -> int:
    """Likeliest tokens to ask for, of every server alike; -1 for the whole vocabulary."""
    sizes = {str(endpoint): endpoint.vocabulary for endpoint in served if endpoint.vocabulary is not None}
    sizes |= {str(each.model.folder): each.model.config.vocab_size for each in weights if each is not None}
    check_vocabularies(sizes)
    limited = [endpoint for endpoint in served if endpoint.most_logprobs is not None]
    least = min(limited, key=lambda endpoint: endpoint.most_logprobs, default=None)
    if least is not None and least.most_logprobs < (wanted or 1):
        raise EndpointError(
            f"{least} gives {least.most_logprobs} logprobs of likeliest tokens, not {wanted or 'even one'}: start it "
            f"with --max-logprobs {wanted or 20}, or with -1 for all."
        )
    if wanted is not None:
        return wanted
    if least is not None:
        log(f"{least} gives the {least.most_logprobs} likeliest tokens; with `vllm serve --max-logprobs -1` all.")
        return least.most_logprobs
    (size,) = set(sizes.values())
    if size * length <= LARGEST_ANSWER:
        return -1
    count = min(MOST_LIKELY, size)
    log(
        f"Asking for the {count} likeliest of {size} tokens: whole distributions after {length} tokens would be "
        f"{60e-9 * size * length:.1f} GB of JSON. A smaller --length has room for all."
    )
    return count


def _asked(endpoint: Endpoint, tokens: torch.Tensor, logprobs: int, show_progress: bool) -> Iterator[Prediction]:
    """Of every sequence in order, AT_ONCE requests ahead."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = deque()
        try:
            for sequence in progress(list(tokens), f"Asking {endpoint.name}", show=show_progress):
                waiting.append(pool.submit(endpoint.predict, sequence, logprobs))
                if len(waiting) == AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _computed(states: FinalStates, tokens: torch.Tensor) -> Iterator[Prediction]:
    for batch, sequences in enumerate(tokens.split([len(hidden) for hidden in states.batches])):
        with torch.no_grad():
            logprobs = states.log_probs(batch)
            losses = next_token_losses(logprobs, sequences)
        for row, row_losses in zip(logprobs[:, :-1].cpu(), losses, strict=True):
            yield Prediction(row_losses, row.argmax(-1), None, row)


def _compare(
    subject: Iterator[Prediction], base: Iterator[Prediction] | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Losses float32 [sequences, length - 1], and what Evaluation says of the other model."""
    if base is None:
        return torch.stack([prediction.losses for prediction in subject]), {}
    losses, excess, kl, agreements = [], [], [], 0
    for found, expected in zip(subject, base, strict=True):
        losses.append(found.losses)
        excess.append(found.losses - expected.losses)
        kl.append(kl_of(expected, found))
        agreements += int((found.first == expected.first).sum())
    return torch.stack(losses), distance_of(torch.cat(kl), agreements, torch.cat(excess))
