"""One rank of a MoE layer whose ranks hold different tokens, in vLLM's own runner; a process of its own.

    python -m tests.vllm_mcmoe.parallel_rank '{"rank": 0, "dp": 2, "tp": 1, "ep": true, "port": 29501, ...}'

Prints "result " and JSON in one line: the largest difference to the experts' definition, the rows the router saw, ...

vLLM's groups, ranks, token counts and all2all manager are real. Its communicator for CPUs cannot gather; `gathers`
gives it the two collectives that the one for GPUs has, in gloo.
"""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed
from vllm.config import DeviceConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.models.utils import sequence_parallel_chunk

from tests.vllm_mcmoe.test_expert_weights import code_of, random_matrix
from vllm_mcmoe.checkpoint import FORMAT_VERSION, CheckpointConfig, ExpertBits, matrix_tensors
from vllm_mcmoe.errors import McmoeError
from vllm_mcmoe.kernels.packing import StoredMatrix
from vllm_mcmoe.kernels.reference import fused_experts
from vllm_mcmoe.quantization import McmoeConfig

LAYER = "model.layers.0.mlp.experts"
BITS = (1, 2, 3, 4)
CODES = tuple(map(code_of, BITS))
HIDDEN, INTERMEDIATE, TOP_K = 256, 512, 2
TOKENS = (3, 6)  # of each data parallel rank


def all_gatherv(self, tensors, dim=0, sizes=None):
    if isinstance(tensors, torch.Tensor):
        return all_gatherv(self, [tensors], dim, sizes)[0]
    gathered = []
    for tensor in tensors:
        parts = [tensor.new_empty(max(sizes), *tensor.shape[1:]) for _ in sizes]
        own = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        own[: len(tensor)] = tensor
        torch.distributed.all_gather(parts, own, group=self.device_group)
        gathered.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return gathered


def reduce_scatterv(self, tensor, dim=-1, sizes=None):
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    begin = sum(sizes[: self.rank_in_group])
    return total[begin : begin + sizes[self.rank_in_group]]


def projections(expert: int, bits: int) -> dict[str, StoredMatrix]:
    shapes = {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    return {name: random_matrix(bits, *shape, seed=10 * expert + i) for i, (name, shape) in enumerate(shapes.items())}


def checkpoint_tensors():
    for expert, bits in enumerate(BITS):
        for name, matrix in projections(expert, bits).items():
            for suffix, tensor in matrix_tensors(matrix, FORMAT_VERSION).items():
                yield f"{expert}.{name}.{suffix}", tensor


def expected(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Of the definition, with whole experts."""
    weights, ids = logits.softmax(-1).topk(TOP_K)
    gate_up, down = [], []
    for expert, bits in enumerate(BITS):
        parts = projections(expert, bits)
        gate, up = parts["gate_proj"], parts["up_proj"]
        both = {name: torch.cat([getattr(gate, name), getattr(up, name)]) for name in ("qweight", "scales")}
        gate_up.append(replace(gate, **both))
        down.append(parts["down_proj"])
    return fused_experts(x, weights / weights.sum(-1, keepdim=True), ids, gate_up, down)


def run(rank: int, dp: int, tp: int, ep: bool, port: int, gathers: bool, all2all_backend: str) -> dict:
    if gathers:
        CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv
    parallel = ParallelConfig(
        data_parallel_size=dp,
        data_parallel_rank=rank // tp,
        data_parallel_master_ip="127.0.0.1",
        tensor_parallel_size=tp,
        enable_expert_parallel=ep,
        all2all_backend=all2all_backend,
        distributed_executor_backend="mp",
    )
    parallel.data_parallel_master_port = port
    parallel._data_parallel_master_port_list = []
    config = VllmConfig(parallel_config=parallel, device_config=DeviceConfig("cpu"))
    config.model_config = SimpleNamespace(is_moe=True, dtype=torch.float32, hf_config=SimpleNamespace())
    quantization = McmoeConfig(CheckpointConfig({LAYER: ExpertBits.of_codes(CODES, CODES)}))
    with set_current_vllm_config(config):
        init_distributed_environment(tp, rank % tp, f"tcp://127.0.0.1:{port}", rank % tp, backend="gloo")
        initialize_model_parallel(tp, 1, backend="gloo")
        shares_sequence = parallel.use_sequence_parallel_moe
        runner = FusedMoEFactory(
            num_experts=len(BITS),
            top_k=TOP_K,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            prefix=LAYER,
            quant_config=quantization,
            params_dtype=torch.float32,
            renormalize=True,
            is_sequence_parallel=shares_sequence,
        )
        layer = runner.routed_experts
        assert set(layer.load_weights(checkpoint_tensors()))
        layer.quant_method.process_weights_after_loading(layer)

        generator = torch.Generator().manual_seed(rank // tp)
        x = torch.randn(TOKENS[rank // tp], HIDDEN, generator=generator)
        logits = torch.randn(len(x), len(BITS), generator=generator)
        wanted = expected(x, logits)
        if shares_sequence:
            x, logits, wanted = map(sequence_parallel_chunk, (x, logits, wanted))
        seen, select = [], runner.router.select_experts

        def select_experts(hidden_states, *arguments, **options):
            seen.append(len(hidden_states))
            return select(hidden_states, *arguments, **options)

        runner.router.select_experts = select_experts
        with set_forward_context(None, config, num_tokens=TOKENS[rank // tp]), torch.inference_mode():
            found = runner(x, logits)
    return {
        "difference": float((found - wanted).abs().max() / wanted.abs().max()),
        "tokens": len(x),
        "routed": seen,
        "shares_sequence": shares_sequence,
        "local_experts": layer.local_num_experts,
    }


def main() -> None:
    torch.set_num_threads(1)
    try:
        result = run(**json.loads(sys.argv[1]))
    except McmoeError as error:
        result = {"refused": str(error)}
    print("result", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
