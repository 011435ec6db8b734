"""Mixture-of-experts models whose experts each have their own bit-width: quantised offline, served by vLLM."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of vLLM's `vllm.general_plugins` group; every vLLM process calls it, some more than once."""
    from vllm_mcmoe.quantization import register_with_vllm

    register_with_vllm()
