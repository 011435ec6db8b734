"""`vllm serve OUT --quantization mcmoe` as a user runs it: compiled, bfloat16, 4-bit attention, over HTTP."""

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer

from tests.vllm_mcmoe.serving import expected_logprobs, with_int8_activations
from vllm_mcmoe.calibration.checkpoint_weights import load_dequantized
from vllm_mcmoe.local_server import serve

pytestmark = pytest.mark.engine

PROMPT = "And the LORD said unto Moses,"


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory):
    log_file = tmp_path_factory.mktemp("server") / "server.log"
    options = (
        "--quantization",
        "mcmoe",
        "--served-model-name",
        "tiny",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "4",
    )
    with serve(checkpoint, options, log_file=log_file) as url:
        yield OpenAI(base_url=url, api_key="none")


def complete(client: OpenAI, **options):
    return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, **options)


def test_streaming_delivers_the_same_text_in_pieces(client):
    whole = complete(client).choices[0].text
    pieces = [event.choices[0].text for event in complete(client, stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def test_concurrent_requests_are_answered_like_single_ones(client):
    single = complete(client).choices[0].text
    batch = client.completions.create(model="tiny", prompt=[PROMPT] * 4, max_tokens=24, temperature=0)
    # batched matrix products may round another way in bfloat16 and turn a near tie; the beginnings agree
    assert all(choice.text[:20] == single[:20] for choice in batch.choices)


def test_logprobs_are_those_of_the_dequantised_model(client, checkpoint):
    completion = complete(client, logprobs=1).choices[0]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(PROMPT + completion.text, add_special_tokens=False)["input_ids"]
    generated = len(completion.logprobs.token_logprobs)
    expected = expected_logprobs(with_int8_activations(load_dequantized(checkpoint)), tokens)[-generated:]
    difference = (torch.tensor(completion.logprobs.token_logprobs) - expected).abs()
    print(f"difference: mean {difference.mean():.4f}, largest {difference.max():.4f}")
    # bfloat16 has 8 bits of mantissa: logits of size 10 are exact to about 0.04, and layers add up
    assert difference.max() < 0.2
    assert difference.mean() < 0.05
