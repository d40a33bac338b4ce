"""Folders that appear whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


class RestoreError(OSError):
    """A folder was moved aside to be replaced, and could not be moved back; names its new place."""


def replace_conflict(target: Path, marker: Path) -> str | None:
    """The reason why ``target`` must not be replaced, or None.

    A missing folder, an empty one, and one that has the file ``marker`` in it may be replaced.

    Args:
        target: the folder to write.
        marker: a file that marks an engine of ours, relative to ``target``.
    """
    if target.exists() and not target.is_dir():
        return f"{target} is a file; choose the folder to write the engine into"
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        return (
            f"{target} is a folder with other files in it; "
            "choose a new or empty one, or an engine directory to replace"
        )
    return None


@contextlib.contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a draft folder beside ``target``, which replaces it when the block ends.

    The draft is deleted when the block raises.

    Raises:
        OSError: the draft cannot be written or moved; ``target`` is unchanged.
        RestoreError: the old ``target`` was moved aside and could not be moved back.
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
    old = draft.with_name(f"{draft.name}.old")
    try:
        target.rename(old)
        draft.rename(target)
    except BaseException as error:  # includes an interrupt between the two renames
        if old.exists() and not target.exists():
            try:
                old.rename(target)
            except OSError as second:
                raise RestoreError(
                    f"{target} could not be replaced ({error}), nor restored ({second}): "
                    f"move {old} there"
                ) from error
        raise
    # The new folder is in place; what cannot be deleted of the old one only costs space.
    shutil.rmtree(old, ignore_errors=True)
