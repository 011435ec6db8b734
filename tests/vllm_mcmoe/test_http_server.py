"""`vllm serve OUT --quantization mcmoe` as a user runs it: compiled, bfloat16, 4-bit attention, over HTTP.

The checkpoint prunes a quarter of its expert activations; the server is told to prune 40% instead.
"""

import json
import re
import time
import urllib.request

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer, PreTrainedModel

from tests.vllm_mcmoe.serving import (
    bfloat16_range,
    expected_logprobs,
    pruning_rules,
    with_int8_activations,
    with_int8_linears,
)
from vllm_mcmoe.calibration.evaluate.checkpoint_weights import load_dequantized
from vllm_mcmoe.local_server import serve

pytestmark = pytest.mark.engine

PROMPT = "And the LORD said unto Moses,"


OWN_TARGET, TARGET = 0.25, 0.4
SECONDS_BETWEEN_REPORTS = 10


@pytest.fixture(scope="module")
def client(pruned_checkpoint, tmp_path_factory):
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
        "--hf-overrides",
        json.dumps({"mcmoe_pruning": TARGET}),
    )
    metrics = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics"))}
    with serve(pruned_checkpoint, options, log_file=log_file, environment=metrics) as url:
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


def test_logprobs_are_those_of_the_dequantised_model(client, pruned_checkpoint):
    completion = complete(client, logprobs=1).choices[0]
    tokenizer = AutoTokenizer.from_pretrained(pruned_checkpoint)
    tokens = tokenizer(PROMPT + completion.text, add_special_tokens=False)["input_ids"]
    generated = len(completion.logprobs.token_logprobs)
    served = torch.tensor(completion.logprobs.token_logprobs)

    def model(target: float) -> PreTrainedModel:
        rules = pruning_rules(pruned_checkpoint, target)
        model = with_int8_activations(load_dequantized(pruned_checkpoint), rules)
        return with_int8_linears(model, pruned_checkpoint)

    def beyond_rounding(target: float) -> torch.Tensor:
        lowest, highest = (bound[-generated:] for bound in bfloat16_range(model(target), tokens))
        return (lowest - served).clamp(min=0) + (served - highest).clamp(min=0)

    difference = (served - expected_logprobs(model(TARGET), tokens)[-generated:]).abs()
    beyond, beyond_at_the_other_target = beyond_rounding(TARGET), beyond_rounding(OWN_TARGET)
    print(f"difference: mean {difference.mean():.4f}; beyond rounding: {beyond.mean():.4f}, largest {beyond.max():.4f}")
    assert difference.mean() < 0.05
    # bfloat16 has 8 bits of mantissa: logits of size 10 are exact to about 0.04
    assert beyond.max() < 0.1
    assert beyond.mean() < 0.02
    # ... which tells what the server was told from what the checkpoint says (10 and 20 times as far in two checkpoints)
    assert beyond_at_the_other_target.mean() > 3 * beyond.mean()


def test_metrics_show_the_fraction_that_was_really_pruned(client):
    complete(client)
    deadline = time.monotonic() + 60
    time.sleep(SECONDS_BETWEEN_REPORTS + 1)  # vLLM's warm-up and the other tests are counted now
    before = counters = read_counters(client)
    for _ in range(3):
        complete(client)
    while counters == before and time.monotonic() < deadline:
        time.sleep(1)
        counters = read_counters(client)
    seen, dropped = (counters[name] - before[name] for name in ("expert_activations", "pruned_expert_activations"))
    print(f"{dropped:.0f} of {seen:.0f} expert activations pruned")
    # 100 tokens of one sentence are no sample of the calibration text: between the checkpoint's 25% and 50%
    assert 0.3 < dropped / seen < 0.5


def read_counters(client: OpenAI) -> dict[str, float]:
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/metrics")) as response:
        found = re.findall(r"^mcmoe_(\w+)_total(?:\{.*\})? (\S+)$", response.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}
