"""Random models of real transformers classes, small enough to quantise and serve in seconds."""

import shutil
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def make_qwen3(directory: Path, tokenizer_from: Path, **changes) -> Path:
    """A random Qwen3-MoE: a dense layer, then two MoE layers of 8 experts, top-3; hidden and intermediate 128."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # the default 0.02 gives such a small model nearly uniform predictions
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes}))
    if not model.config.tie_word_embeddings:  # a tied head would give logits of hundreds
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.bfloat16().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(tokenizer_from / name, directory / name)
    return directory
