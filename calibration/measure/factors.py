"""factors.json: what calibration measured of every expert.

Versioned, and meant for people and other programs. Keys this module does not know are kept in `extra` and written back,
so a newer tool's remarks survive an older one's edit. A MoE layer is named by its experts' prefix on disk, e.g.
"model.layers.0.block_sparse_moe.experts".
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vllm_mcmoe.calibration.common.documents import FORMAT_VERSION, PerWidth, Reader, read_document, save_document
from vllm_mcmoe.calibration.matrix.linears import LINEAR_BITS, PACKED_BITS
from vllm_mcmoe.errors import PlanError
from vllm_mcmoe.kernels.packing import padded

PROJECTIONS = ("gate_up", "down")
LINEARS_VERSION = 1  # of the table of linears in it


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
        return cls(**vars(_parse_layer_factors(Reader(source), document)))

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
class LinearFactors:
    """What calibration measured of linears that get one width: of one decoder layer those that share an input, or the
    output head.

    names          on disk
    nbytes         width -> bytes in the checkpoint, of all of them
    loss_increase  width -> predicted increase of the loss, nats per token, when these alone are quantised; empty where
                   it was not measured
    """

    names: list[str]
    nbytes: dict[int, int]
    loss_increase: dict[int, float]

    def to_document(self) -> dict[str, Any]:
        """For JSON, as in factors.json; from_document reads it."""
        per_width = {"bytes": self.nbytes, "loss_increase": self.loss_increase}
        return {
            "names": self.names,
            **{key: {str(w): values[w] for w in sorted(values)} for key, values in per_width.items()},
        }

    @classmethod
    def from_document(cls, document: Any, source: str) -> Self:
        """source: what errors call it. Raises FormatError."""
        return _parse_linear_factors(Reader(source), document)


@dataclass
class LinearTable:
    """What `--size` needs beside the experts.

    modules         the linears whose widths are to be decided
    group_size      of their packed forms
    head            on-disk name of the output head, where it is one of them
    other_bytes     of the checkpoint's files, what neither experts nor these linears take
    original_bytes  of all weights in 16 bits
    """

    modules: list[LinearFactors]
    head: str | None
    group_size: int
    other_bytes: int
    original_bytes: int

    def held_at(self, module: LinearFactors, linear_bits: int) -> int:
        """The width of a module where all linears in decoder layers are to have one: the head keeps 16 bits."""
        return 16 if module.names[0] == self.head else linear_bits

    def to_document(self) -> dict[str, Any]:
        return {
            "version": LINEARS_VERSION,
            "head": self.head,
            "group_size": self.group_size,
            "other_bytes": self.other_bytes,
            "original_bytes": self.original_bytes,
            "modules": [module.to_document() for module in self.modules],
        }


@dataclass
class Factors:
    """factors.json: what calibration measured, one entry of `layers` per MoE layer in model order.

    linears   of the other linears and of the checkpoint as a whole; None in files of earlier versions and of recipes
              that measure no loss increase
    """

    model: str
    tokens: int
    top_k: int
    layers: dict[str, LayerFactors]
    linears: LinearTable | None = None
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
            **({} if self.linears is None else {"linears": self.linears.to_document()}),
        }
        parse_factors(document, str(path))  # never write what load would refuse
        save_document(document, path)

    def check_against(self, num_experts: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
        """num_experts: experts of every MoE layer of the model these are to be used for; shapes: projection ->
        [out, in] of its experts.

        Raises PlanError where layers are missing, unknown, or of other sizes.
        """
        missing, unknown = num_experts.keys() - self.layers.keys(), self.layers.keys() - num_experts.keys()
        for names, what in ((missing, "lack"), (unknown, "have")):
            if names:
                other = "of the model" if what == "lack" else "which the model has not"
                raise PlanError(f"the factors are of another model, {self.model}: they {what} {min(names)}, {other}.")
        for name, layer in self.layers.items():
            if layer.num_experts != num_experts[name]:
                raise PlanError(
                    f"the factors are of another model, {self.model}: {name} has {layer.num_experts} experts there, "
                    f"and {num_experts[name]} in this one."
                )
            if layer.shapes is not None and any(list(layer.shapes[part]) != list(shapes[part]) for part in shapes):
                raise PlanError(
                    f"the factors are of another model, {self.model}: an expert of {name} has shapes {layer.shapes} "
                    f"there, and {dict(shapes)} in this one."
                )

    def check_linears(self, expected: LinearTable) -> None:
        """expected: of the model these are to be used for, by its files.

        Raises PlanError where there is no table, or one of another model.
        """
        if self.linears is None:
            raise PlanError(self.without_linears())
        another = f"the factors are of another model, {self.model}"
        for found, module in itertools.zip_longest(self.linears.modules, expected.modules):
            if found is None or module is None or (found.names, found.nbytes) != (module.names, module.nbytes):
                raise PlanError(f"{another}: its linears differ in {(module or found).names[0]}")
        for key in ("group_size", "other_bytes", "original_bytes"):
            here, there = getattr(expected, key), getattr(self.linears, key)
            if here != there:
                raise PlanError(f"{another}: {key} is {there} there, and {here} in this one")

    def without_linears(self) -> str:
        """What to say where there is no table."""
        return (
            f"the factors of {self.model} have no table of linears, which a size of the whole checkpoint needs: they "
            "are of an earlier version. Calibrate again, or give bits"
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises FormatError for a file that is not valid factors, OSError for one that cannot be read."""
        return cls(**vars(parse_factors(read_document(path), str(path))))


