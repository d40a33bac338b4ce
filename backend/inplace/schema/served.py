"""The manifest (``engine.json``): everything the runtime needs to know of an engine, and nothing it could guess.

It is the contract between builder and runtime. Tensor shapes leave out the batch: a state's ``shape`` is that of one slot,
an input's that of one request.
"""

from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from inplace.errors import LoadError
from inplace.schema.artifacts import EngineFile
from inplace.schema.dtypes import Dtype
from inplace.schema.records import Frozen, read
from inplace.schema.specs import CLIENT_ROLES, SAMPLING_ROLES, Role, StateSpec, TensorSpec, Update

MANIFEST_VERSION: Literal[1] = 1


FILE_NAME = "engine.json"


AliasKind = Literal["operator", "plugin", "kv_cache_update", "copy", "user"]
"""How a state is updated in place: an ``inplace::`` operator of a PyTorch graph mutates the bound tensor (``operator``); a TensorRT
plugin's aliased output (``plugin``); TensorRT's own cache layer (``kv_cache_update``); an operator or plugin of the user's own (``user``).
``copy`` is not in place: the engine writes a second buffer and the runtime swaps the two."""


ROW_IS_SLOT_KINDS = frozenset({"kv_cache_update", "copy"})
"""Kinds that update slot r from row r: row r of a step must be slot r."""


class Alias(Frozen):
    """The record that an output is an input's own memory.

    Attributes:
        output: the output's name.
        input: the state it is bound to.
        kind: the mechanism.
    """

    output: str
    input: str
    kind: AliasKind

    def __str__(self) -> str:
        return f"{self.output}@{self.input}@{self.kind}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of ``str``; ValueError where the text is no such record."""
        parts = text.split("@")
        if len(parts) != 3:
            raise ValueError(f"alias {text!r} is not output@input@kind")
        return cls.model_validate(dict(zip(("output", "input", "kind"), parts, strict=True)))


class Lowering(Frozen):
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


