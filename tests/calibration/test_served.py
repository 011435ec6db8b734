"""Evaluation of served models, against a server that answers as vLLM's does, from a transformers forward pass.

tests/vllm_mcmoe/test_http_server.py asks a real one.
"""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_mcmoe.calibration.evaluate.checkpoint_weights import load_dequantized
from vllm_mcmoe.calibration.evaluate.scores import evaluate
from vllm_mcmoe.calibration.evaluate.served import Prediction, evaluate_served, is_endpoint, kl_of
from vllm_mcmoe.calibration.measure.sensitivity import token_kl
from vllm_mcmoe.errors import DataError, EndpointError, UnsupportedModelError

BUDGET = {"sequences": 5, "length": 48, "show_progress": False}


@dataclass
class Server:
    """What vLLM's OpenAI-compatible server says of a model; max_logprobs: -1 for the whole vocabulary; dropped:
    requests whose connection it closes without an answer."""

    model: PreTrainedModel
    tokenizer: object
    directory: str = "/somewhere/else"
    names: tuple[str, ...] = ("tiny",)
    max_logprobs: int = -1
    max_model_len: int = 256
    key: str | None = None
    prompt_logprobs: bool = True
    tokenize: bool = True
    dropped: int = 0

    def get(self, path: str) -> tuple[int, dict]:
        if path != "/v1/models":
            return 404, {"detail": "Not Found"}
        cards = [{"id": name, "root": self.directory, "max_model_len": self.max_model_len} for name in self.names]
        return 200, {"data": cards}

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        if path == "/tokenize" and self.tokenize:
            return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path != "/v1/completions" or body["model"] not in self.names:
            return 404, {"error": {"message": "Not Found"}}
        assert body["temperature"] == 1 and body["max_tokens"] == 1
        wanted = body["prompt_logprobs"]
        size = self.model.config.vocab_size
        if self.max_logprobs >= 0 and (size if wanted < 0 else wanted) > self.max_logprobs:
            message = f"Requested prompt logprobs of {size}, which is greater than max allowed: {self.max_logprobs}"
            return 400, {"error": {"message": message}}
        choice = {"text": "x", "prompt_logprobs": self.rows(body["prompt"], wanted) if self.prompt_logprobs else None}
        return 200, {"choices": [choice]}

    def rows(self, tokens: list[int], wanted: int) -> list[dict | None]:
        with torch.no_grad():
            logprobs = self.model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
        rows: list[dict | None] = [None]
        for row, token in zip(logprobs, tokens[1:], strict=True):
            likeliest = range(len(row)) if wanted < 0 else row.topk(wanted).indices.tolist()
            rows.append({str(i): {"logprob": float(row[i]), "rank": 1} for i in dict.fromkeys([token, *likeliest])})
        return rows


