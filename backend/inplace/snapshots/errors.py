"""Why a snapshot cannot be written or restored."""

from enum import StrEnum

from inplace.errors import Code, InplaceError, RequestError


class SnapshotReason(StrEnum):
    """What is wrong. It is a label of the metrics, and begins the text of the error."""

    MISSING = "missing"
    """The store has none for this id and key."""
    EXPIRED = "expired"
    TRUNCATED = "truncated"
    TAMPERED = "tampered"
    """Its MAC is wrong: it was changed, or written with another secret."""
    FOREIGN = "foreign"
    """It belongs to a model with other states, or its states do not fit into a slot here."""
    REPLAYED = "replayed"
    """It lies under the name of another sequence, or of another epoch of its own."""
    CLAIMED = "claimed"
    """Another server has claimed it at the same time."""
    FENCED = "fenced"
    """Another server has restored the sequence since, or it has ended there."""
    QUOTA = "quota"
    UNAVAILABLE = "unavailable"
    """The store could not be reached, or refused."""


_CODES = {
    SnapshotReason.MISSING: Code.NO_SNAPSHOT,
    SnapshotReason.EXPIRED: Code.NO_SNAPSHOT,
    SnapshotReason.CLAIMED: Code.SNAPSHOT_BUSY,
    SnapshotReason.UNAVAILABLE: Code.SNAPSHOT_BUSY,
    SnapshotReason.FENCED: Code.FENCED,
}


class SnapshotError(InplaceError):
    """A snapshot cannot be written or restored.

    Args:
        reason: what is wrong.
        message: the details.
    """

    def __init__(self, reason: SnapshotReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def as_refusal(self) -> RequestError:
        """The error of a request that asks for the snapshot."""
        code = _CODES.get(self.reason, Code.BAD_SNAPSHOT)
        busy = code is Code.SNAPSHOT_BUSY
        advice = "send it again" if busy else "START without 'restore' and send all tokens again"
        return RequestError(code, f"{self.reason}: {self}; {advice}", retryable=busy)
