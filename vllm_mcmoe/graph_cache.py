"""Keeping vLLM's cache of compiled graphs apart for what the environment decides."""

from vllm.config import VllmConfig, get_current_vllm_config

from vllm_mcmoe.errors import UnsupportedModelError

_KEY = "mcmoe"


def add_to_cache_key(name: str, value: str) -> None:
    """Let compiled graphs be cached under this choice, too. Called while a model is built.

    vLLM finds a compiled graph by its config before it traces anything, and our variables are no part of that: with
    another instruction set, or with linears on the other kernels, it would load a graph that calls what was chosen
    before. `additional_config`, which is part of it, is for plugins.
    """
    additional = get_current_vllm_config().additional_config
    if not isinstance(additional, dict):
        raise UnsupportedModelError(
            f"vLLM's additional_config is a {type(additional).__name__}; vllm-mcmoe notes its choice of kernels in a "
            "dictionary there. Give --additional-config as one, or leave it out."
        )
    chosen = additional.setdefault(_KEY, {}).setdefault(name, [])
    if value not in chosen:
        chosen.append(value)
        chosen.sort()


def choices(config: VllmConfig, name: str) -> list[str]:
    """What add_to_cache_key was told under this name while the model of this config was built."""
    return config.additional_config.get(_KEY, {}).get(name, [])
