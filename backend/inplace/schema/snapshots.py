"""What an operator sets about snapshots of sequences."""

from dataclasses import dataclass


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
