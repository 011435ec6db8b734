"""The two JSON files between the steps: factors.json (what was measured) and plan.json (what was decided).

    model dir --calibrate--> factors.json --allocate--> plan.json --quantize--> checkpoint dir

Both are versioned and meant for people and other programs. Keys this module does not know are kept in `extra`
and written back, so a newer tool's remarks survive an older one's edit. A MoE layer is named by its experts'
prefix on disk, e.g. "model.layers.0.block_sparse_moe.experts".
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vllm_mcmoe.errors import FormatError, PlanError
from vllm_mcmoe.kernels.packing import WIDTHS, padded

FORMAT_VERSION = 1
PROJECTIONS = ("gate_up", "down")

PerWidth = dict[int, list[float]]


@dataclass
class LayerFactors:
    """What calibration measured for one MoE layer of E experts. All lists have one entry per expert.

    activation_count    how often the expert was among a token's top-k
    routing_weight_sum  sum of its routing weights over all tokens (softmax over all experts)
    quantization_error  width -> error of the layer's output when only this expert is quantised to that width
                        (Frobenius norm over the calibration tokens, docs/method.md, section 1)
    shapes              projection -> [out, in] of one expert: {"gate_up": [2I, H], "down": [H, I]}
    loss_increase       projection -> width -> predicted increase of the loss, nats per token, when only this
                        projection of this expert is quantised with the quantiser that will really be used
    down_output_max     largest |down_proj output| seen
    super_experts       ids of experts with rare extreme down_proj outputs
    extra               further keys of the file, kept as they are
    """

    activation_count: list[float]
    routing_weight_sum: list[float]
    quantization_error: PerWidth
    shapes: dict[str, list[int]] | None = None
    loss_increase: dict[str, PerWidth] | None = None
    down_output_max: list[float] | None = None
    super_experts: list[int] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """For JSON, as in factors.json; from_document reads it."""
        return _layer_document(self)

    @classmethod
    def from_document(cls, document: Any, source: str) -> Self:
        """source: what errors call it. Raises FormatError."""
        return cls(**vars(_parse_layer_factors(_Reader(source), document)))

    @property
    def num_experts(self) -> int:
        return len(self.activation_count)

    def numel(self, projection: str) -> int:
        """Weights of one projection of one expert; 2 and 1 (their usual ratio) where shapes are unknown."""
        if self.shapes is None:
            return {"gate_up": 2, "down": 1}[projection]
        return math.prod(self.shapes[projection])

    def written_numel(self, projection: str) -> int:
        """The same with the codes that fill up the last group of every row, which cost bytes as weights do."""
        if self.shapes is None:
            return self.numel(projection)
        out_features, in_features = self.shapes[projection]
        return out_features * padded(in_features)

    @property
    def expert_numel(self) -> int:
        """Weights of one expert."""
        return sum(self.numel(projection) for projection in PROJECTIONS)


@dataclass
class Factors:
    """factors.json: what calibration measured, one entry of `layers` per MoE layer in model order."""

    model: str
    tokens: int
    top_k: int
    layers: dict[str, LayerFactors]
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def save(self, path: str | Path) -> None:
        """Write atomically; a reader sees the old file or the whole new one."""
        document = {
            "format_version": self.format_version,
            "model": self.model,
            "tokens": self.tokens,
            "top_k": self.top_k,
            **self.extra,
            "layers": {name: _layer_document(layer) for name, layer in self.layers.items()},
        }
        parse_factors(document, str(path))  # never write what load would refuse
        _write_json(document, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises FormatError for a file that is not valid factors, OSError for one that cannot be read."""
        return cls(**vars(parse_factors(_read_json(path), str(path))))


