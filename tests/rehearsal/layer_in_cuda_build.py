"""One MoE layer in the runner of vLLM's CUDA build, on CPU tensors, Triton interpreted; a process of its own.

Prints "result " and JSON: versions, the classes that vLLM chose, the error against the experts' definition.
"""

import json
import tempfile
from types import SimpleNamespace

from tests.rehearsal import pretended_cuda  # isort: skip - vLLM asks for its platform when it is imported
import torch
import triton
import vllm
import vllm.model_executor.layers.fused_moe.router.fused_topk_router as topk_router
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.platforms import current_platform

from tests.vllm_mcmoe.parallel_rank import BITS, HIDDEN, INTERMEDIATE, LAYER, TOP_K, checkpoint_tensors, expected
from vllm_mcmoe.checkpoint import CheckpointConfig, ExpertBits
from vllm_mcmoe.moe_method import select_backend
from vllm_mcmoe.quantization import McmoeConfig, register_with_vllm

TOKENS, PADDED = 9, 2


def run() -> dict:
    register_with_vllm()
    topk_router.ops.topk_softmax = pretended_cuda.topk_softmax
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    config.model_config = SimpleNamespace(is_moe=True, dtype=torch.float32, hf_config=SimpleNamespace())
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as rendezvous:
        init_distributed_environment(1, 0, f"file://{rendezvous.name}", 0, backend="gloo")
        initialize_model_parallel(1, 1, backend="gloo")
        runner = FusedMoEFactory(
            num_experts=len(BITS),
            top_k=TOP_K,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            prefix=LAYER,
            quant_config=McmoeConfig(CheckpointConfig({LAYER: ExpertBits(BITS, BITS)})),
            params_dtype=torch.float32,
            renormalize=True,
        )
        layer = runner.routed_experts
        loaded = sorted(set(layer.load_weights(checkpoint_tensors())))
        layer.quant_method.process_weights_after_loading(layer)
        layer.quant_method.process_weights_after_loading(layer)  # as vLLM may

        x, logits = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, len(BITS))
        is_padding = torch.arange(TOKENS) >= TOKENS - PADDED
        with set_forward_context(None, config, num_tokens=TOKENS, is_padding=is_padding), torch.inference_mode():
            found = runner._forward_impl(x, logits, None)
    wanted = expected(x, logits)[:-PADDED]
    return {
        "vllm": vllm.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "is_cuda": current_platform.is_cuda(),
        "backend": select_backend(),
        "method": type(runner._quant_method).__name__,
        "is_monolithic": runner.is_monolithic,
        "loaded": loaded,
        "parameters left": [name for name, _ in layer.named_parameters()],
        "error": float((found[:-PADDED] - wanted).norm() / wanted.norm()),
        "padding": float(found[-PADDED:].abs().max()),
    }


if __name__ == "__main__":
    print("result", json.dumps(run()))
