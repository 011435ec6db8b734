"""Write a quantised checkpoint of a published model's shape, without ever having the model.

    python benchmarks/synthetic_checkpoint.py mixtral-8x7b OUT [--bits 2.5] [--codes trellis] [--linear-bits 4]
        [--layers N]

Codes are random bytes and scales make every matrix keep the variance of its input, so that hidden states stay of normal
size, tokens differ, and the router spreads them over all experts. Experts of a layer have widths from 1 to 4 that
average --bits, scales and zeros included. Tensors are written layer by layer; memory is one layer's. The
tokenizer knows as many words as the model has embeddings, w0, w1, ...: the model answers nonsense, at the real model's
speed and in its memory.

A pruning rule comes with it that is switched off. Its mask routers are random: what they drop says nothing about
quality, but --hf-overrides '{"mcmoe_pruning": 0.3}' drops 30% of the expert activations.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_mcmoe.calibration.allocate.bits import written_bits
from vllm_mcmoe.calibration.checkpoint.writer import Shard, shard_name, write_document, write_index
from vllm_mcmoe.calibration.common.progress import progress
from vllm_mcmoe.calibration.matrix.grids import scale_ranges, storable_scales
from vllm_mcmoe.calibration.matrix.linears import PACKED, SCALE, SHAPE, linear_config
from vllm_mcmoe.checkpoint import FORMAT_VERSION, CheckpointConfig, ExpertBits
from vllm_mcmoe.kernels.packing import (
    GROUP_SIZE,
    KINDS,
    Code,
    Kind,
    StoredMatrix,
    packed_bytes_per_group,
)
from vllm_mcmoe.kernels.trellis import level_table, stored_matrix
from vllm_mcmoe.pruning import PruningRules

MASK_ROUTER_RANK = 8  # as mcmoe prune trains them
PRUNING_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4)


@dataclass(frozen=True)
class Shape:
    """A published model: config.json, and its tensors' names relative to a decoder layer."""

    config: dict
    experts: str
    router: str
    gate_up_down: tuple[str, str, str]

    @property
    def num_experts(self) -> int:
        return self.config.get("num_local_experts") or self.config["num_experts"]

    @property
    def intermediate(self) -> int:
        return self.config.get("moe_intermediate_size") or self.config["intermediate_size"]

    @property
    def head_size(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]


SHAPES = {
    "mixtral-8x7b": Shape(
        {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": 32,
            "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "rope_theta": 1e6,
        },
        "block_sparse_moe.experts", "block_sparse_moe.gate", ("w1", "w3", "w2"),
    ),
    "qwen3-30b-a3b": Shape(
        {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 48,
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "vocab_size": 151936, "norm_topk_prob": True, "rope_theta": 1e6,
        },
        "mlp.experts", "mlp.gate", ("gate_proj", "up_proj", "down_proj"),
    ),
}  # fmt: skip


def mixed_widths(bits: float, experts: int) -> tuple[int, ...]:
    """Widths of which the written average comes close to `bits` from below.

    An eighth of the experts has 4 bits and an eighth has 1, where that can be afforded; the others are widened in turn.
    """

    def affordable(widths: list[int]) -> bool:
        return sum(map(written_bits, widths)) <= bits * experts

    eighth = experts // 8
    widths = [4] * eighth + [2] * (experts - 2 * eighth) + [1] * eighth
    if not affordable(widths):
        widths = [1] * experts
    wide, narrow = (
        [expert for expert in range(experts) if (widths[expert] > 1) == is_wide] for is_wide in (True, False)
    )
    for expert in [*wide * 2, *narrow * 3]:
        wider = [*widths[:expert], min(widths[expert] + 1, 4), *widths[expert + 1 :]]
        if affordable(wider):
            widths = wider
    return tuple(widths)


