"""plan.json: the bit-width of every expert, as `allocate` decided it or as a user wrote it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vllm_mcmoe.calibration.common.documents import FORMAT_VERSION, Reader, read_document, save_document, some_of
from vllm_mcmoe.calibration.matrix.linears import LINEAR_BITS
from vllm_mcmoe.calibration.measure.factors import PROJECTIONS
from vllm_mcmoe.errors import PlanError


@dataclass
class Plan:
    """plan.json: the bit-width of every expert.

    layers           layer -> {"gate_up": [E widths], "down": [E widths]}
    recipe           name of the recipe that made it
    linears          on-disk name -> width, 4, 8 or 16, of every linear that the plan decides; None where all have the
                     width that quantising is told
    requested_bits   average written expert bits asked for, scales and zeros included; None if bits_per_layer was
    average_bits     the same average as this plan will be written
    objective        value of the minimised objective; None where nothing was minimised
    forced_experts   layer -> ids of experts held at the top width (super experts)
    extra            further keys of the file, kept as they are
    """

    layers: dict[str, dict[str, list[int]]]
    recipe: str = "custom"
    linears: dict[str, int] | None = None
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
            **({} if self.linears is None else {"linears": self.linears}),
        }
        parse_plan(document, str(path))
        save_document(document, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises FormatError for a file that is not a valid plan, OSError for one that cannot be read."""
        return cls(**vars(parse_plan(read_document(path), str(path))))

    def check_against(self, num_experts: Mapping[str, int]) -> None:
        """num_experts: experts of every MoE layer of the model this plan is to be applied to.

        Raises PlanError when layers are missing, unknown or have another number of experts.
        """
        for name, experts in num_experts.items():
            if name not in self.layers:
                raise PlanError(f"the plan has no layer {name!r}; it has {some_of(self.layers)}")
            found = len(self.layers[name]["gate_up"])
            if found != experts:
                raise PlanError(f"plan, layer {name!r}: {found} experts, but the model has {experts}")
        for name in self.layers:
            if name not in num_experts:
                raise PlanError(
                    f"the plan's layer {name!r} is not a MoE layer of the model; it has {some_of(num_experts)}"
                )

    def check_linears(self, groups: Sequence[Sequence[str]]) -> None:
        """groups: on-disk names of the model's linears that can be packed, those together that must share a width.

        Raises PlanError for linears that are missing, unknown, or of one group and different widths.
        """
        if self.linears is None:
            return
        known = {name for group in groups for name in group}
        for name in self.linears:
            if name not in known:
                raise PlanError(f"the plan's linear {name!r} is none of the model's that can be packed")
        for group in groups:
            missing = [name for name in group if name not in self.linears]
            if missing:
                raise PlanError(f"the plan's linears lack {missing[0]!r}; give it 16 to leave it as it is")
            if len({self.linears[name] for name in group}) > 1:
                widths = ", ".join(f"{name} {self.linears[name]}" for name in group)
                raise PlanError(f"the plan's linears: vLLM makes one of these, which must have one width: {widths}")


def parse_plan(document: Any, source: str = "plan") -> Plan:
    """Validate decoded JSON. source: what errors call it. Raises FormatError."""
    reader = Reader(source)
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
    linears = top.pop("linears", None)
    if linears is not None:
        linears = reader.mapping(linears, "linears")
        for name, width in linears.items():
            if width not in LINEAR_BITS or isinstance(width, bool):
                reader.fail(f"linears[{name!r}]", repr(width), f"one of {LINEAR_BITS}")
    return Plan(
        layers=layers,
        linears=linears,
        recipe=reader.instance(top.pop("recipe", "custom"), str, "recipe"),
        forced_experts=forced,
        extra=top,
        **optional,
    )
