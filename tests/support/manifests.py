"""Engine folders that are changed on purpose."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inplace.schema.files import DIGEST, digest_of
from inplace.schema.served import FILE_NAME

Change = Callable[[dict[str, Any]], object]


def edit(folder: Path, change: Change, file: str = FILE_NAME) -> None:
    """Change the fields of a manifest and record the digest that they have then."""
    fields = json.loads((folder / file).read_text())
    change(fields)
    save(folder, fields, file)


def save(folder: Path, fields: dict[str, Any], file: str = FILE_NAME) -> None:
    """Write the fields of a manifest with their digest."""
    fields = {name: value for name, value in fields.items() if name != DIGEST}
    (folder / file).write_text(json.dumps(fields | {DIGEST: digest_of(fields)}))


def exchange(folder: Path, name: str, content: bytes, manifest: str = FILE_NAME) -> None:
    """Write another content into a file, as if the engine had been built with it."""
    (folder / name).write_bytes(content)

    def record(fields: dict[str, Any]) -> None:
        [entry] = [each for each in fields["files"] if each["name"] == name]
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    edit(folder, record, manifest)
