"""What an operator sets about snapshots."""

from dataclasses import dataclass
from pathlib import Path

from inplace.errors import LoadError

MIN_SECRET_BYTES = 32
"""Bytes that a secret has at least."""


@dataclass(frozen=True)
class SnapshotOptions:
    """Where sequences are stored, and how often.

    Attributes:
        store: the URL of a folder: ``file:///…``, ``s3://bucket/…`` or another of fsspec's.
        secret_file: the path of a file with the secret that all servers of the store share.
        every: positions of a sequence after which it is stored again while it lives; None stores
            sequences only when the server stops.
        seconds: how long a snapshot may be restored after it was written.
        quota_bytes: bytes that the store may hold; None for no limit.
    """

    store: str
    secret_file: str
    every: int | None = None
    seconds: float = 3600.0
    quota_bytes: int | None = None


def read_secret(path: Path | str) -> bytes:
    """The secret that all servers of a store share: the bytes of a file.

    Raises:
        LoadError: it cannot be read, or is too short.
    """
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise LoadError(f"the secret of the snapshots cannot be read: {error}") from error
    if len(secret) < MIN_SECRET_BYTES:
        raise LoadError(
            f"the secret of the snapshots, {path}, has {len(secret)} bytes; expected"
            f" {MIN_SECRET_BYTES} or more: write random ones, the same for all servers"
        )
    return secret
