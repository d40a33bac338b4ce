"""The life of a model instance in its process, from loading to unloading.

A generate proxy needs neither PyTorch nor an engine, and its process imports none of them.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import triton_python_backend_utils as pb_utils

from inplace.errors import LoadError
from inplace.server.logs import instance_title, log_to_triton
from inplace.server.settings import GENERATE_PROXY, serve_mode
from inplace.server.stub import skip_interpreter_teardown, start_watchdog


class LoadedModel(Protocol):
    """A model that was loaded for one of the protocols."""

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer a batch of requests; None if they are answered later."""

    def close(self) -> None:
        """Answer the requests that wait or run, and free everything."""


class ModelServer:
    """One model instance, from loading to unloading.

    Args:
        args: what Triton passes to ``initialize``.

    Attributes:
        model: answers requests.

    Raises:
        TritonModelException: the model cannot be served, with the reason.
    """

    def __init__(self, args: dict[str, str]) -> None:
        self._log = log_to_triton(instance_title(args))
        self._watchdog = start_watchdog()
        try:
            with _garbage_left_for_later():
                self.model = _load(args)
        except LoadError as error:
            self._log.stop()
            raise pb_utils.TritonModelException(f"INPLACE-LOAD: {error}") from error

    def close(self) -> None:
        """Answer the requests that wait or run, free everything and end the process."""
        self.model.close()
        self._log.stop()
        skip_interpreter_teardown()


@contextmanager
def _garbage_left_for_later() -> Iterator[None]:
    """Collect garbage once, after the block, and never again among what is alive then.

    Importing PyTorch makes so many objects that collections take a tenth of it; and each full one
    while the model is served would look at all of them again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def _load(args: dict[str, str]) -> LoadedModel:
    if serve_mode(args["model_config"]) == GENERATE_PROXY:
        from inplace.server.generate_proxy import GenerateProxy

        return GenerateProxy(args)
    from inplace.server.backend import open_engine  # imports PyTorch

    return open_engine(args)
