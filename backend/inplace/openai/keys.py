"""API keys: kept as digests, compared in constant time, read again when their file changes.

A key is 256 random bits that this project makes (`new_key`), so a plain SHA-256 digest does not
give it away. Keys appear in no log, no metric and no error.
"""

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from inplace.errors import LoadError
from inplace.openai.errors import ApiError
from inplace.openai.workers import Worker

log = logging.getLogger("inplace.openai")

PREFIX = "sk-inplace-"

CHECK_INTERVAL = 1.0
"""Seconds between two looks at the file."""


class KeyRecord(BaseModel):
    """A key in the file of keys.

    Attributes:
        name: of who has it; it is the client's group in the backend's queue.
        sha256: the digest of the key, hexadecimal.
        requests_per_minute: limit of requests; None for no limit.
        tokens_per_minute: limit of tokens, prompts included, counted when a request ends.
        concurrent: requests at the same time.
        metrics: whether it may read ``/metrics``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrent: int | None = Field(default=None, ge=1)
    metrics: bool = False


class KeyFile(BaseModel):
    """The file of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[KeyRecord, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [key.name for key in self.keys]
        if len(set(names)) < len(names):
            raise ValueError("two keys have the same name")
        return self


def digest(key: str) -> str:
    """The digest of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def sequence_key(key: str) -> str:
    """The ``sequence_key`` of all sequences of an API key, which does not give that away.

    Only those who know the API key can compute it, and every front end computes the same.
    """
    return hmac.digest(key.encode(), b"inplace sequence_key", "sha256").hex()


def new_key(name: str) -> tuple[str, KeyRecord]:
    """A new key, and its record."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, KeyRecord(name=name, sha256=digest(key))


class _Budget:
    """So many units a minute, and at most a minute's at once. May be overdrawn.

    For one process at a time, see `Worker.locked`.

    Args:
        per_minute: units.
        shared: two numbers that all processes have, zeros at first: the units that were spent and
            not yet earned again, and when that was so, in seconds of the machine's clock.
    """

    def __init__(self, per_minute: int, shared: NDArray[np.float64]) -> None:
        self._per_minute, self._shared = per_minute, shared

    def wait(self) -> float:
        """Seconds until something is left."""
        return max(0.0, (1 - self._per_minute + self._owed()) * 60 / self._per_minute)

    def spend(self, units: int) -> None:
        self._shared[:] = self._owed() + units, time.monotonic()

    def _owed(self) -> float:
        owed, updated = map(float, self._shared)
        return max(0.0, owed - (time.monotonic() - updated) * self._per_minute / 60)


class Use:
    """What is in use of one key, while its record is the same.

    Args:
        record: the key's.
        worker: the process, whose front end's other processes count too.
    """

    def __init__(self, record: KeyRecord, worker: Worker | None = None) -> None:
        self.record, self._worker = record, worker or Worker()
        name = f"key-{digest(record.model_dump_json())}"
        self._concurrent, numbers = self._worker.running(name, further=4)
        shared = numbers.view(np.float64)
        self._requests = _Budget(record.requests_per_minute or 1, shared[:2])
        self._tokens = _Budget(record.tokens_per_minute or 1, shared[2:])

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request, inside the block.

        Raises:
            ApiError: a limit of the key is reached.
        """
        with self._worker.locked():
            self._check()
            if self.record.requests_per_minute is not None:
                self._requests.spend(1)
            self._concurrent.add(1)
        try:
            yield
        finally:
            self._concurrent.add(-1)

    def spend_tokens(self, tokens: int) -> None:
        """Count tokens of a request."""
        if self.record.tokens_per_minute is not None:
            with self._worker.locked():
                self._tokens.spend(tokens)

    def _check(self) -> None:
        record = self.record
        if record.concurrent is not None and self._concurrent.total >= record.concurrent:
            raise _over(f"{record.concurrent} requests at the same time", 1.0)
        if record.requests_per_minute is not None and (wait := self._requests.wait()):
            raise _over(f"{record.requests_per_minute} requests a minute", wait)
        if record.tokens_per_minute is not None and (wait := self._tokens.wait()):
            raise _over(f"{record.tokens_per_minute} tokens a minute", wait)


def _over(limit: str, wait: float) -> ApiError:
    return ApiError(
        429,
        f"the limit of this key is {limit}",
        code="rate_limit_exceeded",
        retry_after=max(1.0, wait),
    )


class Keys:
    """The keys of a file.

    Args:
        path: of the file, JSON: ``{"keys": [{"name": …, "sha256": …, …}]}``.
        worker: the process.

    Raises:
        LoadError: it cannot be read, or is not such a file.
    """

    def __init__(self, path: Path, worker: Worker | None = None) -> None:
        self._path, self._worker = path, worker or Worker()
        self._checked, self._version = time.monotonic(), self._stat()
        self._uses = {record.name: Use(record, self._worker) for record in self._read()}

    def find(self, key: str) -> Use | None:
        """The use of a key; None if there is no such key. Takes the same time for all keys."""
        self._refresh()
        given, match = digest(key), None
        for use in self._uses.values():
            if hmac.compare_digest(use.record.sha256, given):
                match = use
        return match

    def _refresh(self) -> None:
        """Read the file again if it has changed; a file with errors changes nothing."""
        now = time.monotonic()
        if now - self._checked < CHECK_INTERVAL:
            return
        self._checked = now
        try:
            version = self._stat()
            if version == self._version:
                return
            records = self._read()
            old = {use.record: use for use in self._uses.values()}
            uses = {record.name: old.get(record) or Use(record, self._worker) for record in records}
        except (LoadError, OSError) as error:  # `Use` opens files
            log.warning("the keys stay as they were: %s", error)
            return
        self._version, self._uses = version, uses
        log.info("read %d keys from %s", len(records), self._path)

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise LoadError(f"the file of keys {self._path} cannot be read: {error}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[KeyRecord, ...]:
        try:
            return KeyFile.model_validate_json(self._path.read_bytes()).keys
        except OSError as error:
            raise LoadError(f"the file of keys {self._path} cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise LoadError(
                f"the file of keys {self._path} is wrong ({where}: {first['msg']}); expected "
                '{"keys": [{"name": …, "sha256": …}]}, see `inplace openai-key`'
            ) from None
