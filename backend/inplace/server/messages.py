"""Requests and responses: from Triton's types into ours, and back."""

import json
import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from time import monotonic
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from inplace.drivers.reply import Outputs
from inplace.errors import Code, RequestError
from inplace.protocol import STOP, TEXT
from inplace.runtime.requests import Request

FLAG_START, FLAG_END = 1, 2
"""TRITONSERVER_REQUEST_FLAG_SEQUENCE_START and …_END."""


TEXT_INPUTS = (TEXT, STOP)


NO_PARAMETERS = ("", "{}")


STATUS = {
    Code.NO_FREE_SLOT: "UNAVAILABLE",
    Code.QUEUE_FULL: "UNAVAILABLE",
    Code.SEQUENCE_BUSY: "UNAVAILABLE",
    Code.SHUTDOWN: "UNAVAILABLE",
    Code.SNAPSHOT_BUSY: "UNAVAILABLE",
    Code.CANCELLED: "CANCELLED",
    Code.UNKNOWN_SEQUENCE: "NOT_FOUND",
    Code.NO_SNAPSHOT: "NOT_FOUND",
    Code.ENGINE_FAILED: "INTERNAL",
}
"""Triton's status of an error; INVALID_ARG for the other codes.

By name, because the stub adds the constants to `TritonError` only after this module is imported.
"""


RELEASE_DELAY = 1.0
"""Seconds for which responses are kept before they are released.

Triton frees its iterator of responses on a thread that does not hold the GIL (``SendCleanupId``,
Triton 24.10). If that were the last reference to the responses, their arrays would be freed there
too, and two threads would change reference counts at once.
"""


class TritonChannel:
    """A `Channel` for one request of a decoupled model.

    Args:
        request: the request.
        on_final: called after the final response.
    """

    def __init__(self, request: Any, on_final: Callable[[], None] | None = None) -> None:
        self._request, self._sender = request, request.get_response_sender()
        self._on_final = on_final
        self.requested_outputs = frozenset(request.requested_output_names())

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Send a response with those of the outputs that the client requested."""
        tensors = [
            output_tensor(name, value)
            for name, value in outputs.items()
            if name in self.requested_outputs
        ]
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=flags)
        if final:
            self._finish()

    def send_error(self, error: RequestError) -> None:
        """Send an error as the final response."""
        try:
            self._sender.send(
                error_response(self._request, error),
                flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
            )
        finally:
            self._finish()

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled or left.

        Must not be called after the final response: it crashes the server.
        """
        cancelled: bool = self._request.is_cancelled()
        return cancelled

    def _finish(self) -> None:
        on_final, self._on_final = self._on_final, None
        if on_final is not None:
            on_final()


def read_request(
    request: Any, texts: dict[str, tuple[bytes, ...]] | None = None
) -> Request | RequestError:
    """Convert a request of Triton.

    Args:
        request: its tensors are not copied.
        texts: if given, the inputs of BYTES are stored here, by name.

    Returns:
        The request, with a ``refusal`` if only its sequence could be read; or the BAD_PARAMETER
        error to answer it with.
    """
    flags = request.flags()
    start, end = bool(flags & FLAG_START), bool(flags & FLAG_END)
    try:
        sequence_id = request.correlation_id()
    except ValueError as error:
        return _unreadable(error)
    inputs: dict[str, Tensor] = {}
    try:
        request_id = request.request_id()
        parameters = request.parameters()
        for tensor in request.inputs():
            name = tensor.name()
            if texts is not None and name in TEXT_INPUTS:
                texts[name] = tuple(tensor.as_numpy().reshape(-1).tolist())
            else:
                inputs[name] = from_dlpack(tensor.to_dlpack())
        return Request(
            sequence_id=sequence_id,
            start=start,
            end=end,
            inputs=inputs,
            request_id=request_id,
            parameters=json.loads(parameters) if parameters not in NO_PARAMETERS else {},
            requested_outputs=frozenset(request.requested_output_names()),
        )
    except (ValueError, RuntimeError, RecursionError) as error:
        # UnicodeDecodeError is a ValueError: over HTTP, ids and names may be any bytes.
        return Request(sequence_id, start, end, {}, refusal=_unreadable(error))


def _unreadable(error: Exception) -> RequestError:
    return RequestError(Code.BAD_PARAMETER, f"the request cannot be read: {error}")


@lru_cache(maxsize=1024)
def _packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a packed tensor of this shape."""
    return torch.empty(shape, device="meta").stride()


def output_tensor(name: str, value: Tensor | str) -> Any:
    """An output in Triton's type; a text is one element of BYTES, ``[1, 1]``."""
    if isinstance(value, str):
        return pb_utils.Tensor(name, np.array([[value.encode()]], dtype=np.object_))
    # Triton compares strides also where an extent is 1, for which PyTorch takes any as contiguous.
    packed = value.contiguous().as_strided(value.shape, _packed_strides(value.shape))
    return pb_utils.Tensor.from_dlpack(name, torch.to_dlpack(packed))  # type: ignore[attr-defined]  # torch does not list it


def error_response(request: Any, error: RequestError) -> Any:
    """The response of a request that is refused."""
    text = error.wire(read_id(request.correlation_id), str(read_id(request.request_id)))
    status = getattr(pb_utils.TritonError, STATUS.get(error.code, "INVALID_ARG"))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, status))


def read_id(get_id: Callable[[], int | str]) -> int | str:
    """An id of a request; empty if the client sent bytes that are not UTF-8, as HTTP allows."""
    try:
        return get_id()
    except UnicodeDecodeError:
        return ""


class RecentResponses:
    """Keeps responses for `RELEASE_DELAY` seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[float, list[Any]]] = deque()

    def keep(self, responses: list[Any]) -> list[Any]:
        """Keep these responses and release old ones; returns the same list."""
        now = monotonic()
        with self._lock:
            self._kept.append((now, responses))
            released = []
            while self._kept[0][0] < now - RELEASE_DELAY:
                released.append(self._kept.popleft())
        return responses  # `released` is freed here, outside the lock
