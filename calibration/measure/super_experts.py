"""Super experts: the few whose rare extreme outputs a model depends on."""

import torch

from vllm_mcmoe.calibration.common.progress import Log
from vllm_mcmoe.calibration.measure.factors import Factors

# Super experts ("Unveiling Super Experts", arXiv 2507.23279): an expert whose largest down_proj output exceeds the
# 99.5th percentile over all experts of the model and a tenth of the largest, in a layer where massive activations
# form. The paper names those layers by inspection; here, as massive activations are defined (arXiv 2402.17762), a
# layer whose output hidden states peak at 1000 times their median. Without that clause the percentile would flag the
# top expert of every model.
SUPER_EXPERT_PERCENTILE = 0.995


SUPER_EXPERT_SHARE = 0.1


MASSIVE_RATIO = 1000.0


def flag_super_experts(factors: Factors, massive_layers: set[str], log: Log) -> None:
    """Set super_experts of every layer from down_output_max, by the rule above SUPER_EXPERT_PERCENTILE."""
    maxima = torch.tensor([m for layer in factors.layers.values() for m in layer.down_output_max])
    threshold = max(float(maxima.double().quantile(SUPER_EXPERT_PERCENTILE)), SUPER_EXPERT_SHARE * float(maxima.max()))
    for name in massive_layers:
        layer = factors.layers[name]
        layer.super_experts = [e for e, m in enumerate(layer.down_output_max) if m > threshold]
        if layer.super_experts:
            log(
                f"{name}: super experts {layer.super_experts}, down_proj outputs up to {max(layer.down_output_max):.3g}"
            )
