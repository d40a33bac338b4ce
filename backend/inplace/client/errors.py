"""What the client raises: one base class, with what the server's text contains as attributes."""

import re
from typing import Any

from tritonclient.utils import InferenceServerException

from inplace.errors import MAX_ID_BYTES, Code, InplaceError, truncate_for_header

_BACKEND_ERROR = re.compile(r"INPLACE-(?P<code>[A-Z_]+) retryable=(?P<retryable>[01]) sequence=")


_UNKNOWN_TO_TRITON = "must specify the START flag"
"""Triton's own text about a sequence that it does not know."""


_NO_ANSWER = {"DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED", "UNKNOWN"}
"""gRPC statuses that leave open what the server did with the request."""


_PROCESS_DIED = re.compile(r"[Ss]tub process .*is not healthy")
"""Triton's text about an instance whose process has ended."""


_SERVER_GONE = re.compile(
    rf"{_PROCESS_DIED.pattern}|Server is stopping|has no available versions|is not ready"
    r"|Internal error from Core|RST_STREAM"
)
"""Texts of errors without a status: Triton's about a model that is no longer served,
and gRPC's about a broken connection."""


class ClientError(InplaceError, InferenceServerException):  # type: ignore[misc] # tritonclient is untyped
    """A request failed.

    Also a ``tritonclient.utils.InferenceServerException``: ``message()`` and ``status()`` are the
    server's.

    Args:
        error: what tritonclient raised or passed to its callback.
        code: the backend's code (`inplace.errors.Code`), or the gRPC status where the text has
            none.
        reason: the text without its prefix.
        retryable: the same call may succeed later.
        sequence: the correlation id.
        request: the request id.
    """

    def __init__(
        self,
        error: InferenceServerException,
        *,
        code: str,
        reason: str,
        retryable: bool,
        sequence: int | str,
        request: str,
    ) -> None:
        InferenceServerException.__init__(
            self, error.message(), error.status(), error.debug_details()
        )
        self.args = (error.message(),)
        self.code, self.reason, self.retryable = code, reason, retryable
        self.sequence, self.request = sequence, request

    @property
    def from_backend(self) -> bool:
        """Whether the backend sent it; otherwise Triton or the connection raised it."""
        return "INPLACE-" in (self.message() or "")

    @property
    def process_died(self) -> bool:
        """Whether Triton has sent the request to an instance whose process has ended."""
        return not self.from_backend and _PROCESS_DIED.search(self.message() or "") is not None

    def as_sequence_lost(self, reason: str) -> "SequenceLostError":
        """The same error for a sequence that cannot be replayed, with the reason for that."""
        text = f"{self.message()} (the sequence is lost: {reason}; start a new one)"
        error = InferenceServerException(text, self.status(), self.debug_details())
        return SequenceLostError(
            error,
            code=self.code,
            reason=self.reason,
            retryable=False,
            sequence=self.sequence,
            request=self.request,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its attributes: errors cross process pools."""
        error = InferenceServerException(self.message(), self.status(), self.debug_details())
        return _unpickle, (
            type(self),
            error,
            self.code,
            self.reason,
            self.retryable,
            self.sequence,
            self.request,
        )


class RefusedError(ClientError):
    """The backend or Triton refused the request.

    The sequence is as it was before the request, except that a refused END has ended it.
    """


class SequenceLostError(ClientError):
    """No server holds the sequence as the client left it, and it cannot be replayed.

    Start a new one.
    """


class UnreachableError(ClientError):
    """There was no answer: the connection failed, or nothing arrived within the timeout.

    The server may or may not have run the request.
    """


_ERROR_TYPES: dict[str, type[ClientError]] = {
    Code.UNKNOWN_SEQUENCE: SequenceLostError,
    Code.SHUTDOWN: UnreachableError,
}


def parse_error(
    error: InferenceServerException, sequence_id: int | str, request_id: str
) -> ClientError:
    """The typed error for what tritonclient raised.

    Over streams an error is a text without a status or a request id, so the text is parsed.

    Args:
        error: from tritonclient.
        sequence_id: the correlation id of the request.
        request_id: the id of the request.
    """
    if isinstance(error, ClientError):
        return error
    text = error.message() or ""
    kind: type[ClientError] = RefusedError
    reason, retryable = text, False
    status = (error.status() or "").removeprefix("StatusCode.")
    if (match := _BACKEND_ERROR.search(text)) is not None:
        code, retryable = match["code"], match["retryable"] == "1"
        kind = _ERROR_TYPES.get(code, RefusedError)
        reason = text[match.end() :].partition(_request_field(request_id))[2] or text
    elif _UNKNOWN_TO_TRITON in text:
        kind, code = SequenceLostError, str(Code.UNKNOWN_SEQUENCE)
    elif status in _NO_ANSWER or _SERVER_GONE.search(text):
        kind, code, retryable = UnreachableError, status or "UNAVAILABLE", True
    else:
        code = status or "REFUSED"
    return kind(
        error,
        code=code,
        reason=reason,
        retryable=retryable,
        sequence=sequence_id,
        request=request_id,
    )


def may_answer(error: InferenceServerException, request_id: str) -> bool:
    """Whether an error of a stream may answer a request: it names this request, or none."""
    text = error.message() or ""
    if f"[request id: {request_id}]" in text or _request_field(request_id) in text:
        return True
    return "[request id: " not in text and _BACKEND_ERROR.search(text) is None


def _request_field(request_id: str) -> str:
    """The request id as the backend's error text contains it."""
    return f" request={truncate_for_header(request_id, MAX_ID_BYTES) or '-'}: "


def response_timeout(seconds: float) -> InferenceServerException:
    """The error for a stream without a response for ``seconds``."""
    text = f"no response for {seconds:g} s: the server hangs, or needs longer than the timeout"
    return InferenceServerException(text, "StatusCode.DEADLINE_EXCEEDED")


def _unpickle(
    kind: type[ClientError],
    error: InferenceServerException,
    code: str,
    reason: str,
    retryable: bool,
    sequence: int | str,
    request: str,
) -> ClientError:
    return kind(
        error, code=code, reason=reason, retryable=retryable, sequence=sequence, request=request
    )
