"""What quantising the other linears costs: those of a decoder layer that share an input together, and the output head.

In a decoder layer the prediction is that of experts (sensitivity.py): with g_t the loss gradient at a linear's output
and x_t its input, quantising W to Q costs 1/2 mean_t (g_t . (Q - W) x_t)^2 nats per token. Q is made of the second
moment of all x_t, collected while the layer runs backwards, and by the quantiser that will be used; the mean is over
MEASURED_TOKENS of them. Products across tokens are left out, as those of experts are.

The head's cost is no prediction: its inputs are at hand, and the KL divergence of its outputs is computed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from vllm_mcmoe.calibration.checkpoint.size import DecidedBytes, LinearGroup, decided_bytes
from vllm_mcmoe.calibration.checkpoint.workdir import WorkDirectory
from vllm_mcmoe.calibration.matrix.gptq import HessianFactor
from vllm_mcmoe.calibration.matrix.linears import LINEAR_BITS, PACKED_BITS, quantize_linear
from vllm_mcmoe.calibration.matrix.second_moment import SecondMoment
from vllm_mcmoe.calibration.measure.expert_tokens import evenly_spaced
from vllm_mcmoe.calibration.measure.factors import LinearFactors, LinearTable
from vllm_mcmoe.calibration.measure.sensitivity import LOGITS_AT_ONCE, token_kl
from vllm_mcmoe.calibration.model.activations import Activations
from vllm_mcmoe.calibration.model.layerwise import DecoderLayer, LayerwiseModel

MEASURED_TOKENS = 4096


class LinearMeasurer:
    """Watches a backward sweep (sensitivity.LayerWatcher). What a layer's linears cost is kept in the work directory as
    soon as the layer is through."""

    def __init__(self, model: LayerwiseModel, tokens: int, work: WorkDirectory | None):
        """tokens: of the sweep."""
        self._model, self._tokens, self._work = model, tokens, work
        self._decided = decided_bytes(model)
        self._measured: dict[int | None, list[LinearFactors]] = {}
        for place in {group.layer for group in self._decided.groups}:
            document = None if work is None else work.load(_unit(place))
            if document is not None:
                self._measured[place] = [LinearFactors.from_document(d, _unit(place)) for d in document["modules"]]

    def wants(self, layer: int) -> bool:
        return layer not in self._measured and bool(self._groups(layer))

    @contextmanager
    def watching(self, number: int, layer: DecoderLayer) -> Iterator[None]:
        """Within the block all tokens go through the layer, and their gradients come back; the linears are measured at
        its end."""
        records = [_GroupRecord(self._modules(layer, group), self._tokens) for group in self._groups(number)]
        with ExitStack() as stack:
            for record in records:
                stack.callback(record.release)
            yield
        with torch.no_grad():
            self._keep(number, [self._measure(*pair) for pair in zip(self._groups(number), records, strict=True)])

    @property
    def wants_outputs(self) -> bool:
        return None not in self._measured and bool(self._groups(None))

    def see_outputs(self, hidden: Activations) -> None:
        """hidden: of the last layer, all tokens."""
        with torch.no_grad():
            self._keep(None, [self._measure_head(group, hidden) for group in self._groups(None)])

    @property
    def complete(self) -> bool:
        return all(group.layer in self._measured for group in self._decided.groups)

    def table(self) -> LinearTable:
        """When everything has been seen."""
        places = dict.fromkeys(group.layer for group in self._decided.groups)
        return table_of(self._decided, [module for place in places for module in self._measured[place]])

    def _groups(self, layer: int | None) -> list[LinearGroup]:
        return [group for group in self._decided.groups if group.layer == layer]

    def _modules(self, layer: DecoderLayer, group: LinearGroup) -> dict[str, nn.Linear]:
        return {name: layer.linear(self._model.description.split_layer_name(name)[1]) for name in group.names}

    def _keep(self, place: int | None, modules: list[LinearFactors]) -> None:
        self._measured[place] = modules
        if self._work is not None:
            self._work.save(_unit(place), {"modules": [module.to_document() for module in modules]}, [])

    def _factors(self, group: LinearGroup, loss_increase: dict[int, float]) -> LinearFactors:
        return _linear_factors(group, self._decided.group_size, loss_increase)

    def _change(self, name: str, weight: torch.Tensor, factor: HessianFactor, bits: int) -> torch.Tensor:
        """Q - W, float32."""
        dtype = self._model.source.read(f"{name}.weight").dtype
        return quantize_linear(weight, factor, bits, self._decided.group_size, dtype)[0].sub_(weight)

    def _measure(self, group: LinearGroup, record: "_GroupRecord") -> LinearFactors:
        factor = HessianFactor.build(record.moment.matrix(), name=group.names[0])
        loss_increase = {}
        for bits in PACKED_BITS:
            products = torch.zeros(len(record.x), device=record.x.device)
            for name, module in record.modules.items():
                change = self._change(name, module.weight, factor, bits)
                products += ((record.x @ change.t()) * record.gradients[name]).sum(-1)
            loss_increase[bits] = 0.5 * float(products.double().square().mean())
        return self._factors(group, loss_increase)

    def _measure_head(self, group: LinearGroup, hidden: Activations) -> LinearFactors:
        head = self._model.head()
        inputs = (self._model.head_inputs(batch).flatten(0, -2) for batch in hidden)
        factor = HessianFactor.build(SecondMoment.of(inputs).matrix(), name=group.names[0])
        sample = evenly_spaced(len(hidden.rows), min(len(hidden.rows), MEASURED_TOKENS))
        at_once = max(1, LOGITS_AT_ONCE // len(head.weight))
        loss_increase = {}
        for bits in PACKED_BITS:
            change, total = self._change(group.names[0], head.weight, factor, bits), 0.0
            for chosen in sample.split(at_once):
                rows = hidden.rows[chosen]
                expected = self._model.logits(rows).log_softmax(-1)
                head.weight.data.add_(change)
                found = self._model.logits(rows).log_softmax(-1)
                head.weight.data.sub_(change)
                total += float(token_kl(expected, found).double().sum())
            loss_increase[bits] = total / len(sample)
        return self._factors(group, loss_increase)


def table_of(decided: DecidedBytes, modules: list[LinearFactors] | None = None) -> LinearTable:
    """modules: what was measured of the groups; without it, the table has their bytes alone."""
    if modules is None:
        modules = [_linear_factors(group, decided.group_size, {}) for group in decided.groups]
    return LinearTable(modules, decided.head, decided.group_size, decided.other, decided.original)


def _linear_factors(group: LinearGroup, group_size: int, loss_increase: dict[int, float]) -> LinearFactors:
    nbytes = {bits: group.nbytes(bits, group_size) for bits in LINEAR_BITS}
    return LinearFactors(list(group.names), nbytes, loss_increase)


class _GroupRecord:
    """What goes through linears that share an input, while it is not released.

    moment     of the inputs of all tokens
    x          float32 [n, in], of the tokens that are measured on, and
    gradients  name -> float32 [n, out], the loss gradient at the linear's output
    """

    def __init__(self, modules: dict[str, nn.Linear], tokens: int):
        first = next(iter(modules.values()))
        device = first.weight.device
        self.modules = modules
        self._sample = evenly_spaced(tokens, min(tokens, MEASURED_TOKENS))
        self.moment = SecondMoment()
        self.x = torch.zeros(len(self._sample), first.in_features, device=device)
        self.gradients = {
            name: torch.zeros(len(self._sample), module.out_features, device=device) for name, module in modules.items()
        }
        self._seen = dict.fromkeys(modules, 0)
        self._hooks = [module.register_forward_hook(self._watch(name)) for name, module in modules.items()]

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str) -> Callable[..., None]:
        keeps_inputs = name == next(iter(self.modules))

        def see_output(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x, seen = args[0].detach().flatten(0, -2), self._seen[name]
            self._seen[name] = seen + len(x)
            first, last = torch.searchsorted(self._sample, torch.tensor([seen, seen + len(x)])).tolist()
            rows = (self._sample[first:last] - seen).to(x.device)
            if keeps_inputs:
                self.moment.add(x)
                self.x[first:last] = x[rows]

            def see_gradient(gradient: torch.Tensor) -> None:
                self.gradients[name][first:last] = gradient.detach().flatten(0, -2)[rows]

            output.register_hook(see_gradient)

        return see_output


def _unit(place: int | None) -> str:
    return "measured-head" if place is None else f"measured-linears-{place:05d}"