class Writer:
    """The tensors of one synthetic model. bits: of the experts, None for bfloat16; kind: of their codes."""

    def __init__(
        self, shape: Shape, layers: int, bits: float | None, linear_bits: int, kind: Kind = "scalar", seed: int = 0
    ):
        self.shape, self.layers = shape, layers
        self.codes = None
        if bits is not None:
            self.codes = tuple(Code(width, kind) for width in mixed_widths(bits, shape.num_experts))
        self.linear_bits = linear_bits
        self.random = np.random.default_rng(seed)

    def expert_layers(self) -> list[str]:
        return [f"model.layers.{layer}.{self.shape.experts}" for layer in range(self.layers)]

    def layer(self, index: int) -> Shard:
        shard, config, shape = Shard(), self.shape.config, self.shape
        base, hidden = f"model.layers.{index}", config["hidden_size"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shard.add(f"{base}.{norm}.weight", torch.ones(hidden, dtype=torch.bfloat16))
        heads = shape.head_size * config["num_attention_heads"]
        key_values = shape.head_size * config["num_key_value_heads"]
        for name, rows, columns in (
            ("q_proj", heads, hidden),
            ("k_proj", key_values, hidden),
            ("v_proj", key_values, hidden),
            ("o_proj", hidden, heads),
        ):
            self._linear(shard, f"{base}.self_attn.{name}", rows, columns)
        if config["model_type"] == "qwen3_moe":
            for norm in ("q_norm", "k_norm"):
                shard.add(f"{base}.self_attn.{norm}.weight", torch.ones(shape.head_size, dtype=torch.bfloat16))
        shard.add(f"{base}.{shape.router}.weight", self._matrix(shape.num_experts, hidden))
        gate, up, down = shape.gate_up_down
        for expert in range(shape.num_experts):
            for projection in (gate, up, down):
                rows, columns = (hidden, shape.intermediate) if projection == down else (shape.intermediate, hidden)
                name = f"{base}.{shape.experts}.{expert}.{projection}"
                if self.codes is None:
                    shard.add(f"{name}.weight", self._matrix(rows, columns))
                else:
                    shard.add_matrix(name, self._packed(self.codes[expert], rows, columns), FORMAT_VERSION)
        return shard

    def rest(self) -> Shard:
        shard, config = Shard(), self.shape.config
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        shard.add("model.embed_tokens.weight", self._matrix(vocabulary, hidden, deviation=1.0))
        shard.add("lm_head.weight", self._matrix(vocabulary, hidden))
        shard.add("model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16))
        return shard

    def _bytes(self, *sizes: int) -> torch.Tensor:
        content = bytearray(self.random.bytes(math.prod(sizes)))
        return torch.frombuffer(content, dtype=torch.uint8).reshape(sizes)

    def _matrix(self, rows: int, columns: int, deviation: float | None = None) -> torch.Tensor:
        values = self.random.standard_normal((rows, columns), dtype=np.float32)
        return (torch.from_numpy(values) * (columns**-0.5 if deviation is None else deviation)).bfloat16()

    def _packed(self, code: Code, rows: int, columns: int) -> StoredMatrix:
        """Uniform codes around their mean, which is the zero: variance (4^bits - 1) / 12, or that of the levels."""
        bits, groups = code.bits, (rows, columns // GROUP_SIZE)
        trellis = code.kind == "trellis"
        variance = float(level_table(bits).float().var(correction=0)) if trellis else (4**bits - 1) / 12
        scales = torch.full(groups, columns**-0.5 / math.sqrt(variance))
        scales = storable_scales(scales, "float8", scale_ranges(scales, bits, "float8")).half()
        qweight = self._bytes(*groups, packed_bytes_per_group(bits))
        return stored_matrix(code, qweight, scales)

    def _linear(self, shard: Shard, name: str, rows: int, columns: int) -> None:
        if self.linear_bits == 16:
            shard.add(f"{name}.weight", self._matrix(rows, columns))
            return
        # codes of pack-quantized are symmetric, -8 ... 7 at 4 bits
        scale = columns**-0.5 / math.sqrt((4**self.linear_bits - 1) / 12)
        packed = self._bytes(rows, columns * self.linear_bits // 8).view(torch.int32)
        shard.add(f"{name}.{PACKED}", packed)
        shard.add(f"{name}.{SCALE}", torch.full((rows, columns // GROUP_SIZE), scale, dtype=torch.bfloat16))
        shard.add(f"{name}.{SHAPE}", torch.tensor([rows, columns]))

    def pruning_rules(self) -> PruningRules:
        """Mask routers whose scores are standard normal, independent of token and expert."""
        config, generator = self.shape.config, torch.Generator().manual_seed(0)
        top_k, hidden, experts = config["num_experts_per_tok"], config["hidden_size"], self.shape.num_experts
        quantiles = [level * top_k / (top_k - 1) for level in PRUNING_LEVELS]
        thresholds = torch.tensor([NormalDist().inv_cdf(max(quantile, 1e-9)) for quantile in quantiles])
        tensors = {}
        for layer in self.expert_layers():
            features = torch.randn(experts, MASK_ROUTER_RANK, generator=generator)
            parts = {
                "renormalize": torch.tensor(0.2),
                "thresholds": thresholds[:, None].repeat(1, top_k - 1),
                "weight_slopes": torch.zeros(2, top_k - 1),
                "expert_bias": torch.zeros(experts),
                "projection": torch.randn(MASK_ROUTER_RANK, hidden, generator=generator) * hidden**-0.5,
                "expert_features": features / features.norm(dim=1, keepdim=True),
            }
            tensors.update({f"{layer}.{part}": tensor for part, tensor in parts.items()})
        return PruningRules.create("otp", 0.0, top_k, PRUNING_LEVELS, tensors)


def write_checkpoint(
    out: Path,
    shape: Shape,
    *,
    layers: int | None = None,
    bits: float | None = 2.5,
    linear_bits: int = 4,
    kind: Kind = "scalar",
) -> None:
    """config.json comes last: a directory without one is unfinished. bits None writes the experts in bfloat16."""
    layers = shape.config["num_hidden_layers"] if layers is None else layers
    writer = Writer(shape, layers, bits, linear_bits, kind)
    out.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, dict[str, int]] = {}

    def write(number: int, shard: Shard) -> None:
        name = shard_name(number, layers + 1)
        shard.write(out / name)
        sizes[name] = shard.nbytes

    for index in progress(range(layers), "writing layers"):
        write(index, writer.layer(index))
    write(layers, writer.rest())
    write_index(out, sizes)
    _word_tokenizer(shape.config["vocab_size"]).save_pretrained(out)
    config = {
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        **shape.config,
        "num_hidden_layers": layers,
    }
    if writer.codes is not None:
        rules = writer.pruning_rules()
        (out / rules.config.file_name).write_bytes(rules.serialize())
        unquantised = ["lm_head", rf"re:.*\.{shape.router}$"]
        quantization = CheckpointConfig(
            {name: ExpertBits.of_codes(writer.codes, writer.codes) for name in writer.expert_layers()},
            linear=None if linear_bits == 16 else linear_config(linear_bits, GROUP_SIZE, unquantised),
            pruning=rules.config,
            average_bits=_average_bits(shape, sizes.values()),
        )
        config["quantization_config"] = quantization.to_dict()
    write_document(out / "config.json", config)


def _average_bits(shape: Shape, shards: Iterable[dict[str, int]]) -> dict[str, float]:
    written = sum(size for shard in shards for name, size in shard.items() if f".{shape.experts}." in name)
    weights = 3 * shape.num_experts * shape.config["hidden_size"] * shape.intermediate
    layers = sum(any(f".{shape.experts}." in name for name in shard) for shard in shards)
    return {"experts": 8 * written / (weights * layers)}


def _word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--bits", type=float, default=2.5, help="average bits of the experts, scales and zeros included"
    )
    parser.add_argument("--codes", choices=KINDS, default="scalar", help="of the experts")
    parser.add_argument("--linear-bits", type=int, choices=(4, 8, 16), default=4, help="of attention")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    arguments = parser.parse_args()
    write_checkpoint(
        arguments.out,
        SHAPES[arguments.shape],
        layers=arguments.layers,
        bits=arguments.bits,
        linear_bits=arguments.linear_bits,
        kind=arguments.codes,
    )
    total = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
