"""What a plugin does, without TensorRT: shapes, types, aliases, scratch memory, and the launch of its kernels.

`inplace.plugins.adapter` makes a TensorRT plugin of any `Operation`. Keeping the two apart lets the answers a plugin gives be
tested on a machine without a GPU.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar, Self

import torch

from inplace.kernels.memory import Pointer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """Everything one launch gets.

    Attributes:
        shapes: of the inputs.
        inputs, outputs: where they are.
        workspace: address of `Operation.workspace` bytes.
        locks: int32 counters, `Operation.locks` of them, zero before the first launch; every launch leaves them zero.
        pdl: launch kernels as programmatic dependents.
    """

    shapes: Sequence[Shape]
    inputs: Sequence[Pointer]
    outputs: Sequence[Pointer]
    workspace: int
    locks: Pointer
    pdl: bool


@dataclass(frozen=True)
class Operation(ABC):
    """One kind of plugin; its dataclass fields are what is stored in the plan.

    Attributes:
        name: the plugin's name in the plan.
        aliases: output index → index of the input whose memory it is.
    """

    name: ClassVar[str]
    aliases: ClassVar[Mapping[int, int]] = {}

    @property
    @abstractmethod
    def input_count(self) -> int:
        """How many inputs it takes."""

    @abstractmethod
    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Whether the tensor at this position may have its type, given those before it: inputs first, then outputs."""

    @abstractmethod
    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """The element types of its outputs."""

    @abstractmethod
    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The extents of its outputs: taken over from the inputs' extents, whatever stands for one, or an int."""

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """Bytes of scratch memory for inputs up to these shapes."""
        return 0

    def locks(self) -> int:
        """How many counters it needs."""
        return 0

    @abstractmethod
    def launch(self, call: Launch) -> None:
        """Launch its kernels on PyTorch's current stream."""

    def to_fields(self) -> dict[str, int]:
        """The dataclass fields as 32-bit integers: TensorRT 10.6 hands Python anything else back changed."""
        return {
            field.name: _encoded(getattr(self, field.name), field.metadata.get("choices"))
            for field in fields(self)
        }

    @classmethod
    def from_fields(cls, values: Mapping[str, int]) -> Self:
        """The inverse of `to_fields`."""
        return cls(
            **{
                f.name: _decoded(values[f.name], f.type, f.metadata.get("choices"))
                for f in fields(cls)
            }
        )


def tokens(shape: Shape) -> int:
    """The extent of everything but the last axis."""
    return prod(shape[:-1])


def _encoded(value: object, choices: Sequence[str] | None) -> int:
    if isinstance(value, str):
        assert choices is not None
        return choices.index(value)
    if isinstance(value, float):
        return int(struct.unpack("<i", struct.pack("<f", value))[0])
    assert isinstance(value, int)
    return int(value)


def _decoded(value: int, kind: object, choices: Sequence[str] | None) -> Any:
    if choices is not None:
        return choices[value]
    if kind is float:
        return struct.unpack("<f", struct.pack("<i", value))[0]
    return bool(value) if kind is bool else value
