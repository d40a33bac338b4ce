"""The files of an engine, as the manifest records them."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from inplace.errors import LoadError
from inplace.schema.dtypes import Dtype
from inplace.schema.files import sha256
from inplace.schema.records import Frozen


class File(Frozen):
    """A file beside the manifest.

    Attributes:
        file: its name.
        bytes: its size.
        sha256: its checksum, hexadecimal.
    """

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """The record of a file that was just written."""
        return cls(file=path.name, bytes=path.stat().st_size, sha256=sha256(path))

    def checked(self, folder: Path) -> Path:
        """The file's path.

        Raises:
            LoadError: it has not the size and the checksum that were recorded.
        """
        path = folder / self.file
        if not path.is_file():
            raise LoadError(
                f"{path} is missing; the manifest beside it names it: build the model again"
            )
        size = path.stat().st_size
        if size != self.bytes:
            raise LoadError(
                f"{path} has {size:,} bytes, the manifest says {self.bytes:,}: it is truncated or replaced; build the model again"
            )
        if (found := sha256(path)) != self.sha256:
            raise LoadError(
                f"{path} has the checksum {found[:12]}…, the manifest says {self.sha256[:12]}…: changed; build the model again"
            )
        return path


class Profile(Frozen):
    """A range of steps a plan is tuned for.

    Attributes:
        rows: fewest and most rows.
        tokens: fewest and most tokens; the same as the rows in a program that takes one entry a row.
    """

    rows: tuple[int, int]
    tokens: tuple[int, int]

    def holds(self, rows: int, tokens: int) -> bool:
        """Whether a step of this size may run in it."""
        return self.rows[0] <= rows <= self.rows[1] and self.tokens[0] <= tokens <= self.tokens[1]


class Plan(Frozen):
    """What a TensorRT plan needs beside itself.

    Attributes:
        flavor: the package it was built with.
        version: that package's version; a plan runs with no other.
        gpu: name of the GPU it was built on; empty where it was compiled for ``compute_capability`` without one.
        compute_capability: of the GPU it runs on, for example ``9.0``.
        profiles: in the plan's order.
        weights: weights that the plan does not hold but takes as inputs (safetensors): one copy for all profiles.
    """

    flavor: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    gpu: str
    compute_capability: str
    profiles: tuple[Profile, ...] = Field(min_length=1)
    weights: File | None = None


class EngineFile(File):
    """The file with the compiled graph, and what it needs.

    Attributes:
        kind: which engine class loads it.
        device: where it runs.
        dtype: the element type of its weights.
        plan: for TensorRT.
    """

    kind: Literal["torch", "tensorrt"]
    device: Literal["cpu", "cuda"]
    dtype: Dtype
    plan: Plan | None = None
