"""The files beside a manifest, and what the manifest records of them."""

import hashlib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from inplace.errors import LoadError
from inplace.schema.dtypes import Dtype
from inplace.schema.records import Record

Flavor = Literal["tensorrt", "tensorrt_rtx"]
"""The package of a TensorRT: TensorRT itself, or TensorRT for RTX."""


class File(Record):
    """A file beside the manifest.

    Attributes:
        file: its name.
        bytes: its size.
        sha256: its SHA-256 checksum, hexadecimal.
    """

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Record a file that was just written."""
        return cls(file=path.name, bytes=path.stat().st_size, sha256=_sha256(path))

    def verified(self, folder: Path) -> Path:
        """Check the file in ``folder`` and return its path.

        Raises:
            LoadError: the file is missing, or its size or checksum is not the recorded one.
        """
        path = folder / self.file
        if not path.is_file():
            raise LoadError(
                f"{path} is missing; the manifest beside it names it: build the model again"
            )
        size = path.stat().st_size
        if size != self.bytes:
            raise LoadError(
                f"{path} has {size:,} bytes, the manifest says {self.bytes:,}: "
                "it is truncated or replaced; build the model again"
            )
        checksum = _sha256(path)
        if checksum != self.sha256:
            raise LoadError(
                f"{path} has the checksum {checksum[:12]}…, the manifest says "
                f"{self.sha256[:12]}…: it was changed; build the model again"
            )
        return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Profile(Record):
    """A range of step sizes that a TensorRT plan is tuned for.

    Attributes:
        rows: smallest and largest number of rows.
        tokens: smallest and largest number of tokens; equal to ``rows`` in a program that takes
            one entry a row.
    """

    rows: tuple[int, int]
    tokens: tuple[int, int]

    def covers(self, rows: int, tokens: int) -> bool:
        """Whether a step of this size can run in the profile."""
        return self.rows[0] <= rows <= self.rows[1] and self.tokens[0] <= tokens <= self.tokens[1]


class Plan(Record):
    """What a TensorRT plan needs to run.

    Attributes:
        flavor: the package it was built with.
        version: that package's version; no other version can run the plan.
        gpu: name of the GPU it was built on; empty if it was compiled for
            ``compute_capability`` without a GPU.
        compute_capability: that of the GPU it runs on, for example ``9.0``.
        profiles: in the plan's order.
        weights: weights that the plan takes as inputs instead of holding them (safetensors), so
            that all profiles share one copy.
    """

    flavor: Flavor
    version: str
    gpu: str
    compute_capability: str
    profiles: tuple[Profile, ...] = Field(min_length=1)
    weights: File | None = None


class EngineFile(File):
    """The file with the compiled graph.

    Attributes:
        kind: the engine class that loads it.
        device: where it runs.
        dtype: the element type of its weights.
        plan: only for TensorRT.
    """

    kind: Literal["torch", "tensorrt"]
    device: Literal["cpu", "cuda"]
    dtype: Dtype
    plan: Plan | None = None
