"""For vLLM's models that take pictures, where no torchvision is installed: PyPI's is built for CUDA.

Their modules import it when they are imported, and use it for pictures only. Tests send text.
"""

import importlib.machinery
import sys
import types

from transformers.utils import is_torchvision_available

NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")


class _Missing(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _needed(f"{self.__name__}.{name}")


def _needed(name: str):
    def fail(*args, **kwargs):
        raise ImportError(f"{name}: torchvision is not installed")

    return fail


def provide_where_missing() -> None:
    """Let `import torchvision` succeed in this process; whatever is called of it fails."""
    if is_torchvision_available():  # transformers keeps the answer, and goes on without it
        return
    for name in NAMES:
        module = _Missing(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
