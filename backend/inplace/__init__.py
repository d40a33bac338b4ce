"""Inplace: a Triton Inference Server backend for models that keep state between requests.

This package is what the server needs: the operators, the manifest, the state memory, the sequences and the engines. It never
imports the builder.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inplace.standalone import Engine

__version__ = "0.1.0"


def load(path: "Path | str", *, cuda_graphs: bool = True) -> "Engine":
    """Load an engine that is called like the module it was built from (`inplace_builder.build`).

    Args:
        path: its folder.
        cuda_graphs: a TensorRT engine replays a step that it meets again (the same shapes, states at the same addresses) as a CUDA graph;
            False launches every kernel of every step. PyTorch on the CPU has none.

    Raises:
        LoadError: it is missing, damaged, of another version, or its graph is not what its manifest says.
    """
    from inplace.standalone import (
        Engine,  # PyTorch and the operators: what only talks to a server does without
    )

    return Engine.load(Path(path), cuda_graphs=cuda_graphs)
