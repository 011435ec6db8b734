"""The pieces of benchmarks/upcycle.py, on a tiny random Llama."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "upcycle.py"


@pytest.fixture(scope="module")
def upcycle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("upcycle", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            "max_position_embeddings": 64,
        }
        | changes
    )
    # Weights of 8 bits, so that writing them in 16 loses nothing
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def write(upcycle: ModuleType, dense: LlamaForCausalLM, routers: list[torch.Tensor], directory: Path) -> None:
    save_file(dict(upcycle.moe_tensors(dense, routers)), directory / "model.safetensors", metadata={"format": "pt"})
    upcycle.moe_config(dense.config).save_pretrained(directory)


def test_the_mixture_computes_what_the_dense_model_does(upcycle, tmp_path):
    dense = tiny_llama()
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    inputs = upcycle.ffn_inputs(dense, tokens)
    assert [x.shape for x in inputs] == [(128, 48), (128, 48)]
    routers = [upcycle.router_weights(x, upcycle.spherical_kmeans(x, 4, seed=0), 1.0) for x in inputs]
    write(upcycle, dense, routers, tmp_path)
    upcycle.verify(dense, tmp_path, tokens)


def test_a_mixture_that_computes_something_else_is_refused(upcycle, tmp_path):
    dense = tiny_llama()
    write(upcycle, dense, [torch.ones(4, 48)] * 2, tmp_path)
    dense.model.layers[1].mlp.up_proj.weight.data *= 1.01
    with pytest.raises(ValueError, match="logits differ from the dense model's"):
        upcycle.verify(dense, tmp_path, torch.arange(32)[None])


def test_clusters_are_those_of_the_directions_and_as_uneven_as_they_are(upcycle):
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(16)[:3]
    members = torch.tensor([0] * 300 + [1] * 60 + [2] * 12)
    x = directions[members] + 0.05 * torch.randn(len(members), 16, generator=generator)
    x *= torch.rand(len(members), 1, generator=generator) * 10 + 0.1  # lengths mean nothing
    centroids = upcycle.spherical_kmeans(x, 3, seed=0)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(3))
    found = torch.bincount((x @ centroids.t()).argmax(1), minlength=3)
    assert sorted(found.tolist()) == [12, 60, 300]


def test_routers_choose_by_centroid_with_the_median_gap_asked_for(upcycle):
    x = torch.randn(500, 24, generator=torch.Generator().manual_seed(1))
    centroids = upcycle.spherical_kmeans(x, 4, seed=0)
    logits = x @ upcycle.router_weights(x, centroids, median_gap=1.0).t()
    assert torch.equal(logits.argmax(1), (x @ centroids.t()).argmax(1))
    best, second = logits.topk(2, dim=1).values.unbind(1)
    assert float((best - second).median()) == pytest.approx(1.0, abs=1e-4)


def test_a_model_with_biases_is_refused(upcycle):
    with pytest.raises(ValueError, match="attention_bias True"):
        upcycle.moe_config(tiny_llama(attention_bias=True).config)
