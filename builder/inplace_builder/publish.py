"""Put an engine in its place: whole, after it was verified, or not at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from inplace.errors import LoadError
from inplace.schema.publish import RestoreError, publish, replace_conflict

from inplace_builder.errors import BuildError, rejected


def check_target(target: Path, mark: Path) -> None:
    """Raise BuildError if ``target`` cannot be written, before the work of a build is done.

    It can if it is free or an engine that may be replaced, and a folder can be made beside it.

    Args:
        target: the folder to write.
        mark: the file, relative to it, that an engine directory has.
    """
    if target.name in ("", ".."):
        raise BuildError(f"{target} has no name of its own; name the folder to write")
    try:
        if (reason := replace_conflict(target, mark)) is not None:
            raise BuildError(reason)
        parent = target.parent
        while not parent.exists():
            parent = parent.parent
        # access rights do not show it for root, or on a read-only file system
        Path(tempfile.mkdtemp(prefix=".inplace-", dir=parent)).rmdir()
    except OSError as error:
        raise BuildError(f"{target} cannot be written: {error}; choose another place") from error


@contextlib.contextmanager
def publish_engine(target: Path) -> Iterator[Path]:
    """A draft folder that takes the place of ``target`` when the block ends without an error.

    Errors of the block pass through; the draft is removed then, and ``target`` stays as it was.

    Raises:
        BuildError: the draft cannot be made, or cannot be moved into place.
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(target):
            draft = stack.enter_context(publish(target))
        yield draft
        with disk_errors(target):
            stack.close()


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the OSError of a failed write into a BuildError."""
    try:
        yield
    except RestoreError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(
            f"{target} cannot be written: {error}; free space there or choose another place "
            f"(nothing was left behind)"
        ) from error


@contextlib.contextmanager
def load_errors() -> Iterator[None]:
    """Turn the LoadError of an engine that was just written into a BuildError."""
    try:
        yield
    except LoadError as error:
        raise rejected(f"the engine cannot be loaded: {error}") from error
