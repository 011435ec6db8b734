"""Tiny models in the forms that real ones are released in, and what a person would make of them in 16 bits."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from tests.tiny_models import edit_config

LARGEST_E4M3 = 448.0
INT4_GROUP = 32
INT4 = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=INT4_GROUP),
)


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def is_linear(name: str) -> bool:
    """Of a decoder layer, as releases quantise them: routers, norms, embeddings and output heads they leave."""
    return ".layers." in name and name.endswith("_proj.weight")


def in_fp8(model: Path, block: tuple[int, int] = (128, 128)) -> Path:
    """Linears and experts in E4M3 with a scale per block, in place."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(filter(is_linear, tensors)):
            weight = tensors[name].float()
            rows, columns = (-(-size // part) for size, part in zip(weight.shape, block, strict=True))
            scales = torch.empty(rows, columns)
            codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
            for i in range(rows):
                for j in range(columns):
                    at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
                    scales[i, j] = weight[at].abs().max() / LARGEST_E4M3
                    codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            tensors[name] = codes
            tensors[name.replace(".weight", ".weight_scale_inv")] = scales

    edit_tensors(model, change)
    form = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    edit_config(model, quantization_config=form)
    return model


def in_int4(model: Path) -> Path:
    """Experts as packed integers in groups, in place."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp.experts." in name]:
            base, weight = name.removesuffix(".weight"), tensors.pop(name).float()
            groups = weight.unflatten(1, (-1, INT4_GROUP))
            scales = (groups.abs().amax(-1) / 7.5).bfloat16().float()
            rounded = (groups / scales[..., None]).round().clamp(-8, 7) * scales[..., None]
            stored = {"weight": rounded.flatten(1), "weight_scale": scales}
            for suffix, tensor in PackedQuantizationCompressor.compress(stored, INT4).items():
                tensors[f"{base}.{suffix}"] = tensor.bfloat16() if suffix == "weight_scale" else tensor

    edit_tensors(model, change)
    form = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": INT4.model_dump(mode="json", exclude_none=True)},
        "ignore": ["lm_head", "re:.*self_attn.*"],
    }
    edit_config(model, quantization_config=form)
    return model


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # magnitudes by code; a fourth bit is the sign
LARGEST_FP4_POWER = 2  # 6 lies below 2**3


def in_mxfp4(model: Path) -> Path:
    """gpt-oss's experts in blocks of 32 along their inputs, in place."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            blocks = tensors.pop(name).float().transpose(1, 2).unflatten(2, (-1, 32))  # [experts, out, blocks, 32]
            powers = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30).log2().floor() - LARGEST_FP4_POWER
            scaled = blocks / 2**powers
            codes = (scaled.abs()[..., None] - FP4).abs().argmin(-1) + 8 * (scaled < 0)
            packed = codes[..., 0::2] | codes[..., 1::2] << 4
            tensors[f"{name}_blocks"] = packed.to(torch.uint8)
            tensors[f"{name}_scales"] = (powers[..., 0] + 127).to(torch.uint8)

    edit_tensors(model, change)
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(model, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": left})
    return model


def without_form(model: Path) -> None:
    """config.json as of a model in 16 bits, in place."""
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (model / "config.json").write_text(json.dumps(config))
