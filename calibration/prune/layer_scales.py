"""How far the predicted cost of pruning a layer is from the KL it really causes.

The prediction follows the gradient, and no gradient sees that a changed hidden state makes a later router choose other
experts. Early layers pay for that more than late ones. So every layer is pruned alone, for real, on some sequences: all
of these variants of the model go through the layers together, each layer's weights are read once.
"""

from collections.abc import Mapping

import torch

from vllm_mcmoe.calibration.common.progress import progress
from vllm_mcmoe.calibration.evaluate.experts_forward import pruned_layer
from vllm_mcmoe.calibration.measure.sensitivity import kl_divergence
from vllm_mcmoe.calibration.model.layerwise import LayerwiseModel
from vllm_mcmoe.pruning import LayerPruning

# Every layer adds a copy of these tokens' hidden states: 2 GB for Mixtral-8x7B.
MEASURED_TOKENS = 4096
# Far outside of this, noise or a damaged layer is more likely than a routing effect.
SMALLEST, LARGEST = 0.5, 4.0


def measured_costs(
    model: LayerwiseModel, tokens: torch.Tensor, pruners: Mapping[str, LayerPruning], *, show_progress: bool = True
) -> dict[str, float]:
    """Layer name -> KL, nats per token, of the model with only this layer pruned.

    tokens: int64 [sequences, length]; about MEASURED_TOKENS of them are used, evenly spaced sequences.
    """
    wanted = min(len(tokens), max(1, MEASURED_TOKENS // tokens.shape[1]))
    tokens = tokens[torch.arange(wanted) * len(tokens) // wanted]
    names = model.description.moe_layers
    variants: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        base = model.embed(tokens)
        for index in progress(range(model.num_layers), "Pruning one layer at a time", show=show_progress):
            with model.loaded_layer(index) as layer:
                for batches in variants.values():
                    batches[:] = [layer(batch).cpu() for batch in batches]
                if index in names:
                    with pruned_layer(layer, pruners[names[index]]):
                        variants[names[index]] = [layer(batch).cpu() for batch in base]
                base = [layer(batch).cpu() for batch in base]
        costs = dict.fromkeys(variants, 0.0)
        for number, batch in enumerate(base):
            expected = model.logits(batch).log_softmax(-1)
            for name, batches in variants.items():
                costs[name] += kl_divergence(expected, model.logits(batches[number]).log_softmax(-1))
        return {name: cost / tokens.numel() for name, cost in costs.items()}


def layer_scales(measured: Mapping[str, float], predicted: Mapping[str, float]) -> dict[str, float]:
    """measured / predicted of every layer, kept within SMALLEST and LARGEST."""
    return {name: min(max(measured[name] / max(predicted[name], 1e-12), SMALLEST), LARGEST) for name in predicted}
