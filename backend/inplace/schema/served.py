"""The manifest of a served engine (``engine.json``): the contract between builder and runtime.

Shapes leave out the batch: a state's ``shape`` is that of one slot, an input's that of one
request.
"""

from functools import cached_property
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from inplace.errors import LoadError
from inplace.schema.artifacts import EngineFile
from inplace.schema.files import FileRecord, Record, RecordFile, find_file
from inplace.schema.specs import (
    CLIENT_ROLES,
    INITIAL_FILE,
    INPUT_ROLES,
    OUTPUT_ROLES,
    RESERVED_OUTPUT_ROLES,
    ROW_IS_SLOT_KINDS,
    SAMPLING_ROLES,
    Alias,
    Dtype,
    Lowering,
    Role,
    StateSpec,
    TensorSpec,
    Update,
)

FILE_NAME = "engine.json"


class Program(Record):
    """One callable of an engine, as it is captured.

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
        lookahead: tokens of a row that are in the same step see each other in both directions, so
            all tokens of a request are fed in one step: it has at most ``chunk``.
    """

    name: str
    row_layout: Literal["packed", "rectangular"]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[Alias, ...]
    max_rows: int = Field(ge=1)
    chunk: int = Field(ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    lookahead: bool = False

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
            has_tokens = spec.role in (Role.TOKENS, Role.LOGPROBS)
            if -1 in spec.shape[1:] or (spec.shape[:1] == (-1,)) != has_tokens:
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
        for specs, known, kind in (
            (self.inputs, INPUT_ROLES, "input"),
            (self.outputs, OUTPUT_ROLES | RESERVED_OUTPUT_ROLES, "output"),
        ):
            if wrong := [spec for spec in specs if spec.role not in known]:
                raise ValueError(
                    f"program {self.name}: {kind} {wrong[0].name} has the role {wrong[0].role}; "
                    f"an {kind} has one of {sorted(known)}"
                )
        for role in INPUT_ROLES - CLIENT_ROLES:
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
        if self.lookahead and self.token_budget < self.max_rows * self.chunk:
            raise ValueError(
                f"program {self.name}: with lookahead a step must have room for a whole chunk of "
                f"each row, {self.max_rows * self.chunk} tokens"
            )
        if self.row_layout == "packed" and Role.TOKENS not in roles:
            raise ValueError(
                f"program {self.name}: a packed program needs an input with the role tokens"
            )
        return self


class CompiledProgram(Program):
    """A program with the file that runs it.

    Attributes:
        states: the names of the states that it is bound to, in the order of the graph's
            placeholders.
        read_only: those of them that it only reads. Each other one has an alias.
        engine: the compiled graph.
        lowering: how the update of each state was lowered.
    """

    states: tuple[str, ...]
    read_only: tuple[str, ...] = ()
    engine: EngineFile
    lowering: tuple[Lowering, ...]

    @classmethod
    def of(
        cls, program: Program, engine: EngineFile, lowering: tuple[Lowering, ...], states: list[str]
    ) -> Self:
        """A program with what was compiled of it; states without an alias are read-only."""
        written = {alias.input for alias in program.aliases}
        fields = {name: getattr(program, name) for name in Program.model_fields}
        return cls(
            **fields,
            states=tuple(states),
            read_only=tuple(state for state in states if state not in written),
            engine=engine,
            lowering=lowering,
        )

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        for alias in self.aliases:
            if alias.input not in self.states:
                raise ValueError(
                    f"alias {alias} of program {self.name} names no state of this engine"
                )
        written = [alias.input for alias in self.aliases]
        if sorted([*written, *self.read_only]) != sorted(set(self.states)):
            raise ValueError(
                f"program {self.name}: each of the states {list(self.states)} must have one alias "
                f"or be read-only; the aliases have {written}, {list(self.read_only)} are read-only"
            )
        if shared := set(self.states) & {spec.name for spec in self.inputs}:
            raise ValueError(
                f"program {self.name}: {sorted(shared)} name both a state and an input"
            )
        return self


class Call(Record):
    """Calls of one program in a schedule.

    Attributes:
        program: the name of the program.
        until: the output that ends the calls when it is true; None for a fixed number.
        at_most: the largest number of calls; None without a limit.
    """

    program: str
    until: str | None = None
    at_most: int | None = Field(default=None, ge=1)


class Loop(Record):
    """Calls that are repeated together; loops are not nested.

    Attributes:
        calls: one round.
        until: the output of the last call that ends the rounds when it is true; None for a fixed
            number.
        at_most: the largest number of rounds; None without a limit.
    """

    calls: tuple[Call, ...] = Field(min_length=1)
    until: str | None = None
    at_most: int | None = Field(default=None, ge=1)


class Schedule(Record):
    """In which order a request runs the programs.

    Attributes:
        name: by which requests will choose it.
        calls: in their order.
    """

    name: str
    calls: tuple[Call | Loop, ...] = Field(min_length=1)


STEP = "step"
"""The program that the runtime runs."""


DEFAULT_SCHEDULE = Schedule(name="default", calls=(Call(program=STEP),))
"""The schedule of an engine with one program."""


class Manifest(RecordFile):
    """The contents of ``engine.json``.

    Attributes:
        name: the model's name.
        slots: number of slots of the arena.
        capacity: maximum positions of a sequence; None if no state grows.
        min_capacity: the smallest capacity that may be chosen when the engine is loaded; None if
            the capacity is fixed.
        states: every state, in arena order.
        programs: what the engine can run, each with its own engine file.
        schedules: in which order requests run the programs.
        files: every file of the version folder but ``engine.json`` and ``config.pbtxt``.
        verified: ``executed``: the engine was run against the captured model before it was
            written. ``compiled_only``: it was compiled on a machine that cannot run it.
        built_with: versions and options of the build.
    """

    file_name: ClassVar[str] = FILE_NAME
    rebuild: ClassVar[str] = (
        "build the model again with `inplace build … --output {parent}`, or from Python with "
        "`inplace_builder.write_engine`"
    )
    manifest_version: Literal[2] = 2
    name: str
    slots: int = Field(ge=1)
    capacity: int | None = Field(default=None, ge=1)
    min_capacity: int | None = Field(default=None, ge=1)
    states: tuple[StateSpec, ...]
    programs: tuple[CompiledProgram, ...] = Field(min_length=1)
    schedules: tuple[Schedule, ...] = Field(default=(DEFAULT_SCHEDULE,), min_length=1)
    files: tuple[FileRecord, ...]
    verified: Literal["executed", "compiled_only"]
    built_with: dict[str, str]

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        names = [state.name for state in self.states]
        if len(set(names)) != len(names):
            raise ValueError(f"state names must differ, got {names}")
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
            if fixed := [
                state.name for state in self.states if self._grows(state) and state.initial
            ]:
                raise ValueError(
                    f"states {fixed} have initial values of one length, and the capacity is chosen "
                    "at load"
                )
        return self

    @model_validator(mode="after")
    def _check_programs(self) -> Self:
        names = [program.name for program in self.programs]
        if len(set(names)) != len(names):
            raise ValueError(f"program names must differ, got {names}")
        known = {state.name for state in self.states}
        for program in self.programs:
            if unknown := sorted(set(program.states) - known):
                raise ValueError(f"program {program.name}: {unknown} are no states of this engine")
            if self.capacity is not None and program.chunk > self.capacity:
                raise ValueError(
                    f"program {program.name}: a chunk of {program.chunk} tokens is longer than the "
                    f"capacity {self.capacity}"
                )
        if len(devices := {program.engine.device for program in self.programs}) > 1:
            raise ValueError(f"all programs must run on one device, got {sorted(devices)}")
        outputs = {each.name: {spec.name for spec in each.outputs} for each in self.programs}
        for schedule in self.schedules:
            for call in schedule.calls:
                inner = call.calls if isinstance(call, Loop) else (call,)
                if unknown := sorted({each.program for each in inner} - set(names)):
                    raise ValueError(
                        f"schedule {schedule.name} calls {unknown}; the programs are {names}"
                    )
                for until, program_name in (
                    (call.until, inner[-1].program),
                    *((each.until, each.program) for each in inner),
                ):
                    if until is not None and until not in outputs[program_name]:
                        raise ValueError(
                            f"schedule {schedule.name} runs until {until!r}, which is not an "
                            f"output of program {program_name}"
                        )
        return self

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        listed = [record.name for record in self.files]
        if len(set(listed)) != len(listed):
            raise ValueError(f"file names must differ, got {listed}")
        needed = {program.engine.file for program in self.programs}
        needed |= {
            program.engine.plan.weights
            for program in self.programs
            if program.engine.plan is not None and program.engine.plan.weights is not None
        }
        if any(state.initial is not None for state in self.states):
            needed.add(INITIAL_FILE)
        if missing := sorted(needed - set(listed)):
            raise ValueError(f"the files {missing} are needed, and `files` does not list them")
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

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where the programs run and the states are."""
        return self.programs[0].engine.device

    def file(self, name: str) -> FileRecord:
        """The record of a file; LoadError if there is none."""
        return find_file(self.files, name)

    def has_file(self, name: str) -> bool:
        """Whether the engine has a file of this name."""
        return any(record.name == name for record in self.files)

    def program(self, name: str) -> CompiledProgram:
        """The program of this name; LoadError if there is none."""
        for program in self.programs:
            if program.name == name:
                return program
        raise LoadError(
            f"the engine has no program {name!r}, only {[p.name for p in self.programs]}"
        )
