"""The files of an engine folder: what a manifest records, how they are read, and how they appear.

Each file is opened once and read whole into one buffer. Size and checksum are checked there, and
that buffer is what is loaded: nobody can exchange a file between the check and its use. A folder
appears whole or not at all (`publish`).
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field

from inplace.errors import LoadError
from inplace.schema.records import Record, check_name, open_file, read_file

FileName = Annotated[str, AfterValidator(check_name)]
"""The name of a file relative to the engine's folder, with ``/`` between folders."""


class FileRecord(Record):
    """A file beside the manifest.

    Attributes:
        name: its name.
        bytes: its size.
        sha256: its SHA-256 checksum, hexadecimal.
    """

    name: FileName
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def of(cls, folder: Path, name: str) -> Self:
        """Record a file that was just written into ``folder``."""
        with (folder / name).open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(name=name, bytes=file.tell(), sha256=checksum)


def record_files(folder: Path, leave_out: str) -> tuple[FileRecord, ...]:
    """Record every file below ``folder`` in the order of the names, but the one to leave out."""
    names = sorted(path.relative_to(folder).as_posix() for path in _files(folder))
    return tuple(FileRecord.of(folder, name) for name in names if name != leave_out)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def find_file(files: tuple[FileRecord, ...], name: str) -> FileRecord:
    """The record of a file; LoadError if the manifest does not list it."""
    for record in files:
        if record.name == name:
            return record
    raise LoadError(f"the manifest lists no file {name}; build the model again")


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

    def read(self, record: FileRecord) -> memoryview:
        """Read a file whole, checked.

        Raises:
            LoadError: the file is missing or not a regular file of the folder, or its size or
                checksum is not the recorded one.
        """
        with self._open(record) as descriptor:
            return self._checked(record, descriptor)

    def read_code(self, record: FileRecord) -> memoryview:
        """Read a file whose content is executed, as `read`, if it is in a trusted folder.

        Raises:
            LoadError: as `read`; or it is outside the trusted folders, and was not read.
        """
        with self._open(record) as descriptor:
            self._check_trusted(record, descriptor)
            return self._checked(record, descriptor)

    def check_trusted(self, record: FileRecord) -> None:
        """Raise the LoadError of `read_code` for a file outside the trusted folders."""
        with self._open(record) as descriptor:
            self._check_trusted(record, descriptor)

    @contextmanager
    def open(self, record: FileRecord) -> Iterator[int]:
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
    def _open(self, record: FileRecord) -> Iterator[int]:
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

    def _checked(self, record: FileRecord, descriptor: int) -> memoryview:
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

    def _check_size(self, record: FileRecord, size: int) -> None:
        if size != record.bytes:
            raise LoadError(
                f"{self.path / record.name} has {size:,} bytes, the manifest says "
                f"{record.bytes:,}: it is truncated or replaced; build the model again"
            )

    def _check_trusted(self, record: FileRecord, descriptor: int) -> None:
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