class Program(Frozen):
    """One callable of an engine.

    Attributes:
        name: for example ``step``.
        row_layout: ``packed``, rows of different token counts lie behind one another on one axis; ``rectangular``, every
            row has one entry of each input.
        inputs: in the order of the graph's placeholders, states excluded.
        outputs: in the order the graph returns them.
        aliases: one a state that the program writes.
        max_rows: most rows of one step.
        chunk: most tokens of one row in one step (1 for ``rectangular``).
        max_tokens: most tokens of all rows of a step together; None is ``max_rows * chunk``.
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
        """Most tokens of one step."""
        return self.max_tokens if self.max_tokens is not None else self.max_rows * self.chunk

    @property
    def rows_are_slots(self) -> bool:
        """Whether row r of a step must be slot r."""
        return any(alias.kind in ROW_IS_SLOT_KINDS for alias in self.aliases)

    @cached_property
    def client_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs a request carries; the runtime fills the others."""
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
        chosen = [
            spec.name
            for spec in self.outputs
            if (spec.sampled_from or spec.argmax_of) and spec.shape == (1,)
        ]
        taken = [
            spec.name
            for spec in self.client_inputs
            if spec.role is Role.TOKENS and spec.dtype is Dtype.INT64 and spec.shape == (-1,)
        ]
        return (
            (taken[0], chosen[0])
            if len(chosen) == len(taken) == len(self.client_inputs) == 1
            else None
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [spec.name for spec in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names):
            raise ValueError(f"program {self.name}: tensor names must differ, got {names}")
        for spec in (*self.inputs, *self.outputs):
            if -1 in spec.shape[1:] or (spec.shape[:1] == (-1,)) != (spec.role is Role.TOKENS):
                raise ValueError(
                    f"program {self.name}: -1 stands first in the shape of a tokens input and nowhere else, got {spec}"
                )
            if spec.argmax_of is not None and spec.argmax_of not in {
                output.name for output in self.outputs
            }:
                raise ValueError(
                    f"program {self.name}: output {spec.name} is the argmax of {spec.argmax_of!r}, which is no output"
                )
            if spec.sampled_from is not None and spec.sampled_from not in {
                output.name for output in self.outputs
            }:
                raise ValueError(
                    f"program {self.name}: output {spec.name} is sampled from {spec.sampled_from!r}, which is no output"
                )
        roles = [spec.role for spec in self.inputs]
        for role in set(Role) - CLIENT_ROLES:
            if roles.count(role) > 1:
                raise ValueError(f"program {self.name}: more than one input has the role {role}")
        if 0 < len(set(SAMPLING_ROLES) & set(roles)) < len(SAMPLING_ROLES) or (
            self.vocab_size > 0
        ) != (Role.TEMPERATURE in roles):
            raise ValueError(
                f"program {self.name}: an output that is sampled needs inputs of the roles {[str(r) for r in SAMPLING_ROLES]}"
            )
        if self.row_layout == "rectangular" and (Role.TOKENS in roles or self.chunk != 1):
            raise ValueError(
                f"program {self.name}: a rectangular program takes one entry a row and a chunk of 1"
            )
        if self.max_tokens is not None and self.max_tokens < self.max_rows:
            raise ValueError(
                f"program {self.name}: {self.max_tokens} tokens a step are too few for {self.max_rows} rows"
            )
        if self.row_layout == "packed" and Role.TOKENS not in roles:
            raise ValueError(
                f"program {self.name}: a packed program needs an input with the role tokens"
            )
        return self


class Manifest(Frozen):
    """The whole of ``engine.json``.

    Attributes:
        manifest_version: version of this format; another one is refused.
        name: the model's name.
        slots: sequences the arena has room for.
        capacity: positions a sequence may hold; None where nothing grows.
        min_capacity: the least capacity that may be chosen when the engine is loaded, of at most ``capacity``; None where it is fixed.
        states: every state, in arena order.
        programs: what the engine can do.
        lowering: how each state's update was lowered.
        engine: the compiled graph.
        verified: ``executed``: the engine was run against the captured model before it was written; ``compiled_only``: it was
            compiled where it could not be run.
        built_with: versions and options of the build.
    """

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
            raise ValueError("states that append have an end: the manifest must say the capacity")
        if self.min_capacity is not None:
            if self.capacity is None or self.min_capacity > self.capacity:
                raise ValueError(
                    f"a capacity from {self.min_capacity} to {self.capacity} cannot be chosen"
                )
            if odd := [
                state.name
                for state in self.states
                if self._grows(state) and state.shape[state.axis or 0] != self.capacity
            ]:
                raise ValueError(f"the capacity can be chosen, but states {odd} have another one")
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
        """Whether a state is as long as the capacity that is chosen at load."""
        return self.min_capacity is not None and state.update is Update.APPEND

    def compiled_shape(self, state: StateSpec) -> tuple[int, ...]:
        """The extents that the engine's graph has for a slot of a state; -1 is chosen at load."""
        return tuple(
            -1 if self._grows(state) and axis == state.axis else extent
            for axis, extent in enumerate(state.shape)
        )

    def at_capacity(self, capacity: int) -> Self:
        """The same engine with states of this capacity.

        Raises:
            LoadError: the engine was not built for it.
        """
        if capacity == self.capacity:
            return self
        if self.min_capacity is None or self.capacity is None:
            raise LoadError(
                f"the engine was built for a capacity of {self.capacity}, not {capacity}: build it with a range of capacities"
            )
        if not self.min_capacity <= capacity <= self.capacity:
            raise LoadError(
                f"a capacity of {capacity} is outside the {self.min_capacity} to {self.capacity} the engine was built for"
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
        """Bytes of state one sequence holds."""
        return sum(state.slot_bytes for state in self.states)

    def program(self, name: str) -> Program:
        """The program of that name; LoadError if there is none."""
        for program in self.programs:
            if program.name == name:
                return program
        raise LoadError(
            f"the engine has no program {name!r}, only {[p.name for p in self.programs]}"
        )

    def save(self, folder: Path) -> None:
        """Write ``engine.json`` into ``folder``."""
        (folder / FILE_NAME).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``engine.json`` from an engine directory.

        Raises:
            LoadError: it is missing, not a manifest, or of another version.
        """
        return read(cls, folder / FILE_NAME, MANIFEST_VERSION)
