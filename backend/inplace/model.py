"""The file Triton loads as the backend ``inplace``: ``<backend-directory>/inplace/model.py``.

For each model Triton first starts a process that only looks whether this class completes the
model's configuration, and then one for each instance. So the backend, and what it needs for this
model (PyTorch, unless it is a generate proxy), is imported when an instance is initialized, and not
with this file.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inplace.server.lifecycle import ModelServer


class TritonPythonModel:
    """The class that Triton's Python backend looks for; one object a model instance.

    Attributes:
        execute: answers a batch of requests, each with its own result or error. The model's own
            method, from `initialize` on: Triton calls it for every batch.
    """

    execute: Callable[[Sequence[Any]], list[Any] | None]
    _server: "ModelServer"

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine beside the model's config.pbtxt.

        Raises:
            TritonModelException: the model cannot be served, with the reason.
        """
        from inplace.server.lifecycle import ModelServer

        self._server = ModelServer(args)
        self.execute = self._server.model.execute

    def finalize(self) -> None:
        """Unload the model; the states of its sequences are lost."""
        self._server.close()


__all__ = ["TritonPythonModel"]
