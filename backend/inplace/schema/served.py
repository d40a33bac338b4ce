"""The manifest of a served engine (``engine.json``): the contract between builder and runtime.

Shapes leave out the batch: a state's ``shape`` is that of one slot, an input's that of one
request.
"""

from functools import cached_property
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from inplace.errors import LoadError
from inplace.schema.artifacts import EngineFile
from inplace.schema.dtypes import Dtype
from inplace.schema.records import Record, RecordFile
from inplace.schema.specs import CLIENT_ROLES, SAMPLING_ROLES, Role, StateSpec, TensorSpec, Update

FILE_NAME = "engine.json"


AliasKind = Literal["operator", "plugin", "kv_cache_update", "copy", "user"]
"""The mechanism that updates a state.

- ``operator``: an ``inplace::`` operator of a PyTorch graph mutates the bound tensor.
- ``plugin``: a TensorRT plugin with an aliased output.
- ``kv_cache_update``: TensorRT's own cache layer.
- ``user``: an operator or plugin of the user's own.
- ``copy``: not in place; the engine writes a second buffer and the runtime swaps the two.
"""


ROW_IS_SLOT_KINDS = frozenset({"kv_cache_update", "copy"})
"""Kinds that update slot r from row r: row r of a step must be slot r."""


class Alias(Record):
    """An output that shares its memory with an input.

    Attributes:
        output: the output's name.
        input: the name of the state.
        kind: the mechanism.
    """

    output: str
    input: str
    kind: AliasKind

    def __str__(self) -> str:
        return f"{self.output}@{self.input}@{self.kind}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of ``str``; ValueError if the text is not an alias."""
        parts = text.split("@")
        if len(parts) != 3:
            raise ValueError(f"alias {text!r} is not output@input@kind")
        return cls.model_validate(dict(zip(("output", "input", "kind"), parts, strict=True)))


class Lowering(Record):
    """How one state's update was lowered, and why.

    Attributes:
        state: the state's name.
        kind: the chosen mechanism.
        reason: why it was chosen; ``because`` in the file.
        refused: mechanisms tried before it, each as ``kind: reason``.
    """

    state: str
    kind: AliasKind
    reason: str = Field(validation_alias="because", serialization_alias="because")
    refused: tuple[str, ...] = ()