@dataclass
class Plan:
    """plan.json: the bit-width of every expert.

    layers           layer -> {"gate_up": [E widths], "down": [E widths]}
    recipe           name of the recipe that made it
    requested_bits   average written expert bits asked for, scales and zeros included; None if bits_per_layer was
    average_bits     the same average as this plan will be written
    objective        value of the minimised objective; None where nothing was minimised
    forced_experts   layer -> ids of experts held at the top width (super experts)
    extra            further keys of the file, kept as they are
    """

    layers: dict[str, dict[str, list[int]]]
    recipe: str = "custom"
    requested_bits: float | None = None
    average_bits: float | None = None
    objective: float | None = None
    forced_experts: dict[str, list[int]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def save(self, path: str | Path) -> None:
        """Write atomically; a reader sees the old file or the whole new one."""
        document = {
            "format_version": self.format_version,
            "recipe": self.recipe,
            "requested_bits": self.requested_bits,
            "average_bits": self.average_bits,
            "objective": self.objective,
            "forced_experts": self.forced_experts,
            **self.extra,
            "layers": self.layers,
        }
        parse_plan(document, str(path))
        _write_json(document, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises FormatError for a file that is not a valid plan, OSError for one that cannot be read."""
        return cls(**vars(parse_plan(_read_json(path), str(path))))

    def check_against(self, num_experts: Mapping[str, int]) -> None:
        """num_experts: experts of every MoE layer of the model this plan is to be applied to.

        Raises PlanError when layers are missing, unknown or have another number of experts.
        """
        for name, experts in num_experts.items():
            if name not in self.layers:
                raise PlanError(f"the plan has no layer {name!r}; it has {_some(self.layers)}")
            found = len(self.layers[name]["gate_up"])
            if found != experts:
                raise PlanError(f"plan, layer {name!r}: {found} experts, but the model has {experts}")
        for name in self.layers:
            if name not in num_experts:
                raise PlanError(
                    f"the plan's layer {name!r} is not a MoE layer of the model; it has {_some(num_experts)}"
                )


def parse_factors(document: Any, source: str = "factors") -> Factors:
    """Validate decoded JSON. source: what errors call it. Raises FormatError."""
    reader = _Reader(source)
    top = reader.header(document, "factors")
    layers = {
        name: _parse_layer_factors(reader.within(f"layer {name!r}"), layer)
        for name, layer in reader.mapping(top.pop("layers", None), "layers").items()
    }
    if not layers:
        reader.fail("layers", "no layer", "at least one MoE layer")
    return Factors(
        model=reader.instance(top.pop("model", None), str, "model"),
        tokens=reader.integer(top.pop("tokens", None), "tokens", minimum=0),
        top_k=reader.integer(top.pop("top_k", None), "top_k", minimum=1),
        layers=layers,
        extra=top,
    )


def parse_plan(document: Any, source: str = "plan") -> Plan:
    """Validate decoded JSON. source: what errors call it. Raises FormatError."""
    reader = _Reader(source)
    top = reader.header(document, "plan")
    layers = {}
    for name, widths in reader.mapping(top.pop("layers", None), "layers").items():
        at = reader.within(f"layer {name!r}")
        entry = at.mapping(widths, "widths")
        layers[name] = {p: at.widths(entry.get(p), p) for p in PROJECTIONS}
        if len(layers[name]["gate_up"]) != len(layers[name]["down"]):
            at.fail("down", f"{len(layers[name]['down'])} widths", f"{len(layers[name]['gate_up'])} as gate_up")
    if not layers:
        reader.fail("layers", "no layer", "at least one MoE layer")
    forced = reader.mapping(top.pop("forced_experts", {}), "forced_experts")
    optional = {
        key: reader.number(top.pop(key), key) if top.get(key) is not None else top.pop(key, None)
        for key in ("requested_bits", "average_bits", "objective")
    }
    for name, ids in forced.items():
        if name not in layers:
            reader.fail("forced_experts", f"layer {name!r}", "a layer of the plan")
        reader.expert_ids(ids, f"forced_experts of {name!r}", len(layers[name]["gate_up"]))
    return Plan(
        layers=layers,
        recipe=reader.instance(top.pop("recipe", "custom"), str, "recipe"),
        forced_experts=forced,
        extra=top,
        **optional,
    )


def _parse_layer_factors(reader: "_Reader", document: Any) -> LayerFactors:
    layer = reader.mapping(document, "layer")
    count = reader.numbers(layer.pop("activation_count", None), "activation_count")
    experts = len(count)
    if not experts:
        reader.fail("activation_count", "an empty list", "one count per expert")
    shapes = layer.pop("shapes", None)
    if shapes is not None:
        shapes = reader.mapping(shapes, "shapes")
        shapes = {p: reader.shape(shapes.get(p), f"shapes[{p!r}]") for p in PROJECTIONS}
    loss = layer.pop("loss_increase", None)
    if loss is not None:
        loss = reader.mapping(loss, "loss_increase")
        loss = {  # a measured change of the loss may well be negative
            p: reader.per_width(loss.get(p), f"loss_increase[{p!r}]", experts, minimum=-math.inf) for p in PROJECTIONS
        }
    maxima = layer.pop("down_output_max", None)
    return LayerFactors(
        activation_count=count,
        routing_weight_sum=reader.numbers(layer.pop("routing_weight_sum", None), "routing_weight_sum", experts),
        quantization_error=reader.per_width(layer.pop("quantization_error", None), "quantization_error", experts),
        shapes=shapes,
        loss_increase=loss,
        down_output_max=None if maxima is None else reader.numbers(maxima, "down_output_max", experts),
        super_experts=reader.expert_ids(layer.pop("super_experts", []), "super_experts", experts),
        extra=layer,
    )


def _layer_document(layer: LayerFactors) -> dict[str, Any]:
    document: dict[str, Any] = {
        "activation_count": layer.activation_count,
        "routing_weight_sum": layer.routing_weight_sum,
        "quantization_error": _string_keys(layer.quantization_error),
    }
    if layer.shapes is not None:
        document["shapes"] = layer.shapes
    if layer.loss_increase is not None:
        document["loss_increase"] = {p: _string_keys(v) for p, v in layer.loss_increase.items()}
    if layer.down_output_max is not None:
        document["down_output_max"] = layer.down_output_max
    return {**document, "super_experts": layer.super_experts, **layer.extra}


def _string_keys(per_width: Mapping[int, Sequence[float]]) -> dict[str, list[float]]:
    return {str(width): list(per_width[width]) for width in sorted(per_width)}


class _Reader:
    """Checks of decoded JSON whose errors say where: file, then layer, then key."""

    def __init__(self, where: str):
        self.where = where

    def within(self, part: str) -> "_Reader":
        return _Reader(f"{self.where}: {part}")

    def fail(self, key: str, found: str, expected: str) -> None:
        raise FormatError(f"{self.where}: {key}: found {found}, expected {expected}")

    def header(self, document: Any, kind: str) -> dict[str, Any]:
        top = self.mapping(document, kind)
        version = top.pop("format_version", None)
        if version != FORMAT_VERSION:
            hint = "; upgrade vllm-mcmoe to read it" if isinstance(version, int) and version > 1 else ""
            self.fail("format_version", repr(version), f"{FORMAT_VERSION}{hint}")
        return top

    def mapping(self, value: Any, key: str) -> dict[str, Any]:
        return dict(self.instance(value, dict, key))

    def instance(self, value: Any, kind: type, key: str) -> Any:
        if not isinstance(value, kind):
            found = "nothing" if value is None else f"{type(value).__name__} {_short(value)}"
            self.fail(key, found, {dict: "an object", list: "a list", str: "a string"}[kind])
        return value

    def number(self, value: Any, key: str, minimum: float = -math.inf) -> float:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or value < minimum:
            at_least = "" if minimum == -math.inf else f" of at least {minimum}"
            self.fail(key, _short(value), f"a finite number{at_least}")
        return value

    def integer(self, value: Any, key: str, minimum: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.fail(key, _short(value), f"an integer of at least {minimum}")
        return value

    def numbers(self, value: Any, key: str, length: int | None = None, minimum: float = 0) -> list[float]:
        values = self.instance(value, list, key)
        if length is not None and len(values) != length:
            self.fail(key, f"{len(values)} entries", f"{length}, one per expert")
        return [self.number(v, f"{key}[{i}]", minimum) for i, v in enumerate(values)]

    def per_width(self, value: Any, key: str, experts: int, minimum: float = 0) -> PerWidth:
        result = {}
        for width, values in self.mapping(value, key).items():
            if width not in {str(w) for w in WIDTHS}:
                self.fail(key, f"width {width!r}", f"one of {', '.join(map(str, WIDTHS))}")
            result[int(width)] = self.numbers(values, f"{key}[{width!r}]", experts, minimum)
        return result

    def shape(self, value: Any, key: str) -> list[int]:
        sizes = self.instance(value, list, key)
        if len(sizes) != 2:
            self.fail(key, f"{len(sizes)} sizes", "[out, in]")
        return [self.integer(v, key, 1) for v in sizes]

    def widths(self, value: Any, key: str) -> list[int]:
        for i, width in enumerate(self.instance(value, list, key)):
            if not isinstance(width, int) or isinstance(width, bool) or width not in WIDTHS:
                self.fail(f"{key}[{i}]", _short(width), f"one of {WIDTHS}")
        return list(value)

    def expert_ids(self, value: Any, key: str, experts: int) -> list[int]:
        for i, expert in enumerate(self.instance(value, list, key)):
            if self.integer(expert, f"{key}[{i}]", 0) >= experts:
                self.fail(f"{key}[{i}]", str(expert), f"an expert id below {experts}")
        return list(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _some(names: Mapping[str, Any]) -> str:
    shown = ", ".join(repr(n) for n in list(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not a JSON file: {error}") from error


def _write_json(document: Mapping[str, Any], path: str | Path) -> None:
    path = Path(path)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are private, artefacts are to be shared
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
