"""The errors of the runtime: one base, one class a moment (load, call, request), one code a cause."""

from enum import StrEnum


class InplaceError(Exception):
    """Base of every error this project raises on purpose; its text is meant for the person who meets it."""


class LoadError(InplaceError):
    """An engine directory cannot be served: it is missing, damaged, of another version, or does not fit this machine."""


class CallError(InplaceError):
    """A call of `inplace.standalone.StepEngine` is refused; no state was touched. The text names the argument."""


class Code(StrEnum):
    """What was wrong with one request. The name is part of the protocol: clients may match on it."""

    BAD_DTYPE = "BAD_DTYPE"
    BAD_PARAMETER = "BAD_PARAMETER"
    BAD_SHAPE = "BAD_SHAPE"
    CAPACITY = "CAPACITY"
    EMPTY_INPUT = "EMPTY_INPUT"
    ENGINE_FAILED = "ENGINE_FAILED"
    MISSING_INPUT = "MISSING_INPUT"
    NO_FREE_SLOT = "NO_FREE_SLOT"
    NO_SEQUENCE_ID = "NO_SEQUENCE_ID"
    POSITION = "POSITION"
    QUEUE_FULL = "QUEUE_FULL"
    SEQUENCE_KEY = "SEQUENCE_KEY"
    SHUTDOWN = "SHUTDOWN"
    UNKNOWN_SEQUENCE = "UNKNOWN_SEQUENCE"
    VALUE_RANGE = "VALUE_RANGE"


LONGEST_NAME, LONGEST_WHY = 1600, 4000
"""Bytes of a wire text that an id and the message may take: gRPC sends it as a header, and clients drop headers of more than 8 KB."""


def header(text: str, most: int) -> str:
    """The beginning of a text, as much of it as takes ``most`` bytes in a gRPC header, where all but printable ASCII takes three a byte."""
    for end, character in enumerate(text) if len(text) * 12 > most else ():
        most -= (
            1
            if " " <= character <= "~" and character != "%"
            else 3 * len(character.encode(errors="surrogatepass"))
        )
        if most < 0:
            return f"{text[:end]}…"
    return text


class RequestError(InplaceError):
    """One request is refused; its sequence and its batch mates are as they were before it.

    Args:
        code: what was wrong.
        message: what was found, what was expected, what to do.
        retryable: the same request, sent again later, may succeed.
    """

    def __init__(self, code: Code, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable

    def wire(self, sequence: int | str, request: str) -> str:
        """The text a client receives: ``INPLACE-<code> retryable=<0|1> sequence=<id> request=<id>: <message>``.

        An id that the client did not give is written ``-``; what is longer than clients would read is cut short.
        """
        named = header(str(sequence), LONGEST_NAME) if sequence not in (0, "") else "-"
        head = f"INPLACE-{self.code} retryable={int(self.retryable)} sequence={named} request={header(request, LONGEST_NAME) or '-'}"
        return f"{head}: {header(str(self), LONGEST_WHY)}"


def failed(error: Exception, after: str = "START again") -> RequestError:
    """What clients hear of a defect in the backend; ``after`` says what to do."""
    return RequestError(
        Code.ENGINE_FAILED, f"the backend failed ({type(error).__name__}: {error}); {after}"
    )
