"""Inplace: a Triton Inference Server backend for models that keep state between requests.

This package is what the server needs: the operators, the manifest, the state memory, the sequences and the engines. It never
imports the builder.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inplace.direct import Engine

__version__ = "0.1.0"


def load(path: "Path | str") -> "Engine":
    """Load an engine that is called like the module it was built from (`inplace_builder.api.build`).

    Raises:
        LoadError: it is missing, damaged, of another version, or its graph is not what its manifest says.
    """
    from inplace.direct import Engine  # PyTorch and the operators: what only talks to a server does without

    return Engine.load(Path(path))
