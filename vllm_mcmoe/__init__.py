"""Mixture-of-experts models whose experts each have their own bit-width: quantised offline, served by vLLM."""

import logging

__version__ = "0.1.0"


def register() -> None:
    """Entry point of vLLM's `vllm.general_plugins` group; every vLLM process calls it, some more than once.

    Never raises: vLLM would not start then, whatever model it was to serve. What fails is logged, and vLLM refuses our
    checkpoints by itself, not knowing their method.
    """
    try:
        from vllm_mcmoe.vllm_versions import let_vllm_scan_llvmlite, warn_if_untested

        warn_if_untested()  # first, so that it explains a failure of what follows
        let_vllm_scan_llvmlite()
        from vllm_mcmoe.quantization import register_with_vllm

        register_with_vllm()
    except Exception:
        logging.getLogger("vllm.mcmoe").exception(
            "vllm-mcmoe cannot register with this vLLM: mcmoe checkpoints cannot be served, other models can."
        )
