"""Ids, flags and errors of Triton's requests, and how long its responses are kept.

Engines and generate proxies share them; a proxy needs no PyTorch.
"""

import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

import triton_python_backend_utils as pb_utils

from inplace.errors import Code, RequestError

FLAG_START, FLAG_END = 1, 2
"""TRITONSERVER_REQUEST_FLAG_SEQUENCE_START and …_END."""


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
