"""The base class of what plugins do, and what a launch is given."""

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar, Self

import torch

from inplace.kernels.memory import Memory, Pointer

Shape = tuple[int, ...]


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """The arguments of one launch.

    Attributes:
        shapes: shapes of the inputs.
        inputs, outputs: their addresses and dtypes.
        workspace: address of `Operation.workspace` bytes.
        locks: int32 counters, `Operation.locks` of them. They are zero before the first launch, and
            every launch leaves them zero.
        pdl: launch kernels with programmatic dependent launch.
    """

    shapes: Sequence[Shape]
    inputs: Sequence[Pointer]
    outputs: Sequence[Pointer]
    workspace: int
    locks: Pointer
    pdl: bool

    def scratch(self, offset: int, dtype: torch.dtype) -> Memory:
        """The workspace from this byte on."""
        return Pointer(self.workspace + offset, dtype)


@dataclass(frozen=True)
class Operation(ABC):
    """One kind of plugin. Its dataclass fields are stored in the plan, under their names.

    Attributes:
        name: the plugin's name in the plan.
        aliases: output index → index of the input whose memory the output is.
    """

    name: ClassVar[str]
    aliases: ClassVar[Mapping[int, int]] = {}

    @property
    @abstractmethod
    def input_count(self) -> int:
        """The number of inputs."""

    @abstractmethod
    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Whether the tensor at this position may have its dtype, the last of ``dtypes``.

        Positions count inputs first, then outputs; ``dtypes`` has those of earlier positions too.
        """

    @abstractmethod
    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """The dtypes of the outputs, from those of the inputs."""

    @abstractmethod
    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The extents of the outputs, each an int or one of the inputs' extents.

        The inputs' extents may be symbolic: an implementation only copies them.
        """

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """Bytes of scratch memory for inputs of up to these shapes."""
        return 0

    def locks(self) -> int:
        """How many int32 counters a launch needs."""
        return 0

    @abstractmethod
    def launch(self, call: Launch) -> None:
        """Launch the kernels on PyTorch's current stream."""

    def to_fields(self) -> dict[str, int]:
        """The dataclass fields as int32: TensorRT 10.6 returns anything else changed."""
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


def num_tokens(shape: Shape) -> int:
    """The product of all extents but the last."""
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
