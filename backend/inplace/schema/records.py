"""What the manifest's records have in common: they never change, and a damaged file is refused in one line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from inplace.errors import LoadError


class Frozen(BaseModel):
    """Base of all records: immutable, and a field nobody knows is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="constants",
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, which copies cached properties too; of another record they may be wrong."""
        copied = super().model_copy(update=update, deep=deep)
        for name in set(copied.__dict__) - set(type(self).model_fields):
            del copied.__dict__[name]
        return copied


Record = TypeVar("Record", bound=Frozen)


class _Version(BaseModel):
    manifest_version: int


def read(record: type[Record], path: Path, version: int) -> Record:
    """Read a record from a JSON file of the given ``manifest_version``.

    Raises:
        LoadError: the file is missing, no such record, or of another version.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise LoadError(f"{path} does not exist: {_what(path.parent)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    try:
        found = _Version.model_validate_json(text).manifest_version
    except ValidationError as error:
        raise LoadError(
            f"{path} is no manifest ({_first(error)}); build the engine again"
        ) from error
    if found != version:
        raise LoadError(
            f"{path} has manifest version {found}, this runtime reads version {version}: "
            f"build the engine again with this version of inplace, or serve it with the one that built it"
        )
    try:
        return record.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        raise LoadError(f"{path} is damaged ({_first(error)}); build the engine again") from error


OTHERS = {
    "engine.json": "is an engine for a server; load it with `inplace serve`, and look at it with `inplace inspect`",
    "direct.json": "is an engine that is called without a server; load it with `inplace.load`",
    "front.json": "is the front of a stream model, which has no engine of its own; look at the model it is named after",
}
"""What a folder is, by the record it holds."""


def _what(folder: Path) -> str:
    """What a folder is that does not hold the record that was looked for, and what to do with it."""
    for held in (folder, folder / "1"):
        for name, what in OTHERS.items():
            if (held / name).is_file():
                return f"{folder} {what}"
    return f"{folder} is no engine directory; build one with `inplace build`, or from Python with `inplace_builder.build`"


def _first(error: ValidationError) -> str:
    """The first complaint of a validation, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
