"""What a client raises: one base, with what the server's text says as attributes."""

import re
from typing import Any

from tritonclient.utils import InferenceServerException

from inplace.errors import LONGEST_NAME, Code, InplaceError, header

_WIRE = re.compile(r"INPLACE-(?P<code>[A-Z_]+) retryable=(?P<retryable>[01]) sequence=")


_FORGOTTEN = "must specify the START flag"
"""Triton's own words for a sequence that it does not know."""


_NO_ANSWER = {"DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED", "UNKNOWN"}
"""gRPC statuses that say nothing of what the server did with the request."""


_DEAD = re.compile(
    r"[Ss]tub process .*is not healthy|Server is stopping|has no available versions|is not ready|Internal error from Core|RST_STREAM"
)
"""Triton's words for a model that is not served any more (over a stream without a status), and gRPC's for a broken connection."""


class ClientError(InplaceError, InferenceServerException):  # type: ignore[misc] # tritonclient is untyped
    """A request brought no result. Also a ``tritonclient.utils.InferenceServerException``: ``message()`` and ``status()`` are the server's.

    Args:
        error: what tritonclient raised or handed over.
        code: the backend's code (`inplace.errors.Code`), or the gRPC status where the text has none.
        reason: the text without its head.
        retryable: the same call, made again later, may succeed.
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
    def by_backend(self) -> bool:
        """Whether the backend said it; otherwise Triton or the connection did."""
        return "INPLACE-" in (self.message() or "")

    def as_lost(self, why: str) -> "SequenceLostError":
        """The same as the loss of a sequence that cannot be replayed."""
        text = f"{self.message()} (the sequence is lost: {why}; start a new one)"
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
        return _restored, (
            type(self),
            error,
            self.code,
            self.reason,
            self.retryable,
            self.sequence,
            self.request,
        )


class RefusedError(ClientError):
    """The backend, or Triton before it, refused the request; the sequence is as it was before (an END has ended it all the same)."""


class SequenceLostError(ClientError):
    """No server holds the sequence as the client knows it, and the client cannot replay it: start a new one."""


class UnreachableError(ClientError):
    """No answer: the connection failed, or nothing came for as long as the timeout says. What the server did is not known."""


_KINDS: dict[str, type[ClientError]] = {
    Code.UNKNOWN_SEQUENCE: SequenceLostError,
    Code.SHUTDOWN: UnreachableError,
}


def parsed(error: InferenceServerException, sequence: int | str, request: str) -> ClientError:
    """The typed error for what tritonclient raised.

    Over streams an error is its text alone, without a status or a request id, so the text is what is read.

    Args:
        error: from tritonclient.
        sequence: the correlation id that was sent.
        request: the request id that was sent.
    """
    if isinstance(error, ClientError):
        return error
    text = error.message() or ""
    found = _WIRE.search(text)
    if found is not None:
        return _KINDS.get(found["code"], RefusedError)(
            error,
            code=found["code"],
            reason=text[found.end() :].partition(_named(request))[2] or text,
            retryable=found["retryable"] == "1",
            sequence=sequence,
            request=request,
        )
    status = (error.status() or "").removeprefix("StatusCode.")
    if _FORGOTTEN in text:
        return SequenceLostError(
            error,
            code=Code.UNKNOWN_SEQUENCE,
            reason=text,
            retryable=False,
            sequence=sequence,
            request=request,
        )
    if status in _NO_ANSWER or _DEAD.search(text):
        return UnreachableError(
            error,
            code=status or "UNAVAILABLE",
            reason=text,
            retryable=True,
            sequence=sequence,
            request=request,
        )
    return RefusedError(
        error,
        code=status or "REFUSED",
        reason=text,
        retryable=False,
        sequence=sequence,
        request=request,
    )


def concerns(error: InferenceServerException, request: str) -> bool:
    """Whether an error that came over a stream may be the answer to a request: its text names no other one."""
    text = error.message() or ""
    if f"[request id: {request}]" in text or _named(request) in text:
        return True
    return "[request id: " not in text and _WIRE.search(text) is None


def _named(request: str) -> str:
    return f" request={header(request, LONGEST_NAME) or '-'}: "


def silent(seconds: float) -> InferenceServerException:
    """Nothing came over a stream for that long."""
    text = (
        f"no response for {seconds:g} s: the server hangs, or is busy for longer than the timeout"
    )
    return InferenceServerException(text, "StatusCode.DEADLINE_EXCEEDED")


def _restored(
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
