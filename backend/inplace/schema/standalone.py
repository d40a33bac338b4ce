"""The manifest of an engine that is called directly (``direct.json``): its states, its aliases, and how it is called.

A server's engine takes requests, whose tensors have roles; this one takes what its module took. So it has a manifest of its own, and a
directory is either the one or the other.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator
from torch import Tensor

from inplace.schema.artifacts import EngineFile, File
from inplace.schema.dtypes import Dtype
from inplace.schema.records import Frozen, read
from inplace.schema.served import Alias, Lowering

DIRECT_VERSION: Literal[1] = 1


FILE_NAME = "direct.json"


SLOTS = "slots"
"""The graph's input between the module's own and the states."""


Selects = tuple[tuple[int, int], ...]
"""Axis and index of each `Tensor.select` that makes a part of a tensor."""


def part_of(tensor: Tensor, selects: Selects) -> Tensor:
    """The part of a tensor: the same memory."""
    for axis, index in selects:
        tensor = tensor.select(axis, index)
    return tensor


def indices(selects: Selects) -> str:
    """A part as Python spells it: ``[2][0]``."""
    return "".join(f"[{':, ' * axis}{index}]" for axis, index in selects)


def result_name(place: int) -> str:
    """What a plan calls its ``place``-th result."""
    return f"result_{place}"


class Argument(Frozen):
    """One leaf of the module's arguments.

    Attributes:
        where: as the caller writes it: ``cache['keys']``.
        name: the graph's placeholder; empty for a constant, which the graph does not take.
        kind: ``state``, the caller's memory, updated in place; ``tensor``; ``number``, a Python integer; ``constant``, which was the same
            value at the build.
        dtype, shape: of a tensor; an extent that is a text is dynamic, and equal texts are equal extents.
        value: of a constant.
    """

    where: str
    name: str = ""
    kind: Literal["state", "tensor", "number", "constant"]
    dtype: Dtype | None = None
    shape: tuple[int | str, ...] = ()
    value: bool | int | float | str | None = None


class Result(Frozen):
    """One leaf of what the module returns.

    Attributes:
        kind: ``tensor``; ``number``, a Python number that the graph computes; ``constant``, the same in every call.
        dtype, shape: of a tensor; a text is an expression (`inplace.schema.extents`) in the symbols of the arguments' shapes, and one that
            names another symbol depends on the values of tensors.
        value: of a constant.
    """

    kind: Literal["tensor", "number", "constant"]
    dtype: Dtype | None = None
    shape: tuple[int | str, ...] = ()
    value: bool | int | float | str | None = None


class CallSignature(Frozen):
    """How an engine is called.

    Attributes:
        version: of this record.
        arguments: the leaves of ``(args, kwargs)``.
        ranges: smallest and largest value of each symbol in the arguments' shapes; None is no limit.
        results: the leaves of what is returned.
        inputs: PyTorch's serialized tree of ``(args, kwargs)``.
        outputs: PyTorch's serialized tree of what is returned.
        parameters: names of the module's parameters, as far as they were given.
        positional: how many of them were given by position.
    """

    version: Literal[1] = 1
    arguments: tuple[Argument, ...]
    ranges: dict[str, tuple[int | None, int | None]]
    results: tuple[Result, ...]
    inputs: str
    outputs: str
    parameters: tuple[str, ...]
    positional: int


class StandaloneState(Frozen):
    """One state.

    Attributes:
        name: the graph's placeholder.
        owner: ``caller``: an argument; ``module``: a buffer, held by the engine.
        source: where the caller passes it, or the buffer's qualified name.
        dtype: element type.
        shape: the extents of that tensor, as of `Argument`: a text is one that a call chooses.
        selects: where the state is a part of it, several having one source: axis and index of each `Tensor.select` that makes the part.
        written: the line of the module that writes it first, for errors: ``at "file", line 3, in forward (code)``.
        leading: its first axis is the slot axis; else the graph takes ``unsqueeze(0)`` of it. All of these are the tensor's own memory.
    """

    name: str
    owner: Literal["caller", "module"]
    source: str
    dtype: Dtype
    shape: tuple[int | str, ...]
    selects: Selects = ()
    written: str = ""
    leading: bool

    @property
    def extents(self) -> tuple[int | str, ...]:
        """The state's own."""
        found = list(self.shape)
        for axis, _ in self.selects:
            del found[axis]
        return tuple(found)

    @property
    def title(self) -> str:
        """How an error names it."""
        name = f"{self.source}{indices(self.selects)}"
        return f"argument {name}" if self.owner == "caller" else f"the engine's state {name}"

    @property
    def line(self) -> str:
        """What an error about the caller's tensor ends with."""
        return f"; the module writes it {self.written}" if self.written else ""

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor has the type and, but for those that a call chooses, the extents."""
        return (
            tensor.dtype == self.dtype.as_torch
            and tensor.dim() == len(self.shape)
            and all(
                isinstance(wanted, str) or extent == wanted
                for extent, wanted in zip(tensor.shape, self.shape, strict=True)
            )
        )

    def part(self, tensor: Tensor) -> Tensor:
        """The state in the tensor that it is, or is a part of: the same memory."""
        return part_of(tensor, self.selects)


class StandaloneManifest(Frozen):
    """The whole of ``direct.json``.

    Attributes:
        manifest_version: version of this format; another one is refused.
        states: in the order of the graph's placeholders.
        aliases: ``output@input@kind``, one a state.
        lowering: how each state's update was lowered, and why.
        call: how the engine is called.
        rows: rows of a step; row r is slot r.
        engine: the compiled graph.
        held: the values of the states that the module owns; None where it owns none.
        built_with: versions, and what verification found.
    """

    manifest_version: Literal[1] = 1
    states: tuple[StandaloneState, ...]
    aliases: tuple[str, ...]
    lowering: tuple[Lowering, ...]
    call: CallSignature
    rows: int
    engine: EngineFile
    held: File | None
    built_with: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [state.name for state in self.states]
        if sorted(alias.input for alias in self.parsed_aliases) != sorted(names):
            raise ValueError(
                f"the aliases {list(self.aliases)} must be one for each of the states {names}"
            )
        passed = [argument.where for argument in self.call.arguments if argument.kind == "state"]
        if sorted(passed) != sorted(
            {state.source for state in self.states if state.owner == "caller"}
        ):
            raise ValueError(f"the arguments {passed} must be the states that the caller owns")
        for state in self.states:
            extents = list(state.shape)
            for axis, index in state.selects:
                if (
                    not 0 <= axis < len(extents)
                    or not isinstance(extent := extents.pop(axis), int)
                    or not 0 <= index < extent
                ):
                    raise ValueError(
                        f"state {state.name} is {state.selects} of a tensor {state.shape}, which has no such part"
                    )
        if (self.held is None) == any(state.owner == "module" for state in self.states):
            raise ValueError(
                "states that the module owns have a file with their values, and nothing else has"
            )
        return self

    @cached_property
    def tensors(self) -> tuple[StandaloneState, ...]:
        """The tensors that hold the states, each once: the first state of each."""
        first: dict[tuple[str, str], StandaloneState] = {}
        for state in self.states:
            first.setdefault((state.owner, state.source), state)
        return tuple(first.values())

    def bound(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The states, each in the tensor that holds it; ``tensors`` as in `tensors`."""
        held = {
            (state.owner, state.source): tensor
            for state, tensor in zip(self.tensors, tensors, strict=True)
        }
        return [state.part(held[state.owner, state.source]) for state in self.states]

    @property
    def parsed_aliases(self) -> tuple[Alias, ...]:
        """The aliases as records."""
        return tuple(Alias.parse(text) for text in self.aliases)

    @property
    def graph_inputs(self) -> tuple[Argument, ...]:
        """The arguments that the graph takes before ``slots`` and the states."""
        return tuple(
            argument for argument in self.call.arguments if argument.kind in ("tensor", "number")
        )

    def save(self, folder: Path) -> None:
        """Write ``direct.json`` into ``folder``."""
        (folder / FILE_NAME).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``direct.json``.

        Raises:
            LoadError: it is missing, not a manifest, or of another version.
        """
        return read(cls, folder / FILE_NAME, DIRECT_VERSION)
