"""The base of the records that an engine directory holds as JSON files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from inplace.errors import LoadError


class Record(BaseModel):
    """A part of a manifest: immutable, and an unknown field is an error.

    A field whose name in the file differs from its name in Python has an alias.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="constants",
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

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


class _Version(BaseModel):
    manifest_version: int


class RecordFile(Record):
    """A record that is a file of its own.

    Attributes:
        file_name: the file's name in an engine directory.
        manifest_version: the version of the file's format, in each subclass a `Literal` with a
            default; another version is refused.
    """

    file_name: ClassVar[str]
    manifest_version: int

    def save(self, folder: Path | str) -> None:
        """Write the file into ``folder``."""
        (Path(folder) / self.file_name).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read the file from ``folder``.

        Raises:
            LoadError: the file is missing or damaged, or has another version.
        """
        folder = Path(folder)
        path = folder / cls.file_name
        try:
            text = path.read_text()
        except FileNotFoundError:
            raise LoadError(f"{path} does not exist: {_describe(folder)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"{path} cannot be read: {error}") from error
        try:
            version = _Version.model_validate_json(text).manifest_version
        except ValidationError as error:
            raise LoadError(
                f"{path} is not a manifest ({_first_error(error)}); build the engine again"
            ) from error
        supported = cls.model_fields["manifest_version"].default
        if version != supported:
            raise LoadError(
                f"{path} has manifest version {version}, this runtime reads version {supported}: "
                "build the engine again with this version of inplace, "
                "or serve it with the one that built it"
            )
        try:
            return cls.model_validate_json(text, by_alias=True, by_name=False)
        except ValidationError as error:
            raise LoadError(
                f"{path} is damaged ({_first_error(error)}); build the engine again"
            ) from error


CONTENTS = {
    "engine.json": "is an engine for a server; load it with `inplace serve`, "
    "and look at it with `inplace inspect`",
    "direct.json": "is an engine that is called without a server; load it with `inplace.load`",
    "front.json": "is the generate proxy of a stream model and has no engine of its own; "
    "look at the model that it is named after",
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