class Program(Record):
    """One callable of an engine.

    Attributes:
        name: for example ``step``.
        row_layout: ``packed``: rows with different numbers of tokens are packed on one axis.
            ``rectangular``: every row has one entry of each input.
        inputs: in the order of the graph's placeholders, without the states.
        outputs: in the graph's order.
        aliases: one for each state that the program writes.
        max_rows: maximum rows of a step.
        chunk: maximum tokens of one row in a step; 1 for ``rectangular``.
        max_tokens: maximum tokens of a step, over all rows; None is ``max_rows * chunk``.
    """

    name: str
    row_layout: Literal["packed", "rectangular"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[Alias, ...]
    max_rows: int = Field(ge=1)
    chunk: int = Field(ge=1)
    max_tokens: int | None = Field(default=None, ge=1)

    @property
    def token_budget(self) -> int:
        """Maximum tokens of a step."""
        return self.max_tokens if self.max_tokens is not None else self.max_rows * self.chunk

    @property
    def rows_are_slots(self) -> bool:
        """Whether row r of a step must be slot r."""
        return any(alias.kind in ROW_IS_SLOT_KINDS for alias in self.aliases)

    @cached_property
    def client_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that a request carries; the runtime fills the others."""
        return tuple(spec for spec in self.inputs if spec.role in CLIENT_ROLES)

    @cached_property
    def vocab_size(self) -> int:
        """The number of scores that an output is sampled from; 0 if no output is sampled."""
        scores = {spec.name: spec.shape for spec in self.outputs}
        return next(
            (
                scores[spec.sampled_from][-1]
                for spec in self.outputs
                if spec.sampled_from is not None
            ),
            0,
        )

    @cached_property
    def decoder_io(self) -> tuple[str, str] | None:
        """The names of the input of token ids and of the output with the next token.

        None if the program is not a language model.
        """
        token_outputs = [
            spec.name
            for spec in self.outputs
            if (spec.sampled_from or spec.argmax_of) and spec.shape == (1,)
        ]
        token_inputs = [
            spec.name
            for spec in self.client_inputs
            if spec.role is Role.TOKENS and spec.dtype is Dtype.INT64 and spec.shape == (-1,)
        ]
        return (
            (token_inputs[0], token_outputs[0])
            if len(token_outputs) == len(token_inputs) == len(self.client_inputs) == 1
            else None
        )

    @model_validator(mode="after")
    def _check_tensors(self) -> Self:
        names = [spec.name for spec in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names):
            raise ValueError(f"program {self.name}: tensor names must differ, got {names}")
        outputs = {output.name for output in self.outputs}
        for spec in (*self.inputs, *self.outputs):
            if -1 in spec.shape[1:] or (spec.shape[:1] == (-1,)) != (spec.role is Role.TOKENS):
                raise ValueError(
                    f"program {self.name}: the shape of a tokens input starts with -1, "
                    f"and no other extent is -1; got {spec}"
                )
            if spec.argmax_of is not None and spec.argmax_of not in outputs:
                raise ValueError(
                    f"program {self.name}: output {spec.name} is the argmax of "
                    f"{spec.argmax_of!r}, which is not an output"
                )
            if spec.sampled_from is not None and spec.sampled_from not in outputs:
                raise ValueError(
                    f"program {self.name}: output {spec.name} is sampled from "
                    f"{spec.sampled_from!r}, which is not an output"
                )
        return self

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        roles = [spec.role for spec in self.inputs]
        for role in set(Role) - CLIENT_ROLES:
            if roles.count(role) > 1:
                raise ValueError(f"program {self.name}: more than one input has the role {role}")
        sampling_roles = set(SAMPLING_ROLES) & set(roles)
        if sampling_roles != (set(SAMPLING_ROLES) if self.vocab_size else set()):
            raise ValueError(
                f"program {self.name}: an output that is sampled needs inputs of the roles "
                f"{[str(role) for role in SAMPLING_ROLES]}"
            )
        if self.row_layout == "rectangular" and (Role.TOKENS in roles or self.chunk != 1):
            raise ValueError(
                f"program {self.name}: a rectangular program takes one entry a row and a chunk of 1"
            )
        if self.max_tokens is not None and self.max_tokens < self.max_rows:
            raise ValueError(
                f"program {self.name}: {self.max_tokens} tokens a step are too few for "
                f"{self.max_rows} rows"
            )
        if self.row_layout == "packed" and Role.TOKENS not in roles:
            raise ValueError(
                f"program {self.name}: a packed program needs an input with the role tokens"
            )
        return self


class Manifest(RecordFile):
    """The contents of ``engine.json``.

    Attributes:
        name: the model's name.
        slots: number of slots of the arena.
        capacity: maximum positions of a sequence; None if no state grows.
        min_capacity: the smallest capacity that may be chosen when the engine is loaded; None if
            the capacity is fixed.
        states: every state, in arena order.
        programs: what the engine can run.
        lowering: how each state's update was lowered.
        engine: the compiled graph.
        verified: ``executed``: the engine was run against the captured model before it was
            written. ``compiled_only``: it was compiled on a machine that cannot run it.
        built_with: versions and options of the build.
    """

    file_name: ClassVar[str] = FILE_NAME
    manifest_version: Literal[1] = 1
    name: str
    slots: int = Field(ge=1)
    capacity: int | None = Field(default=None, ge=1)
    min_capacity: int | None = Field(default=None, ge=1)
    states: tuple[StateSpec, ...]
    programs: tuple[Program, ...]
    lowering: tuple[Lowering, ...]
    engine: EngineFile
    verified: Literal["executed", "compiled_only"]
    built_with: dict[str, str]

    @model_validator(mode="after")
    def _aliases_name_states(self) -> Self:
        known = {state.name for state in self.states}
        if len(known) != len(self.states):
            raise ValueError(
                f"state names must differ, got {[state.name for state in self.states]}"
            )
        if self.capacity is None and any(state.update is Update.APPEND for state in self.states):
            raise ValueError("the manifest must have a capacity, because states append")
        if self.min_capacity is not None:
            if self.capacity is None or self.min_capacity > self.capacity:
                raise ValueError(
                    f"min_capacity {self.min_capacity} must be at most the capacity {self.capacity}"
                )
            if other := [
                state.name
                for state in self.states
                if self._grows(state) and state.shape[state.axis or 0] != self.capacity
            ]:
                raise ValueError(
                    f"states {other} must be as long as the capacity, which is chosen at load"
                )
        for program in self.programs:
            for alias in program.aliases:
                if alias.input not in known:
                    raise ValueError(
                        f"alias {alias} of program {program.name} names no state of this engine"
                    )
            if shared := known & {spec.name for spec in program.inputs}:
                raise ValueError(
                    f"program {program.name}: {sorted(shared)} name both a state and an input"
                )
        return self

    def _grows(self, state: StateSpec) -> bool:
        """Whether the length of a state is the capacity that is chosen at load."""
        return self.min_capacity is not None and state.update is Update.APPEND

    def compiled_shape(self, state: StateSpec) -> tuple[int, ...]:
        """The shape of a slot in the engine's graph; -1 is the capacity that is chosen at load."""
        return tuple(
            -1 if self._grows(state) and axis == state.axis else extent
            for axis, extent in enumerate(state.shape)
        )

    def at_capacity(self, capacity: int) -> Self:
        """The manifest of the same engine with states of this capacity.

        Raises:
            LoadError: the engine was not built for this capacity.
        """
        if capacity == self.capacity:
            return self
        if self.min_capacity is None or self.capacity is None:
            raise LoadError(
                f"the engine was built for a capacity of {self.capacity}, not {capacity}: "
                "build it with a range of capacities"
            )
        if not self.min_capacity <= capacity <= self.capacity:
            raise LoadError(
                f"the capacity {capacity} is outside the range that the engine was built for, "
                f"{self.min_capacity} to {self.capacity}"
            )
        states = tuple(
            state.model_copy(
                update={
                    "shape": tuple(
                        capacity if extent < 0 else extent for extent in self.compiled_shape(state)
                    )
                }
            )
            for state in self.states
        )
        return self.model_copy(update={"states": states, "capacity": capacity})

    @property
    def slot_bytes(self) -> int:
        """Bytes of state of one sequence."""
        return sum(state.slot_bytes for state in self.states)

    def program(self, name: str) -> Program:
        """The program of this name; LoadError if there is none."""
        for program in self.programs:
            if program.name == name:
                return program
        raise LoadError(
            f"the engine has no program {name!r}, only {[p.name for p in self.programs]}"
        )