@contextmanager
def running(server: Server) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, document: dict) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def refused(self) -> bool:
            return server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}"

        def do_GET(self) -> None:
            self.answer(*((401, {}) if self.refused() else server.get(self.path)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.dropped:
                server.dropped -= 1
                return
            self.answer(*((401, {}) if self.refused() else server.post(self.path, body)))

        def log_message(self, *arguments: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}/v1"
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


@pytest.fixture(scope="module")
def tokenizer(reference_model):
    return AutoTokenizer.from_pretrained(reference_model)


@pytest.fixture(scope="module")
def quantised(mixed_checkpoint) -> PreTrainedModel:
    return load_dequantized(mixed_checkpoint)


@pytest.fixture(scope="module")
def original(reference_model) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(reference_model, dtype=torch.float32, experts_implementation="eager")


@pytest.fixture(scope="module")
def of_directories(mixed_checkpoint, reference_model, evaluation_files):
    return evaluate(mixed_checkpoint, evaluation_files, against=reference_model, activations="float", **BUDGET)


def test_addresses_are_told_from_directories():
    assert is_endpoint("http://localhost:8000/v1") and is_endpoint("https://host/v1")
    assert not is_endpoint("models/http") and not is_endpoint(Path("/models/tiny"))


def test_a_served_model_scores_as_its_directory_does(
    quantised, tokenizer, reference_model, evaluation_files, of_directories
):
    with running(Server(quantised, tokenizer)) as url:
        served = evaluate_served(url, evaluation_files, against=reference_model, **BUDGET)
    assert served.model == f"tiny at {url}" and served.against == str(reference_model)
    assert served.activations == "served" and served.kl_over is None
    assert served.tokens == of_directories.tokens == 5 * 47
    assert served.perplexity_by_file == pytest.approx(of_directories.perplexity_by_file, rel=1e-4)
    assert served.token_perplexity == pytest.approx(of_directories.token_perplexity, rel=1e-4)
    assert served.perplexity_ratio == pytest.approx(of_directories.perplexity_ratio, rel=1e-4)
    assert served.perplexity_ratio_error == pytest.approx(of_directories.perplexity_ratio_error, rel=1e-3)
    # the directory's are over the last positions, too, which a prompt's logprobs do not reach: 48 of them to 47
    assert served.mean_kl == pytest.approx(of_directories.mean_kl, rel=0.05)
    assert served.top1_agreement == pytest.approx(of_directories.top1_agreement, abs=0.02)
    assert served.total_bytes is None and served.average_bits is None and served.pruned is None
    assert json.loads(json.dumps(served.to_dict())).keys() == of_directories.to_dict().keys()


def test_the_likeliest_tokens_and_the_rest_as_one_give_a_lower_bound_that_more_of_them_raise(
    quantised, tokenizer, reference_model, evaluation_files
):
    messages: list[str] = []
    options = {"against": reference_model, "log": messages.append, **BUDGET}
    with running(Server(quantised, tokenizer, max_logprobs=20)) as url:
        of_20 = evaluate_served(url, evaluation_files, **options)
        of_3 = evaluate_served(url, evaluation_files, top_logprobs=3, **options)
        with pytest.raises(EndpointError, match=r"gives 20 logprobs of likeliest tokens, not 21: .*--max-logprobs 21"):
            evaluate_served(url, evaluation_files, top_logprobs=21, **options)
    with running(Server(quantised, tokenizer)) as url:
        of_all = evaluate_served(url, evaluation_files, **options)
    assert 0.2 * of_all.mean_kl < of_3.mean_kl < of_20.mean_kl < of_all.mean_kl
    assert of_20.kl_over == "the 20 likeliest served tokens and all others as one"
    assert "over the 20 likeliest served tokens and all others as one (a lower bound)" in of_20.distance("it")
    assert any("gives the 20 likeliest tokens; with `vllm serve --max-logprobs -1` all" in line for line in messages)
    # these do not depend on how many are known
    for name in ("top1_agreement", "token_perplexity", "perplexity_ratio"):
        assert getattr(of_3, name) == pytest.approx(getattr(of_all, name), rel=1e-6)


def test_two_servers_are_compared_as_a_server_and_a_directory(
    quantised, original, tokenizer, reference_model, evaluation_files
):
    """The tokenizer is that of the directory which a server names and which is here."""
    with (
        running(Server(quantised, tokenizer, str(reference_model), names=("a", "b"))) as url,
        running(Server(original, tokenizer, max_logprobs=50)) as other,
    ):
        with pytest.raises(EndpointError, match=r"serves a, b: choose one with --model"):
            evaluate_served(url, evaluation_files, **BUDGET)
        both = evaluate_served(url, evaluation_files, against=other, served_name="b", **BUDGET)
        one = evaluate_served(
            url, evaluation_files, against=reference_model, served_name="b", top_logprobs=50, **BUDGET
        )
        turned = evaluate_served(reference_model, evaluation_files, against=url, against_served_name="a", **BUDGET)
    assert both.model == f"b at {url}" and both.against == f"tiny at {other}"
    assert both.perplexity_ratio == pytest.approx(one.perplexity_ratio, rel=1e-4)
    assert 0.5 * one.mean_kl < both.mean_kl <= one.mean_kl * 1.0001  # fewer tokens are known on both sides
    assert turned.perplexity_ratio == pytest.approx(1 / one.perplexity_ratio, rel=1e-4)
    assert turned.activations == "float" and turned.kl_over is None
    assert turned.average_bits == {"experts": 16.0, "model": 16.0} and turned.pruned == 0


def test_perplexity_alone_asks_for_no_likeliest_tokens(quantised, tokenizer, reference_model, evaluation_files):
    with running(Server(quantised, tokenizer, max_logprobs=0)) as url:
        served = evaluate_served(url, evaluation_files, tokenizer=reference_model, **BUDGET)
        with pytest.raises(EndpointError, match=r"gives 0 logprobs .*, not even one: start it with --max-logprobs 20"):
            evaluate_served(url, evaluation_files, against=reference_model, **BUDGET)
    assert served.mean_kl is None and 10 < served.token_perplexity < 1000


def test_a_connection_that_is_closed_without_an_answer_is_tried_once_more(
    quantised, tokenizer, reference_model, evaluation_files
):
    """Servers close connections that were kept open, sometimes just when they are used again."""
    with running(Server(quantised, tokenizer, max_logprobs=0)) as url:
        undisturbed = evaluate_served(url, evaluation_files, tokenizer=reference_model, **BUDGET)
    server = Server(quantised, tokenizer, max_logprobs=0, dropped=1)
    with running(server) as url:
        found = evaluate_served(url, evaluation_files, tokenizer=reference_model, **BUDGET)
        assert (found.token_perplexity, found.tokens) == (undisturbed.token_perplexity, undisturbed.tokens)
        assert server.dropped == 0
        server.dropped = 10**6
        with pytest.raises(EndpointError, match="no answer from a server there"):
            evaluate_served(url, evaluation_files, tokenizer=reference_model, **BUDGET)


def test_large_vocabularies_are_not_asked_for_whole(
    quantised, tokenizer, reference_model, evaluation_files, monkeypatch
):
    monkeypatch.setattr("vllm_mcmoe.calibration.evaluate.served.LARGEST_ANSWER", 48 * 4096 - 1)
    messages: list[str] = []
    with running(Server(quantised, tokenizer)) as url:
        served = evaluate_served(url, evaluation_files, against=reference_model, log=messages.append, **BUDGET)
    assert served.kl_over == "the 1000 likeliest served tokens and all others as one"
    assert any("Asking for the 1000 likeliest of 4096 tokens: whole distributions" in line for line in messages)


def test_a_key_is_sent_and_asked_for(quantised, tokenizer, reference_model, evaluation_files):
    with running(Server(quantised, tokenizer, key="secret")) as url:
        with pytest.raises(EndpointError, match="refuses the key; set OPENAI_API_KEY or give --api-key"):
            evaluate_served(url, evaluation_files, **BUDGET)
        evaluate_served(url, evaluation_files, tokenizer=reference_model, api_key="secret", **BUDGET)


def test_a_server_that_is_not_there_is_named(evaluation_files):
    with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:9/v1: no answer from a server there; is it running"):
        evaluate_served("http://127.0.0.1:9/v1", evaluation_files, **BUDGET)


def test_an_address_that_is_not_the_apis_is_explained(quantised, tokenizer, evaluation_files):
    with running(Server(quantised, tokenizer)) as url, pytest.raises(EndpointError, match=r"HTTP 404 .*for vLLM http"):
        evaluate_served(url.removesuffix("/v1"), evaluation_files, **BUDGET)


def test_a_model_that_is_not_served_is_named_with_those_that_are(quantised, tokenizer, evaluation_files):
    with running(Server(quantised, tokenizer)) as url, pytest.raises(EndpointError, match="serves tiny, but no large"):
        evaluate_served(url, evaluation_files, served_name="large", **BUDGET)


def test_a_server_without_prompt_logprobs_is_refused(quantised, tokenizer, evaluation_files):
    with (
        running(Server(quantised, tokenizer, prompt_logprobs=False)) as url,
        pytest.raises(EndpointError, match=r"gives no prompt_logprobs, which `vllm serve` does"),
    ):
        evaluate_served(url, evaluation_files, **BUDGET)


def test_a_context_that_is_too_short_is_named_with_the_length_that_fits(
    quantised, tokenizer, reference_model, evaluation_files
):
    with (
        running(Server(quantised, tokenizer, max_model_len=48)) as url,
        pytest.raises(DataError, match=r"takes 48 tokens.*sequences have 48: give --length 47"),
    ):
        evaluate_served(url, evaluation_files, tokenizer=reference_model, **BUDGET)


class Shifted:
    """A tokenizer of the same size with other ids."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        return {"input_ids": [token + 1 for token in self.tokenizer(text, **options)["input_ids"]]}


def test_another_tokenizer_is_noticed(quantised, tokenizer, reference_model, evaluation_files):
    with (
        running(Server(quantised, Shifted(tokenizer))) as url,
        pytest.raises(UnsupportedModelError, match="makes other tokens of the text than the tokenizer of"),
    ):
        evaluate_served(url, evaluation_files, against=reference_model, **BUDGET)


def test_a_server_that_does_not_tokenize_is_taken_at_its_word_aloud(
    quantised, tokenizer, reference_model, evaluation_files
):
    messages: list[str] = []
    with running(Server(quantised, tokenizer, tokenize=False)) as url:
        evaluate_served(url, evaluation_files, tokenizer=reference_model, log=messages.append, **BUDGET)
    assert any("no /tokenize there, so whether it has the tokenizer of" in line for line in messages)


def test_another_vocabulary_is_refused(quantised, tokenizer, qwen3_model, reference_model, evaluation_files):
    class Larger(Server):
        def rows(self, tokens: list[int], wanted: int) -> list[dict | None]:
            extra = {str(self.model.config.vocab_size): {"logprob": -50.0}}
            return [row and row | extra for row in super().rows(tokens, wanted)]

    with (
        running(Larger(quantised, tokenizer)) as url,
        pytest.raises(UnsupportedModelError, match=r"vocabulary of 4097 tokens.* of 4096 tokens; only models of one"),
    ):
        evaluate_served(url, evaluation_files, against=reference_model, **BUDGET)


def test_without_any_tokenizer_one_is_asked_for(quantised, tokenizer, evaluation_files):
    with (
        running(Server(quantised, tokenizer)) as url,
        pytest.raises(DataError, match=r"no directory with its tokenizer is known here; give one with --tokenizer"),
    ):
        evaluate_served(url, evaluation_files, **BUDGET)


def random_prediction(generator: torch.Generator, known: int | None) -> Prediction:
    logprobs = (3 * torch.randn(20, 64, generator=generator)).log_softmax(-1)
    following = torch.randint(64, (20, 1), generator=generator)
    losses, first = -logprobs.gather(1, following).squeeze(1), logprobs.argmax(-1)
    if known is None:
        return Prediction(losses, first, None, logprobs)
    ids = torch.full((20, known + 1), -1)
    for row in range(20):
        chosen = sorted({*logprobs[row].topk(known).indices.tolist(), int(following[row])})
        ids[row, -len(chosen) :] = torch.tensor(chosen)
    values = torch.where(ids >= 0, logprobs.gather(1, ids.clamp(min=0)), -math.inf)
    return Prediction(losses, first, ids, values)


@pytest.mark.parametrize(("expected_known", "found_known"), [(None, 8), (8, None), (8, 8), (8, 3), (None, None)])
def test_kl_merges_what_either_side_does_not_know(expected_known, found_known):
    """Against the definition, written out row by row."""
    wholes = [random_prediction(torch.Generator().manual_seed(seed), None) for seed in (1, 2)]
    parts = [random_prediction(torch.Generator().manual_seed(s), k) for s, k in ((1, expected_known), (2, found_known))]
    found = kl_of(*parts)
    everything = set(range(64))
    for row in range(20):
        known = [everything if part.ids is None else set(part.ids[row].tolist()) - {-1} for part in parts]
        both = sorted(known[0] & known[1])
        p, q = (whole.logprobs[row].double().exp() for whole in wholes)
        events = [(float(p[i]), float(q[i])) for i in both]
        if len(both) < 64:
            events.append((1 - float(p[both].sum()), 1 - float(q[both].sum())))
        expected = sum(a * math.log(a / b) for a, b in events)
        assert float(found[row]) == pytest.approx(max(0, expected), abs=2e-5)
    assert (found <= token_kl(wholes[0].logprobs, wholes[1].logprobs) + 1e-5).all()
