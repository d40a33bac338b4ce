"""The files of an engine folder: manifests, how files are read, and how a folder appears.

A manifest is a JSON file, made of records. It lists the other files. Each of those is opened once,
inside the folder and without following links out of it, and read whole into one buffer. Size and
checksum are checked there, and that buffer is what is loaded: nobody can exchange a file between
the check and its use. A folder appears whole or not at all (`publish`).
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from inplace.errors import LoadError


class Record(BaseModel):
    """A part of a manifest: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy a record, without its cached properties: pydantic copies them, and they may change.

        Args:
            update: fields with other values, which are not validated.
            deep: whether to copy nested records too.
        """
        copied = super().model_copy(update=update, deep=deep)
        for name in set(copied.__dict__) - set(type(self).model_fields):
            del copied.__dict__[name]
        return copied


VERSION, DIGEST = "manifest_version", "digest"
"""Fields that every record file has."""


class RecordFile(Record):
    """A record that is a file of its own.

    The file has one field more than the record: ``digest``, the SHA-256 checksum of all others. It
    shows that the file was damaged or edited; it is not a signature.

    Attributes:
        file_name: the file's name in an engine directory.
        rebuild: how a file of this kind is written again, for errors; ``{folder}`` is its folder,
            ``{parent}`` the folder around it.
        manifest_version: the version of the file's format, in each subclass a `Literal` with a
            default; another version is refused.
    """

    file_name: ClassVar[str]
    rebuild: ClassVar[str]
    manifest_version: int

    @property
    def digest(self) -> str:
        """The SHA-256 checksum of the record, see `digest_of`."""
        return digest_of(json.loads(self.model_dump_json()))

    def save(self, folder: Path | str) -> None:
        """Write the file into ``folder``."""
        fields = json.loads(self.model_dump_json())
        text = json.dumps(fields | {DIGEST: digest_of(fields)}, indent=1, ensure_ascii=False)
        (Path(folder) / self.file_name).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read the file from ``folder``.

        Raises:
            LoadError: the file is missing, damaged or changed, or has another version.
        """
        folder = Path(folder)
        path, rebuild = (
            folder / cls.file_name,
            cls.rebuild.format(folder=folder, parent=folder.parent),
        )
        fields = _parse(path, _read(folder, cls.file_name), rebuild)
        version = fields.get(VERSION)
        supported = cls.model_fields[VERSION].default
        if type(version) is not int:
            raise LoadError(f"{path} is not a manifest (it has no {VERSION}); {rebuild}")
        if version != supported:
            raise LoadError(
                f"{path} has manifest version {version}, this runtime reads version {supported}: "
                f"{rebuild}, or serve it with the version of inplace that built it"
            )
        recorded = fields.pop(DIGEST, None)
        if recorded != (actual := digest_of(fields)):
            raise LoadError(
                f"{path} has the digest {actual[:12]}…, it says {str(recorded)[:12]}…: "
                f"it was edited or damaged; {rebuild}"
            )
        try:
            return cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            raise LoadError(f"{path} is damaged ({_first_error(error)}); {rebuild}") from error


def digest_of(fields: Mapping[str, Any]) -> str:
    """The SHA-256 checksum of JSON fields: of their text with sorted keys and without spaces."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _read(folder: Path, name: str) -> bytes:
    """The content of a record file."""
    path = folder / name
    try:
        with open_file(folder, name) as descriptor:
            return bytes(read_file(descriptor, os.fstat(descriptor).st_size))
    except (FileNotFoundError, NotADirectoryError):
        raise LoadError(f"{path} does not exist: {_describe(folder)}") from None
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}") from error


def _parse(path: Path, content: bytes, rebuild: str) -> dict[str, Any]:
    """The fields of a record file."""
    try:
        fields = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise LoadError(f"{path} is not a manifest (invalid JSON: {error}); {rebuild}") from error
    if not isinstance(fields, dict):
        raise LoadError(f"{path} is not a manifest (it is not a JSON object); {rebuild}")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a JSON object, each of which may be there once."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(n for n in names if names.count(n) > 1)!r} twice")
    return fields


CONTENTS = {
    "engine.json": "is an engine for a server; load it with `inplace serve`, "
    "and look at it with `inplace inspect`",
    "standalone.json": "is an engine that is called without a server; load it with `inplace.load`",
    "proxy.json": "is the generate proxy of a stream model and has no engine of its own; "
    "look at the model that it is named after",
    "direct.json": "is an engine of an older version, which is not read any more; build it again "
    "with `inplace_builder.build`",
    "front.json": "is the generate proxy of an older version, which is not read any more; build "
    "its model again with `inplace build`",
}
"""What a folder is, by the file it holds."""


def _describe(folder: Path) -> str:
    """What a folder without the expected file is, and what to do with it."""
    for place in (folder, folder / "1"):
        for name, description in CONTENTS.items():
            if (place / name).is_file():
                return f"{folder} {description}"
    return (
        f"{folder} is not an engine directory; build one with `inplace build`, "
        "or from Python with `inplace_builder.build`"
    )


def _first_error(error: ValidationError) -> str:
    """The first error of a validation, in one line."""
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    return f"{location}: {first['msg']}" if location else first["msg"]


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
    content, end = np.empty(size + 1, np.uint8).data, 0
    while end <= size and (count := os.readv(descriptor, [content[end:]])):
        end += count
    return content[:end]


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
