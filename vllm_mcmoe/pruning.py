"""Online pruning: which of a token's selected experts are not computed (docs/method.md, section 5).

`config.json["quantization_config"]["pruning"]` describes the rule of a checkpoint, `pruning-{digest}.safetensors`
beside it has its tensors, a few numbers per layer. The directory's index does not name that file, so nothing but this
module reads it. Both rules give every selected expert but the first a score and drop those below a threshold:

    odp   w_r / w_0, the routing weight relative to the token's largest; thresholds per layer and rank r
    otp   a_r log w_r + b_r log w_0 + c_e + A_e . (U x), the learned logarithm of what dropping expert e would cost this
          token, in nats; one threshold for the model

Thresholds are stored for a grid of pruned fractions (`levels`), so that any target can be chosen when serving.
Everything here is tensor arithmetic of fixed shapes: no data-dependent control flow, no host synchronisation.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from vllm_mcmoe.errors import FormatError, PruningError
from vllm_mcmoe.kernels import prune_experts

# What to prune when serving, off, on or a fraction: a key for vLLM's --hf-overrides, or the environment.
PRUNING_OVERRIDE = "mcmoe_pruning"
PRUNING_VARIABLE = "VLLM_MCMOE_PRUNING"
METHODS = ("odp", "otp")
# Calls that a layer makes while it is loaded: few tokens and many may be computed by different kernels.
COMPILED_TOKENS = (1, 1024)
ROUTER_TENSORS = ("weight_slopes", "expert_bias", "projection", "expert_features")


@dataclass(frozen=True)
class PruningConfig:
    """What config.json says about pruning.

    method   "odp" or "otp"
    target   fraction of expert activations to drop, 0 for none; at most (top_k - 1) / top_k
    top_k    experts the router selects per token
    levels   the fractions thresholds are stored for, ascending, the first is 0
    sha256   of the tensors' file, whose name begins with it: a new rule is a new file, and config.json, replaced in
             one step, decides which one counts
    """

    method: str
    target: float
    top_k: int
    levels: tuple[float, ...]
    sha256: str

    @property
    def file_name(self) -> str:
        return f"pruning-{self.sha256[:12]}.safetensors"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"levels": list(self.levels)}

    @classmethod
    def from_dict(cls, config: Any, source: str = "quantization_config.pruning") -> "PruningConfig":
        """Parse and check; `source` opens every message. Raises FormatError, or PruningError for the target."""
        expected = {"method": str, "target": int | float, "top_k": int, "levels": list, "sha256": str}
        if not isinstance(config, dict):
            raise FormatError(f"{source}: expected an object with {', '.join(expected)}, found {config!r}.")
        for key, kind in expected.items():
            if not isinstance(config.get(key), kind) or isinstance(config[key], bool):
                raise FormatError(f"{source}.{key}: missing or of the wrong type: {config.get(key)!r}.")
        if config["method"] not in METHODS:
            raise FormatError(
                f"{source}.method is {config['method']!r}; this vllm-mcmoe knows {', '.join(METHODS)}. "
                "Upgrade vllm-mcmoe, or run `mcmoe prune` again."
            )
        levels = tuple(config["levels"])
        if len(levels) < 2 or levels[0] != 0 or list(levels) != sorted(set(levels)):
            raise FormatError(f"{source}.levels must ascend from 0, found {list(levels)}.")
        parsed = cls(config["method"], float(config["target"]), config["top_k"], levels, config["sha256"])
        check_target(parsed.target, parsed.top_k, f"{source}.target")
        return parsed


def check_target(target: float, top_k: int, name: str = "target") -> None:
    """Raises PruningError for a fraction this model cannot drop: a token keeps its first expert."""
    if not 0 <= target < 1:
        raise PruningError(f"{name} is {target:g}; expected a fraction of expert activations in [0, 1).")
    if target > (top_k - 1) / top_k:
        raise PruningError(
            f"{name} is {target:g}, but a token always keeps its first expert: with top-{top_k} routing at most "
            f"{(top_k - 1) / top_k:.3f} can be dropped."
        )


def resolve_target(config: PruningConfig, request: str | float, source: str = "pruning") -> float:
    """The fraction to drop when asked for "off", "on" (the checkpoint's own target) or a number.

    Raises PruningError for anything else; source opens the message.
    """
    if request in ("on", "off"):
        return config.target if request == "on" else 0.0
    try:
        target = float(request)
    except (ValueError, TypeError):  # TypeError: --hf-overrides takes any JSON
        raise PruningError(f"{source} is {request!r}; expected off, on or a fraction such as 0.25.") from None
    check_target(target, config.top_k, source)
    return target


class ActivationCounts:
    """Expert activations that the layers of one model saw and dropped, in this process.

    device   int64 [2], which every layer adds to
    host     int64 [2] for a reader on another thread, who must not touch a device: its memory may be unmapped while
             the engine sleeps, and a call beside the capture of a graph would break the capture. On CPUs, `device`
    """

    def __init__(self, device: torch.device):
        self.device = torch.zeros(2, dtype=torch.int64, device=device)
        self.host = self.device
        if device.type != "cpu":
            self.host = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self._taken = False

    def take_messenger(self) -> bool:
        """True for the first layer that asks, which copies what is on the device, of whole passes, to the host."""
        first = not self._taken and self.host is not self.device
        self._taken = True
        return first


class LayerPruning(nn.Module):
    """The rule of one MoE layer, for one target. See kernels/reference/pruning.py for what it computes.

    thresholds       float32 [top_k - 1], of the scores of ranks 1, 2, ...
    renormalize      float32 [], how much of the dropped routing weight the kept experts take over: 0 none, 1 all
    weight_slopes    float32 [2, top_k - 1], a and b
    expert_bias      float32 [experts], c
    projection       float32 [rank, hidden], U
    expert_features  float32 [experts, rank], A
    counts           int64 [2], expert activations seen and dropped since the engine started, of all layers that were
                     given the same ActivationCounts
    """

    def __init__(self, thresholds: torch.Tensor, renormalize: torch.Tensor, router: Mapping[str, torch.Tensor]):
        super().__init__()
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("renormalize", renormalize)
        for name in ROUTER_TENSORS:
            self.register_buffer(name, router[name])
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self._activation_counts: ActivationCounts | None = None  # alive as long as one of its layers
        self._host_counts: torch.Tensor | None = None
        self._prune_experts = prune_experts("reference")

    def on_device(
        self,
        device: torch.device,
        backend: str,
        *,
        dtype: torch.dtype = torch.float32,
        counts: ActivationCounts | None = None,
    ) -> "LayerPruning":
        """This rule with its tensors on `device`, computed by a kernel backend and added to `counts`, or to counts of
        its own. dtype: of the hidden states to come; what they need is compiled now."""
        moved = self.to(device)
        moved._prune_experts = prune_experts(backend)
        counts = moved._activation_counts = counts or ActivationCounts(device)
        moved.counts = counts.device
        if counts.take_messenger():
            moved._host_counts = counts.host
        top_k, hidden_size = len(self.thresholds) + 1, self.projection.shape[1]
        for tokens in COMPILED_TOKENS:
            x = torch.zeros(tokens, hidden_size, dtype=dtype, device=device)
            weights = torch.zeros(tokens, top_k, dtype=torch.float32, device=device)
            moved._prune(x, weights, torch.full((tokens, top_k), -1, dtype=torch.int32, device=device))
        return moved

    def forward(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden], topk_weights and topk_ids [T, k] in any order, -1 for no expert -> float32 weights and ids
        in any order, with -1 for dropped experts and the kept weights renormalised."""
        if self._host_counts is not None:
            self._host_counts.copy_(self.counts, non_blocking=True)
        return self._prune(x, topk_weights, topk_ids)

    def _prune(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._prune_experts(
            x,
            topk_weights,
            topk_ids,
            self.thresholds,
            self.weight_slopes,
            self.expert_bias,
            self.projection,
            self.expert_features,
            self.renormalize,
            self.counts,
        )


def ratio_pruning(ratios: torch.Tensor, renormalize: torch.Tensor, num_experts: int, hidden_size: int) -> LayerPruning:
    """ODP: rank r is dropped where w_r / w_0 is below ratios[r - 1], whatever the token and the expert."""
    float32 = {"dtype": torch.float32}  # whatever the default is: vLLM's, while it builds a model, is the model's
    router = {
        "weight_slopes": torch.tensor([[1.0], [-1.0]], **float32).repeat(1, len(ratios)),
        "expert_bias": torch.zeros(num_experts, **float32),
        "projection": torch.zeros(0, hidden_size, **float32),
        "expert_features": torch.zeros(num_experts, 0, **float32),
    }
    return LayerPruning(ratios.log(), renormalize, router)


class PruningRules:
    """The rules of all layers.

    config    what config.json says
    tensors   "{layer}.{name}" -> float32 tensor: thresholds [levels, top_k - 1], renormalize [] and, for OTP, those of
              learned_scores
    """

    def __init__(self, config: PruningConfig, tensors: dict[str, torch.Tensor], source: str = "pruning"):
        self.config, self.tensors, self.source = config, tensors, source

    @classmethod
    def create(
        cls, method: str, target: float, top_k: int, levels: tuple[float, ...], tensors: dict[str, torch.Tensor]
    ) -> "PruningRules":
        """Rules that were just calibrated."""
        digest = hashlib.sha256(_serialize(tensors)).hexdigest()
        return cls(PruningConfig(method, target, top_k, levels, digest), tensors)

    @classmethod
    def load(cls, checkpoint: Path, config: PruningConfig) -> "PruningRules":
        """Raises FormatError: the tensors' file is missing or damaged."""
        path = checkpoint / config.file_name
        if not path.is_file():
            raise FormatError(f"{path} is missing, but config.json has a pruning rule; run `mcmoe prune` again.")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != config.sha256:
            raise FormatError(f"{path} is damaged: its digest is not the one in config.json; run `mcmoe prune` again.")
        return cls(config, load(content), str(path))

    def serialize(self) -> bytes:
        """The content of the tensors' file."""
        return _serialize(self.tensors)

    def _tensor(self, layer: str, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        tensor = self.tensors.get(f"{layer}.{name}")
        if tensor is None:
            raise FormatError(f"{self.source}: no tensor {layer}.{name}; these rules are of another model.")
        fits = len(shape) == tensor.dim() and all(
            wanted in (None, found) for wanted, found in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != torch.float32:
            wanted = ["any" if size is None else size for size in shape]
            raise FormatError(
                f"{self.source}: {layer}.{name} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected torch.float32 {wanted}; these rules are of another model."
            )
        return tensor

    def layer(self, name: str, target: float, *, top_k: int, num_experts: int, hidden_size: int) -> LayerPruning:
        """The rule of one layer. target 0 keeps everything, exactly.

        Raises FormatError: calibrated for another top-k, or tensors of another model's layer count or shape.
        """
        if top_k != self.config.top_k:
            raise FormatError(
                f"{self.source}: these rules were calibrated for top-{self.config.top_k} routing, {name} selects "
                f"{top_k} experts per token; run `mcmoe prune` with this model."
            )
        levels = self._tensor(name, "thresholds", (len(self.config.levels), top_k - 1))
        renormalize = self._tensor(name, "renormalize", ()).clone()
        if target <= 0:
            thresholds = torch.full((top_k - 1,), -torch.inf, dtype=torch.float32)
        else:
            thresholds = interpolate(levels, self.config.levels, target)
        if self.config.method == "odp":
            return ratio_pruning(thresholds.clamp_min(0), renormalize, num_experts, hidden_size)
        shapes = {
            "weight_slopes": (2, top_k - 1),
            "expert_bias": (num_experts,),
            "projection": (None, hidden_size),
            "expert_features": (num_experts, None),
        }
        return LayerPruning(thresholds, renormalize, {part: self._tensor(name, part, shapes[part]) for part in shapes})


def _serialize(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return save({name: tensors[name].contiguous() for name in sorted(tensors)})


def interpolate(thresholds: torch.Tensor, levels: tuple[float, ...], target: float) -> torch.Tensor:
    """Thresholds [len(levels), k - 1] at a target between two levels."""
    above = next((i for i, level in enumerate(levels) if level >= target), len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    share = min((target - low) / (high - low), 1.0)
    return torch.lerp(thresholds[above - 1], thresholds[above], share)


def pruned_fraction(layers: Iterable[LayerPruning]) -> float:
    """Fraction of the expert activations seen by these layers that they dropped; 0 before any."""
    counts = [layer.counts.tolist() for layer in layers]
    seen, dropped = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return dropped / seen if seen else 0.0
