"""The fused-MoE method: creates the expert parameters, hands them to a kernel backend and calls it."""

import functools
import os

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from vllm_mcmoe.checkpoint import ExpertBits
from vllm_mcmoe.errors import UnsupportedModelError
from vllm_mcmoe.expert_loading import expert_loading
from vllm_mcmoe.expert_weights import LayerWeights, Shard
from vllm_mcmoe.kernels.packing import GROUP_SIZE
from vllm_mcmoe.pruning import LayerPruning
from vllm_mcmoe.pruning_monitor import PruningMonitor
from vllm_mcmoe.support import check_layer

BACKEND_VARIABLE = "VLLM_MCMOE_BACKEND"


def select_backend() -> str:
    """`VLLM_MCMOE_BACKEND` where set, else by platform. Raises UnsupportedModelError for a platform without one."""
    chosen = os.environ.get(BACKEND_VARIABLE)
    if chosen:
        return chosen
    if current_platform.is_cpu():
        return "cpu"
    if current_platform.is_cuda_alike():
        return "triton"
    raise UnsupportedModelError(
        f"vllm-mcmoe has no kernels for the platform {current_platform.device_name!r}; it runs on CPUs, CUDA and ROCm. "
        f"Set {BACKEND_VARIABLE}=reference to run there all the same, slowly."
    )


class McmoeMoEMethod(FusedMoEMethodBase):
    """Experts of different bit-widths in one layer; activations int8 per token and group of 128.

    pruning   the rule that drops some of a token's experts, or None
    """

    def __init__(self, moe: FusedMoEConfig, bits: ExpertBits, pruning: LayerPruning | None = None):
        super().__init__(moe)
        self.bits = bits
        self.pruning = pruning
        self.backend = select_backend()
        self.weights: LayerWeights | None = None

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None  # describes weights of vLLM's own kernels

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Registers w13_* and w2_* in checkpoint layout for `num_experts` local experts.

        They get memory with the first tensor, and none where the start cache has the layer: their loaders note what
        they are offered, and read nothing.
        intermediate_size_per_partition is not what this rank gets: groups of 128 stay whole (Shard.groups).
        """
        check_layer(
            layer.layer_name,
            self.bits,
            num_experts=layer.global_num_experts,
            intermediate_size=self.moe.intermediate_size,
            tp_size=self.moe.tp_size,
            activation=layer.activation.value,
            backend=self.backend,
            has_bias=self.moe.has_bias,
            weight_on_input=layer.apply_router_weight_on_input,
            swiglu_limit=self.moe.swiglu_limit,
            swiglu_alpha=self.moe.swiglu_alpha,
            swiglu_beta=self.moe.swiglu_beta,
            fused_shared_experts=layer.expert_map_manager.num_fused_shared_experts,
            own_class=_own_class(layer, self.moe),
        )
        shard = Shard(
            expert_ids=_local_expert_ids(layer, num_experts),
            tp_rank=self.moe.tp_rank,
            tp_size=self.moe.tp_size,
        )
        self.weights = LayerWeights(
            layer.layer_name,
            shard,
            gate_up_bits=[self.bits.gate_up[expert] for expert in shard.expert_ids],
            down_bits=[self.bits.down[expert] for expert in shard.expert_ids],
            model_hidden_size=hidden_size,
            model_intermediate_size=self.moe.intermediate_size,
        )
        config = get_current_vllm_config()
        self.loading = expert_loading(config, self.backend)
        self.loading.begin(self.weights, layer.activation.value)
        for name, parameter in self.weights.parameters():
            layer.register_parameter(name, parameter)
        # `--load-format dummy` fills parameters without calling their loaders
        self.check_loaded = config.load_config.load_format != "dummy"

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Puts the experts in the backend's layout in the place of the checkpoint's."""
        if self.weights is None:
            return  # vLLM may call this twice; the first call has done it
        if self.check_loaded:
            self.weights.check_complete()
        device = next(parameter.device for _, parameter in self.weights.parameters())
        for name, _ in list(self.weights.parameters()):
            delattr(layer, name)
        layer.mcmoe_experts = self.loading.finish(self.weights, layer.activation.value)
        if self.pruning is not None:
            counts = self.loading.activation_counts(device)
            layer.mcmoe_pruning = self.pruning.on_device(
                device, self.backend, dtype=self.moe.in_dtype, counts=counts
            )
            if self.moe.tp_rank == 0 and self.moe.ep_rank == 0:  # every rank prunes the same tokens
                monitor().watch(counts)
        self.weights = self.loading = None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: nn.Module | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [tokens, hidden], topk_weights and topk_ids [tokens, top_k] -> [tokens, hidden] in x.dtype."""
        if self.pruning is not None:
            topk_weights, topk_ids = layer.mcmoe_pruning(x, topk_weights, topk_ids)
        if layer.expert_map is not None:
            local = layer.expert_map[topk_ids.clamp(min=0).long()]
            topk_ids = torch.where(topk_ids >= 0, local.to(topk_ids.dtype), topk_ids)
        hidden_size = x.shape[-1]
        missing = -hidden_size % GROUP_SIZE
        if not missing:
            return layer.mcmoe_experts(x, topk_weights, topk_ids)
        return layer.mcmoe_experts(F.pad(x, (0, missing)), topk_weights, topk_ids)[:, :hidden_size].contiguous()


@functools.cache
def monitor() -> PruningMonitor:
    """This process's."""
    return PruningMonitor()


def _own_class(layer: RoutedExperts, moe: FusedMoEConfig) -> str | None:
    """Name of a class that computes something of its own around the MoE method, or None.

    A model may bring a class of layers, and from vLLM 0.33 on one of MoE configs, which then says what is left to do.
    """
    if type(layer).forward_modular is not RoutedExperts.forward_modular:
        return type(layer).__name__
    return None if type(moe) is FusedMoEConfig else type(moe).__name__


def _local_expert_ids(layer: RoutedExperts, num_local: int) -> tuple[int, ...]:
    """Global ids of this rank's experts in local order; all of them without expert parallelism."""
    ids = [0] * num_local
    for expert in range(layer.global_num_experts):
        local = layer._map_global_expert_id_to_local_expert_id(expert)
        if local != -1:
            ids[local] = expert
    return tuple(ids)
