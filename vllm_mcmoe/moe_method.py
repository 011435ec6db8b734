"""The fused-MoE method: creates the expert parameters, hands them to a kernel backend and calls it."""

import functools
import os

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_ep_group, get_tensor_model_parallel_rank
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.platforms import current_platform

from vllm_mcmoe.checkpoint import ExpertBits
from vllm_mcmoe.errors import UnsupportedModelError
from vllm_mcmoe.expert_loading import expert_loading
from vllm_mcmoe.expert_weights import LayerWeights, Shard
from vllm_mcmoe.kernels.packing import GROUP_SIZE, Code
from vllm_mcmoe.pruning import LayerPruning
from vllm_mcmoe.pruning_monitor import PruningMonitor
from vllm_mcmoe.start_report import StartReport
from vllm_mcmoe.support import check_cpu_routing, check_layer, check_options, check_parallelism, expert_function

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

    version       of the checkpoint's format
    exact_names   whether tensors come under the names of LayerWeights.exact_parameters
    pruning       the rule that drops some of a token's experts, or None
    model_codes   of the experts of all layers, where this is not the only one
    report        told when the model's experts are loaded, or None

    Where ranks hold different tokens, data or sequence parallel, each routes its own, and `apply` gathers them and
    shares out the sums, as vLLM's modular kernels do. vLLM would gather hidden states before routing for a method
    without one, but masks padding by this rank's tokens while it routes.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        bits: ExpertBits,
        version: int,
        pruning: LayerPruning | None = None,
        model_codes: frozenset[Code] = frozenset(),
        exact_names: bool = False,
        report: StartReport | None = None,
    ):
        super().__init__(moe)
        self.bits, self.version = bits, version
        self.model_codes = model_codes | bits.used_codes
        self.pruning = pruning
        self.exact_names = exact_names
        self.report = report
        self.exact_parameters: list[str] = []
        self.backend = select_backend()
        self.weights: LayerWeights | None = None

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None  # describes weights of vLLM's own kernels

    @property
    def supports_internal_mk(self) -> bool:
        """Whether vLLM leaves the tokens of other ranks to this method."""
        return self.moe.dp_size > 1 or self.moe.is_sequence_parallel

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
            top_k=self.moe.experts_per_token,
            weight_on_input=layer.apply_router_weight_on_input,
            fused_shared_experts=layer.expert_map_manager.num_fused_shared_experts,
            own_class=_own_class(layer, self.moe),
        )
        function = expert_function(
            layer.layer_name,
            layer.activation.value,
            limit=self.moe.swiglu_limit,
            alpha=self.moe.swiglu_alpha,
            beta=self.moe.swiglu_beta,
        )
        config = get_current_vllm_config()
        check_options(layer.layer_name, config, self.backend)
        check_parallelism(
            layer.layer_name,
            gathers_tokens=self.supports_internal_mk,
            can_gather=not self.supports_internal_mk or _can_gather(),
            all2all_backend=self.moe.moe_parallel_config.all2all_backend,
            pcp_size=self.moe.pcp_size,
        )
        shard = Shard(
            expert_ids=_local_expert_ids(layer, num_experts),
            tp_rank=self.moe.tp_rank,
            tp_size=self.moe.tp_size,
        )
        self.weights = LayerWeights(
            layer.layer_name,
            shard,
            gate_up_codes=[self.bits.gate_up_codes[expert] for expert in shard.expert_ids],
            down_codes=[self.bits.down_codes[expert] for expert in shard.expert_ids],
            model_hidden_size=hidden_size,
            model_intermediate_size=self.moe.intermediate_size,
            function=function,
            has_bias=self.moe.has_bias,
            version=self.version,
        )
        self.loading = expert_loading(config, self.backend)
        self.loading.begin(self.weights)
        for name, parameter in self.weights.parameters():
            layer.register_parameter(name, parameter)
        if self.exact_names:
            for name, parameter in self.weights.exact_parameters(layer.global_num_experts):
                layer.register_parameter(name, parameter)
                self.exact_parameters.append(name)
        # `--load-format dummy` fills parameters without calling their loaders
        self.check_loaded = config.load_config.load_format != "dummy"

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Puts the experts in the backend's layout in the place of the checkpoint's."""
        if self.weights is None:
            return  # vLLM may call this twice; the first call has done it
        if current_platform.is_cpu():
            _check_cpu_routing(layer.layer_name, self.loading.config)
        if self.check_loaded:
            self.weights.check_complete()
        device = next(parameter.device for _, parameter in self.weights.parameters())
        for name in (*(name for name, _ in self.weights.parameters()), *self.exact_parameters):
            delattr(layer, name)
        layer.mcmoe_experts = self.loading.finish(self.weights)
        top_k, dtype = self.moe.experts_per_token, self.moe.in_dtype
        self.loading.compile_kernels(layer.mcmoe_experts, self.model_codes, top_k, dtype, layer.expert_map)
        self.weights.finished = True
        if self.pruning is not None:
            counts = self.loading.activation_counts(device)
            layer.mcmoe_pruning = self.pruning.on_device(device, self.backend, dtype=self.moe.in_dtype, counts=counts)
            # Tensor parallel ranks prune the same tokens, unless they share them out.
            if self.moe.is_sequence_parallel or get_tensor_model_parallel_rank() == 0:
                monitor().watch(counts)
        if self.report is not None and self.loading.complete:
            self.report.tell(self.loading.config, self.backend, device)
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
        if layer.apply_router_weight_on_input:  # of one expert a token, see check_layer
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if not self.supports_internal_mk:
            return _computed(layer, x, topk_weights, topk_ids)
        group, shares_sequence = get_ep_group(), self.moe.is_sequence_parallel
        x, topk_weights, topk_ids = group.dispatch(x, topk_weights, topk_ids, is_sequence_parallel=shares_sequence)
        return group.combine(_computed(layer, x, topk_weights, topk_ids), shares_sequence)


def _computed(
    layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """This rank's part of the experts' sums, [tokens, hidden]; the kernels want whole groups of hidden features."""
    hidden_size = x.shape[-1]
    missing = -hidden_size % GROUP_SIZE
    if not missing:
        return layer.mcmoe_experts(x, topk_weights, topk_ids, layer.expert_map)
    out = layer.mcmoe_experts(F.pad(x, (0, missing)), topk_weights, topk_ids, layer.expert_map)
    return out[:, :hidden_size].contiguous()


def _check_cpu_routing(name: str, config: VllmConfig) -> None:
    """Only now: the router belongs to the layer's runner, which vLLM makes after the layer."""
    router = getattr(config.compilation_config.static_forward_context.get(name), "router", None)
    if isinstance(router, CPURouter):
        check_cpu_routing(
            name,
            scoring=router.scoring_func,
            has_correction_bias=router.e_score_correction_bias is not None,
            own_function=router.custom_routing_function is not None,
            grouped=router.use_grouped_topk,
        )


def _can_gather() -> bool:
    """Whether this platform's communicator has what gathering other ranks' tokens takes; not all of vLLM's do."""
    communicator = get_ep_group().device_communicator
    return communicator is not None and type(communicator).all_gatherv is not DeviceCommunicatorBase.all_gatherv


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