def parse_factors(document: Any, source: str = "factors") -> Factors:
    """Validate decoded JSON. source: what errors call it. Raises FormatError."""
    reader = Reader(source)
    top = reader.header(document, "factors")
    layers = {
        name: _parse_layer_factors(reader.within(f"layer {name!r}"), layer)
        for name, layer in reader.mapping(top.pop("layers", None), "layers").items()
    }
    if not layers:
        reader.fail("layers", "no layer", "at least one MoE layer")
    linears = top.pop("linears", None)
    return Factors(
        model=reader.instance(top.pop("model", None), str, "model"),
        tokens=reader.integer(top.pop("tokens", None), "tokens", minimum=0),
        top_k=reader.integer(top.pop("top_k", None), "top_k", minimum=1),
        layers=layers,
        linears=None if linears is None else _parse_linears(reader.within("linears"), linears),
        extra=top,
    )


def _parse_linears(reader: Reader, document: Any) -> LinearTable:
    table = reader.mapping(document, "table")
    if table.get("version") != LINEARS_VERSION:
        reader.fail("version", repr(table.get("version")), str(LINEARS_VERSION))
    modules = reader.instance(table.get("modules"), list, "modules")
    head = table.get("head")
    return LinearTable(
        [_parse_linear_factors(reader.within(f"modules[{i}]"), module) for i, module in enumerate(modules)],
        head if head is None else reader.instance(head, str, "head"),
        *(reader.integer(table.get(key), key, 1) for key in ("group_size", "other_bytes", "original_bytes")),
    )


def _parse_linear_factors(reader: Reader, document: Any) -> LinearFactors:
    module = reader.mapping(document, "linears")
    names = [reader.instance(name, str, "names") for name in reader.instance(module.get("names"), list, "names")]
    if not names:
        reader.fail("names", "an empty list", "at least one linear")
    per_width: dict[str, dict[int, Any]] = {}
    for key, check, expected in (
        ("bytes", lambda value, at: reader.integer(value, at, 1), LINEAR_BITS),
        ("loss_increase", reader.number, PACKED_BITS),
    ):
        values = reader.mapping(module.get(key), key)
        if sorted(values) != sorted(map(str, expected)) and (values or key == "bytes"):
            reader.fail(key, f"widths {', '.join(values) or 'none'}", f"{', '.join(map(str, expected))}")
        per_width[key] = {w: check(values[str(w)], f"{key}[{w}]") for w in expected if str(w) in values}
    return LinearFactors(names, per_width["bytes"], per_width["loss_increase"])


def _parse_layer_factors(reader: "Reader", document: Any) -> LayerFactors:
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
