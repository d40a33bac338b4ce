"""``front.json``: what the front of a stream model must know (`inplace.server.generate_proxy`)."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from inplace.schema.records import Frozen, read

FILE_NAME = "front.json"


VERSION: Literal[1] = 1


SUFFIX = "_generate"
"""The front of a model ``name`` is the model ``name_generate``."""


class ProxyFile(Frozen):
    """A front.

    Attributes:
        manifest_version: of this format.
        model: the stream model.
        most: requests that are passed on at the same time; more wait.
    """

    manifest_version: Literal[1] = VERSION
    model: str
    most: int = Field(ge=1)

    def save(self, folder: Path) -> None:
        """Write ``front.json`` into ``folder``."""
        (folder / FILE_NAME).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``front.json`` from ``folder``.

        Raises:
            LoadError: it is missing, damaged, or of another version.
        """
        return read(cls, folder / FILE_NAME, VERSION)
