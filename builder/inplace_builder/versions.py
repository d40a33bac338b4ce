"""Versions of what built an engine, as its manifest records them."""

import importlib.metadata
import platform

import torch
from inplace import __version__


def built_with() -> dict[str, str]:
    """The versions that made an engine."""
    return {
        "inplace": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
