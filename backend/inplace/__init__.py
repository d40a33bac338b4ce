"""Inplace: a Triton Inference Server backend for models that keep state between requests.

The names below are loaded when they are first used: a client needs no PyTorch, and an engine no
gRPC. This package is what a server needs; it never imports the builder (`inplace_builder`).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inplace.errors import CallError, Code, InplaceError, LoadError, RequestError

if TYPE_CHECKING:
    from inplace.client import (
        AsyncClient,
        AsyncSequence,
        Client,
        ClientError,
        RefusedError,
        Sequence,
        SequenceLostError,
        UnreachableError,
    )
    from inplace.runtime.instance import ModelInstance
    from inplace.runtime.requests import Request
    from inplace.schema.served import Manifest
    from inplace.standalone import Engine

_MODULES = {
    "AsyncClient": "client",
    "AsyncSequence": "client",
    "Client": "client",
    "ClientError": "client",
    "Engine": "standalone",
    "Manifest": "schema.served",
    "ModelInstance": "runtime.instance",
    "RefusedError": "client",
    "Request": "runtime.requests",
    "Sequence": "client",
    "SequenceLostError": "client",
    "UnreachableError": "client",
}
"""The module of each name."""


__all__ = [
    "AsyncClient",
    "AsyncSequence",
    "CallError",
    "Client",
    "ClientError",
    "Code",
    "Engine",
    "InplaceError",
    "LoadError",
    "Manifest",
    "ModelInstance",
    "RefusedError",
    "Request",
    "RequestError",
    "Sequence",
    "SequenceLostError",
    "UnreachableError",
    "load",
]

__version__ = "0.1.0"


def load(path: Path | str, *, cuda_graphs: bool = True, trust: Path | str | None = None) -> Engine:
    """Load an engine that is called like the module it was built from (`inplace_builder.build`).

    Args:
        path: the engine's folder.
        cuda_graphs: whether a TensorRT engine replays repeated steps as CUDA graphs. A step is
            repeated if its inputs have the same shapes, and its states the same addresses. False
            launches every kernel of every step. PyTorch engines run on the CPU and have no graphs.
        trust: the folder whose TensorRT plans may be loaded, because a plan is code; None is
            ``path`` itself, which the caller has named. Loading a PyTorch engine runs no code of
            it.

    Raises:
        LoadError: the engine is missing or damaged, has another version, or its graph is not what
            its manifest says; or it is a TensorRT plan outside ``trust``.
    """
    from inplace.standalone import Engine  # needs PyTorch

    return Engine.load(Path(path), cuda_graphs=cuda_graphs, trust=trust)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
