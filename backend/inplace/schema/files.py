"""Files and folders of engines: checksums, and folders that appear whole or not at all."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def sha256(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StrandedError(OSError):
    """What stood in a place could be moved away but not back; says where it lies."""


def occupied(target: Path, mark: Path) -> str | None:
    """Why nothing may be written to ``target``: it is a file, or a folder that holds something and not the file ``mark``; else None."""
    if target.exists() and not target.is_dir():
        return f"{target} is a file; choose the folder to write the engine into"
    if target.is_dir() and any(target.iterdir()) and not (target / mark).is_file():
        return f"{target} is a folder with other files in it; choose a new or empty one, or an engine directory to replace"
    return None


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """A draft beside ``target`` that takes its place when the block succeeds and vanishes when it fails.

    Raises:
        OSError: it cannot be written or moved; what stood there stands.
        StrandedError: it does not stand there any more.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    draft.chmod(0o755)
    try:
        yield draft
        if target.exists():
            _replace(target, draft)
        else:
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace(target: Path, draft: Path) -> None:
    """Put the draft in the place of what stands there, which is put back where that fails."""
    old = draft.with_name(f"{draft.name}.old")
    try:
        target.rename(old)
        draft.rename(target)
    except BaseException as error:  # an interrupt between the two as well
        if old.exists() and not target.exists():
            try:
                old.rename(target)
            except OSError as second:
                raise StrandedError(
                    f"{target} could not be replaced ({error}), nor put back ({second}): move {old} there"
                ) from error
        raise
    shutil.rmtree(
        old, ignore_errors=True
    )  # the new one stands: what cannot be deleted of the older one costs only space
