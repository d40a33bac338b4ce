"""Where objects lie: a folder of files, or what fsspec opens (s3, memory, …)."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import fsspec

from inplace.errors import LoadError

Part = bytes | memoryview
"""A part of an object's bytes."""

PARTIAL = ".part"
"""Ends the names of files that are being written."""

BLOCK_BYTES = 8 << 20
"""Bytes that are written or read at once."""


@dataclass(frozen=True)
class Entry:
    """An object.

    Attributes:
        name: its name.
        size: bytes.
        modified: when it was written, in seconds since 1970.
    """

    name: str
    size: int
    modified: float


class Bucket(Protocol):
    """Objects by name. A failure of what holds them is an `OSError`."""

    def list(self, prefix: str = "") -> list[Entry]:
        """The objects whose names begin so."""

    def read(self, name: str) -> bytearray | bytes:
        """An object; FileNotFoundError if there is none."""

    def write(self, name: str, parts: Iterable[Part]) -> None:
        """Write an object, which appears whole or not at all; an older one is replaced."""

    def create(self, name: str, parts: Iterable[Part]) -> bool:
        """Write an object if there is none; whether it was written. Of several writers one wins."""

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""


def open_bucket(url: str, folder: str = "") -> Bucket:
    """Open a folder.

    Args:
        url: its URL, or that of the one around it.
        folder: its name in that one; empty for the folder of the URL.

    Raises:
        LoadError: it cannot be opened, or a package is missing.
    """
    parsed = urlsplit(url)
    try:
        if parsed.scheme == "file":
            return FileBucket(Path(unquote(parsed.path)) / folder)
        system, path = fsspec.core.url_to_fs(url)
    except (OSError, ValueError, ImportError) as error:
        extra = "; install inplace-triton[s3]" if isinstance(error, ImportError) else ""
        text = f"the store of the snapshots {url!r} cannot be opened: {error}{extra}"
        raise LoadError(text) from error
    return ObjectBucket(system, f"{path.rstrip('/')}/{folder}")


class FileBucket:
    """Files in a folder, which only their owner may read.

    A file is written under another name and renamed. `create` links a finished file, which fails
    where the name exists, also over NFS.

    Args:
        folder: made if it does not exist.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def list(self, prefix: str = "") -> list[Entry]:
        """The files whose names begin so, also those that are being written."""
        entries = []
        with os.scandir(self._folder) as files:
            for file in files:
                if file.name.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):
                        status = file.stat(follow_symlinks=False)
                        entries.append(Entry(file.name, status.st_size, status.st_mtime))
        return entries

    def read(self, name: str) -> bytearray:
        """A file; FileNotFoundError if there is none."""
        descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            content = bytearray(os.fstat(descriptor).st_size)
            view, done = memoryview(content), 0
            while count := file.readinto(view[done : done + BLOCK_BYTES]):
                done += count
        return content[:done] if done < len(content) else content

    def write(self, name: str, parts: Iterable[Part]) -> None:
        """Write a file and rename it."""
        partial = self._write_partial(name, parts)
        try:
            partial.replace(self._folder / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def create(self, name: str, parts: Iterable[Part]) -> bool:
        """Write a file and link it; whether the name was free."""
        partial = self._write_partial(name, parts)
        try:
            (self._folder / name).hardlink_to(partial)
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        return True

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        (self._folder / name).unlink(missing_ok=True)

    def _write_partial(self, name: str, parts: Iterable[Part]) -> Path:
        path = self._folder / f"{name}.{secrets.token_hex(8)}{PARTIAL}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for part in parts:
                    view = memoryview(part).cast("B")
                    while len(view):
                        view = view[file.write(view[:BLOCK_BYTES]) :]
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


class ObjectBucket:
    """Objects of an fsspec file system whose puts are atomic.

    Args:
        system: the file system.
        path: the folder in it.
    """

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path.rstrip("/")

    def list(self, prefix: str = "") -> list[Entry]:
        """The objects whose names begin so."""
        self._system.invalidate_cache(self._path)
        found = self._system.find(self._path, prefix=prefix, detail=True)
        entries = []
        for path, info in found.items():
            name = path.rpartition("/")[2]
            if name.startswith(prefix):  # not every file system looks at the prefix
                entries.append(Entry(name, int(info["size"]), _modified(info)))
        return entries

    def read(self, name: str) -> bytes:
        """An object; FileNotFoundError if there is none."""
        content: bytes = self._system.cat_file(f"{self._path}/{name}")
        return content

    def write(self, name: str, parts: Iterable[Part]) -> None:
        """Put an object."""
        self._system.pipe_file(f"{self._path}/{name}", b"".join(parts))

    def create(self, name: str, parts: Iterable[Part]) -> bool:
        """Put an object on the condition that there is none."""
        try:
            self._system.pipe_file(f"{self._path}/{name}", b"".join(parts), mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if "PreconditionFailed" in repr(error) or "ConditionalRequestConflict" in repr(error):
                return False
            raise
        return True

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(f"{self._path}/{name}")


def _modified(info: Mapping[str, Any]) -> float:
    """When an object was written; now, if its file system does not say."""
    written = info.get("LastModified") or info.get("mtime") or info.get("created")
    if isinstance(written, datetime):
        return written.timestamp()
    return float(written) if isinstance(written, int | float) else time.time()
