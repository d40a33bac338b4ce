"""Reading the files of an engine folder.

Each file is opened once and read whole into one buffer. Size and checksum are checked there, and
that buffer is what is loaded: nobody can exchange a file between the check and its use.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from inplace.errors import LoadError

if TYPE_CHECKING:
    from inplace.schema.artifacts import FileRecord

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK, opening a FIFO would wait for a writer.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def check_name(name: str) -> str:
    """Return a file's name in a manifest if it is relative and stays inside the folder.

    Raises:
        ValueError: it is absolute, or has empty parts, ``.``, ``..`` or a NUL byte.
    """
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"{name!r} is not the name of a file inside the engine's folder; "
            "absolute names, empty parts, '.' and '..' are refused"
        )
    return name


@contextmanager
def open_file(folder: Path, name: str) -> Iterator[int]:
    """Open a regular file inside ``folder`` without following symbolic links below it.

    Yields:
        The file descriptor, which is closed at the end of the block.

    Raises:
        FileNotFoundError: there is no such file.
        LoadError: it, or a folder on the way to it, is a symbolic link or something else than a
            regular file.
        OSError: it cannot be opened.
        ValueError: the name is not one of a file inside the folder.
    """
    *parents, last = check_name(name).split("/")
    descriptor = os.open(folder, _FOLDER_FLAGS)
    try:
        for part, flags in (
            *((parent, _FOLDER_FLAGS | os.O_NOFOLLOW) for parent in parents),
            (last, _FILE_FLAGS),
        ):
            try:
                inner = os.open(part, flags, dir_fd=descriptor)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                    raise _not_regular(folder / name) from error
                raise
            os.close(descriptor)
            descriptor = inner
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_regular(folder / name)
        yield descriptor
    finally:
        os.close(descriptor)


def _not_regular(path: Path) -> LoadError:
    return LoadError(
        f"{path} is not a regular file inside its folder (a symbolic link, a folder or a device); "
        "copy the file itself there, or build the model again"
    )


def read_file(descriptor: int, size: int) -> memoryview:
    """Read a file of ``size`` bytes; one byte more is tried, so that a longer file shows.

    Returns:
        The bytes read, at an address that suits every element type. They may be changed: nothing
        else refers to them.
    """
    content, end = torch.empty(size + 1, dtype=torch.uint8).numpy().data, 0
    while end <= size and (count := os.readv(descriptor, [content[end:]])):
        end += count
    return content[:end]


class EngineFolder:
    """A folder of engine files, as a manifest lists them.

    Args:
        path: the folder; it may be reached through symbolic links, its files may not.
        trusted: folders from which files that are code, TensorRT plans, are loaded; None trusts
            ``path`` itself.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path | str, trusted: Sequence[Path | str] | None = None) -> None:
        self.path = Path(path)
        roots = [self.path] if trusted is None else trusted
        self._trusted = tuple(Path(root).resolve() for root in roots)

    def read(self, record: "FileRecord") -> memoryview:
        """Read a file whole, checked.

        Raises:
            LoadError: the file is missing or not a regular file of the folder, or its size or
                checksum is not the recorded one.
        """
        with self._open(record) as descriptor:
            return self._checked(record, descriptor)

    def read_code(self, record: "FileRecord") -> memoryview:
        """Read a file whose content is executed, as `read`, if it is in a trusted folder.

        Raises:
            LoadError: as `read`; or it is outside the trusted folders, and was not read.
        """
        with self._open(record) as descriptor:
            self._check_trusted(record, descriptor)
            return self._checked(record, descriptor)

    def check_trusted(self, record: "FileRecord") -> None:
        """Raise the LoadError of `read_code` for a file outside the trusted folders."""
        with self._open(record) as descriptor:
            self._check_trusted(record, descriptor)

    @contextmanager
    def open(self, record: "FileRecord") -> Iterator[int]:
        """Open a file whose bytes are checked where they are used, for example after a copy.

        Yields:
            The file descriptor.

        Raises:
            LoadError: the file is missing or not a regular file of the folder, or its size is not
                the recorded one.
        """
        with self._open(record) as descriptor:
            self._check_size(record, os.fstat(descriptor).st_size)
            yield descriptor

    @contextmanager
    def _open(self, record: "FileRecord") -> Iterator[int]:
        path = self.path / record.name
        try:
            with open_file(self.path, record.name) as descriptor:
                yield descriptor
        except FileNotFoundError:
            raise LoadError(
                f"{path} is missing; the manifest beside it names it: build the model again"
            ) from None
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error}") from error

    def _checked(self, record: "FileRecord", descriptor: int) -> memoryview:
        # The size first: a file that is much longer is not read.
        self._check_size(record, os.fstat(descriptor).st_size)
        content = read_file(descriptor, record.bytes)
        self._check_size(record, content.nbytes)
        checksum = hashlib.sha256(content).hexdigest()
        if checksum != record.sha256:
            raise LoadError(
                f"{self.path / record.name} has the checksum {checksum[:12]}…, the manifest says "
                f"{record.sha256[:12]}…: it was changed; build the model again"
            )
        return content

    def _check_size(self, record: "FileRecord", size: int) -> None:
        if size != record.bytes:
            raise LoadError(
                f"{self.path / record.name} has {size:,} bytes, the manifest says "
                f"{record.bytes:,}: it is truncated or replaced; build the model again"
            )

    def _check_trusted(self, record: "FileRecord", descriptor: int) -> None:
        # The path of what was opened, whatever the folder's name leads to by now.
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not any(path.is_relative_to(root) for root in self._trusted):
            roots = ", ".join(map(str, self._trusted)) or "none"
            raise LoadError(
                f"{path} is a TensorRT plan, which is code, and is outside the folders whose code "
                f"may run ({roots}); if you trust where it came from, name its folder: "
                "`inplace serve --trust-models`, INPLACE_TRUST_MODELS in the environment of "
                "tritonserver, or trust= of inplace.load"
            )
