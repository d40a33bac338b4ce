"""The secret that makes names and MACs."""

from pathlib import Path

from inplace.errors import LoadError

MIN_SECRET_BYTES = 32
"""Bytes that a secret has at least."""


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
