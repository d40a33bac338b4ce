"""The errors of the runtime: loading an engine, calling one, and requests to a served model."""

from enum import StrEnum


class InplaceError(Exception):
    """Base of every error that this project raises on purpose; its text is for its reader."""


class LoadError(InplaceError):
    """An engine directory cannot be served: missing, damaged, of another version or machine."""


class CallError(InplaceError):
    """A call of `inplace.standalone.Engine` is refused; no state was changed."""


class Code(StrEnum):
    """Why a request is refused. Part of the protocol: clients match on it."""

    BAD_DTYPE = "BAD_DTYPE"
    BAD_INPUT = "BAD_INPUT"
    BAD_OUTPUT = "BAD_OUTPUT"
    BAD_PARAMETER = "BAD_PARAMETER"
    BAD_SHAPE = "BAD_SHAPE"
    BAD_SNAPSHOT = "BAD_SNAPSHOT"
    CANCELLED = "CANCELLED"
    CAPACITY = "CAPACITY"
    EMPTY_INPUT = "EMPTY_INPUT"
    ENGINE_FAILED = "ENGINE_FAILED"
    FENCED = "FENCED"
    MISSING_INPUT = "MISSING_INPUT"
    NO_FREE_SLOT = "NO_FREE_SLOT"
    NO_SEQUENCE_ID = "NO_SEQUENCE_ID"
    NO_SNAPSHOT = "NO_SNAPSHOT"
    POSITION = "POSITION"
    QUEUE_FULL = "QUEUE_FULL"
    SEQUENCE_BUSY = "SEQUENCE_BUSY"
    SEQUENCE_KEY = "SEQUENCE_KEY"
    SHUTDOWN = "SHUTDOWN"
    SNAPSHOT_BUSY = "SNAPSHOT_BUSY"
    UNKNOWN_SEQUENCE = "UNKNOWN_SEQUENCE"
    VALUE_RANGE = "VALUE_RANGE"


RESTORED = "the sequence was restored at position "
"""Begins the message of a `POSITION` error; the number follows."""


def restored_position(message: str) -> int | None:
    """The position in the message of an error with `RESTORED`; None in another one."""
    _, found, rest = message.partition(RESTORED)
    digits = rest.partition(",")[0]
    return int(digits) if found and digits.isascii() and digits.isdigit() else None


MAX_ID_BYTES, MAX_MESSAGE_BYTES = 1600, 4000
"""Bytes of an id and of the message in an error that a client receives. gRPC sends it as a header,
and clients drop headers of more than 8 KB."""


def truncate_for_header(text: str, max_bytes: int) -> str:
    """The beginning of a text that takes at most ``max_bytes`` in a gRPC header, and ``…``.

    gRPC percent-encodes all but printable ASCII: three bytes for each byte of UTF-8.
    """
    if len(text) * 12 <= max_bytes:
        return text
    for end, character in enumerate(text):
        plain = " " <= character <= "~" and character != "%"
        max_bytes -= 1 if plain else 3 * len(character.encode(errors="surrogatepass"))
        if max_bytes < 0:
            return f"{text[:end]}…"
    return text


class RequestError(InplaceError):
    """One request is refused; its sequence and the other requests of its batch are unchanged.

    Args:
        code: why, for programs.
        message: what was wrong, what was expected, what to do.
        retryable: the same request may succeed later.
    """

    def __init__(self, code: Code, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable

    def wire(self, sequence_id: int | str, request_id: str) -> str:
        """The text that a client receives.

        ``INPLACE-<code> retryable=<0|1> sequence=<id> request=<id>: <message>``, where an absent id
        is ``-`` and long ids and messages are truncated.
        """
        sequence = truncate_for_header(str(sequence_id), MAX_ID_BYTES)
        if sequence_id in (0, ""):
            sequence = "-"
        request = truncate_for_header(request_id, MAX_ID_BYTES) or "-"
        message = truncate_for_header(str(self), MAX_MESSAGE_BYTES)
        retryable = int(self.retryable)
        return (
            f"INPLACE-{self.code} retryable={retryable} sequence={sequence} request={request}:"
            f" {message}"
        )


def backend_failure(error: Exception, advice: str = "START again") -> RequestError:
    """The error of a request that failed through a defect in the backend.

    Args:
        error: what was raised.
        advice: what the client should do.
    """
    return RequestError(
        Code.ENGINE_FAILED, f"the backend failed ({type(error).__name__}: {error}); {advice}"
    )
