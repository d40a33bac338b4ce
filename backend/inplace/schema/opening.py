"""Opening and reading a file inside a folder, without following links out of it."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from inplace.errors import LoadError

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
