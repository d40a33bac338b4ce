"""Answers in Triton's types. Part of the border to Triton."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from torch import Tensor

from inplace.drivers.reply import Outputs
from inplace.errors import Code, RequestError

FLAG_START, FLAG_END = 1, 2
"""TRITONSERVER_REQUEST_FLAG_SEQUENCE_START and …_END."""


STATUS = {
    Code.NO_FREE_SLOT: "UNAVAILABLE",
    Code.QUEUE_FULL: "UNAVAILABLE",
    Code.SHUTDOWN: "UNAVAILABLE",
    Code.UNKNOWN_SEQUENCE: "NOT_FOUND",
    Code.ENGINE_FAILED: "INTERNAL",
}
"""Triton's status for an error, INVALID_ARG for the others; by name, for the stub adds its types only after this import."""


class TritonChannel:
    """One request of a decoupled model, and the sender of its responses."""

    def __init__(self, request: Any) -> None:
        self._request, self._sender = request, request.get_response_sender()
        self.requested_outputs = frozenset(request.requested_output_names())

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """See `Channel.send`."""
        tensors = [
            output(name, value) for name, value in outputs.items() if name in self.requested_outputs
        ]
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=flags)

    def send_error(self, error: RequestError) -> None:
        """See `Channel.send_error`."""
        self._sender.send(
            refusal(self._request, error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        )

    def is_cancelled(self) -> bool:
        """See `Channel.is_cancelled`."""
        found: bool = self._request.is_cancelled()
        return found


def output(name: str, value: Tensor | str) -> Any:
    """An output tensor; a text is one element of BYTES, ``[1, 1]``."""
    if isinstance(value, str):
        return pb_utils.Tensor(name, np.array([[value.encode()]], dtype=np.object_))
    return pb_utils.Tensor.from_dlpack(name, torch.to_dlpack(value))  # type: ignore[attr-defined]  # torch does not list it


def readable(read: Callable[[], int | str]) -> int | str:
    """An id of a request as Triton gives it; empty where a client has sent bytes that are no UTF-8 (over HTTP it can)."""
    try:
        return read()
    except UnicodeDecodeError:
        return ""


def refusal(request: Any, error: RequestError) -> Any:
    """The error of one request."""
    text = error.wire(readable(request.correlation_id), str(readable(request.request_id)))
    status = getattr(pb_utils.TritonError, STATUS.get(error.code, "INVALID_ARG"))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, status))
