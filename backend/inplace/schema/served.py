"""The manifest of a served engine (``engine.json``): the contract between builder and runtime.

Shapes leave out the batch: a state's ``shape`` is that of one slot, an input's that of one
request.
"""

from collections.abc import Collection
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from inplace.errors import LoadError
from inplace.schema.files import FileRecord, RecordFile, find_file
from inplace.schema.programs import (
    _OUTPUT_TYPES,
    CompiledProgram,
    Program,
    check_interfaces,
    check_schedules,
    schedule_inputs,
)
from inplace.schema.schedule import DEFAULT_SCHEDULE, PROMPT_LOGPROBS, STEP, Schedule
from inplace.schema.specs import (
    INITIAL_FILE,
    JOINED_ROLES,
    PROMPT_LOGPROB_ROLES,
    ROW_IS_SLOT_KINDS,
    Role,
    StateSpec,
    Update,
)

FILE_NAME = "engine.json"


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
                raise ValueError(f"program {program.name}: {unknown} are not states of this engine")
            if unknown := sorted(set(program.restarts) - set(names)):
                raise ValueError(
                    f"program {program.name} restarts {unknown}; the programs are {names}"
                )
            if self.capacity is not None and program.chunk > self.capacity:
                raise ValueError(
                    f"program {program.name}: a chunk of {program.chunk} tokens is longer than the "
                    f"capacity {self.capacity}"
                )
        if len(devices := {program.engine.device for program in self.programs}) > 1:
            raise ValueError(f"all programs must run on one device, got {sorted(devices)}")
        for schedule in self.schedules:
            self._check_schedule(schedule)
        check_schedules(self.schedules, self.programs)
        self._check_decoding()
        called = frozenset[str]().union(*(schedule.programs for schedule in self.schedules))
        if self.prompt_program is not None:
            self._check_prompt_program(self.prompt_program)
            called |= {PROMPT_LOGPROBS}
        if uncalled := sorted(set(names) - called):
            raise ValueError(f"no schedule calls the programs {uncalled}")
        # A client sees nothing of a program that drafts tokens.
        hidden = [PROMPT_LOGPROBS]
        if self.decode_schedule is not None:
            hidden.append(self.decode_schedule.draft[0])
        check_interfaces([each for each in self.programs if each.name not in hidden])
        if len(self.programs) > 1:
            self._check_shared()
        return self

    def _check_prompt_program(self, program: CompiledProgram) -> None:
        """Check that a program can take the place of the step."""
        if self.is_scheduled or len(self.programs) != 2:
            raise ValueError(
                f"program {PROMPT_LOGPROBS} takes the place of the step, and of no other program; "
                f"the programs are {[each.name for each in self.programs]}"
            )
        step = self.program(STEP)
        inputs = [spec for spec in program.inputs if spec.role is not Role.FOLLOWING_TOKENS]
        outputs = [spec for spec in program.outputs if spec.role not in PROMPT_LOGPROB_ROLES]
        sizes = [(each.max_rows, each.chunk, each.token_budget) for each in (step, program)]
        if (
            (tuple(inputs), tuple(outputs)) != (step.inputs, step.outputs)
            or len(outputs) == len(program.outputs)
            or sizes[0] != sizes[1]
            or step.decoder_io is None
        ):
            raise ValueError(
                f"program {PROMPT_LOGPROBS} must have the inputs, the outputs and the sizes of the "
                f"step of a language model, and log-probabilities of every fed token"
            )

    def _check_schedule(self, schedule: Schedule) -> None:
        names = [program.name for program in self.programs]
        done = {
            program.name: [spec.name for spec in program.outputs if spec.role is Role.DONE]
            for program in self.programs
        }
        if unknown := sorted(schedule.programs - set(names)):
            raise ValueError(f"schedule {schedule.name} calls {unknown}; the programs are {names}")
        for loop in schedule.loops:
            for until, program in (
                (loop.until, loop.calls[-1].program),
                *((call.until, call.program) for call in loop.calls),
            ):
                if until is not None and until not in done[program]:
                    raise ValueError(
                        f"schedule {schedule.name} runs until {until!r}; the outputs of program "
                        f"{program} with the role done are {done[program]}"
                    )

    def _check_decoding(self) -> None:
        """Check a schedule for the tokens of generations, and the programs that it calls."""
        schedule = self.decode_schedule
        if schedule is None:
            return
        if [each for each in self.schedules if each is not schedule] != [DEFAULT_SCHEDULE]:
            raise ValueError(
                f"schedule {schedule.name} is for the tokens of a generation (decode); requests "
                f"run the program {STEP!r} once then, and there is no other schedule"
            )
        programs = {program.name: program for program in self.programs}
        name, count = schedule.draft
        step, draft = programs[STEP], programs[name]
        if step.decoder_io is None or not step.max_adjusted:
            raise ValueError(
                f"schedule {schedule.name} is for the tokens of a generation, and program "
                f"{STEP!r} is not a language model with sampling options"
            )
        if (draft.inputs, draft.decoder_io) != (step.inputs, step.decoder_io):
            raise ValueError(f"program {name} drafts tokens, so it has the inputs of {STEP!r}")
        if step.max_rows <= count + 1:
            raise ValueError(
                f"program {STEP!r} takes {step.max_rows} rows; {count} drafted tokens need "
                f"{count + 2} rows for one sequence"
            )
        written = [state.name for state in self.states if state.update is not Update.APPEND]
        if written:
            raise ValueError(
                f"states {written} are not appended to: drafted tokens that are rejected could not "
                f"be taken back"
            )

    def _check_shared(self) -> None:
        """Check the states that several programs have together."""
        written = {alias.input for program in self.programs for alias in program.aliases}
        if unwritten := sorted({state.name for state in self.states} - written):
            raise ValueError(f"no program writes the states {unwritten}")
        for program in self.programs:
            if program.rows_are_slots:
                kinds = [str(alias) for alias in program.aliases if alias.kind in ROW_IS_SLOT_KINDS]
                raise ValueError(
                    f"program {program.name} updates states with {kinds}, which other programs "
                    f"would not see"
                )

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

    @property
    def decode_schedule(self) -> Schedule | None:
        """What the tokens of a generation run; None if they run the step."""
        return next((each for each in self.schedules if each.decodes), None)

    @property
    def tokens_per_decode(self) -> int:
        """The most tokens of a generation that a step consumes: one, and those that are drafted."""
        return 1 if self.decode_schedule is None else 1 + self.decode_schedule.draft[1]

    @property
    def max_sequences(self) -> int:
        """The most sequences that can take part in a step."""
        return self.interface.max_rows // self.tokens_per_decode

    @property
    def is_scheduled(self) -> bool:
        """Whether a request is more than one call, or its answer more than one call's outputs."""
        return self.decode_schedule is None and (
            any(program.name not in (STEP, PROMPT_LOGPROBS) for program in self.programs)
            or self.schedules != (DEFAULT_SCHEDULE,)
            or any(spec.role in _OUTPUT_TYPES for spec in self.programs[0].outputs)
        )

    @property
    def prompt_program(self) -> CompiledProgram | None:
        """The program with log-probabilities of every fed token; None if there is none."""
        return next((each for each in self.programs if each.name == PROMPT_LOGPROBS), None)

    @property
    def interface(self) -> Program:
        """What a request takes and is answered with: the program, or its schedule as one."""
        if not self.is_scheduled:
            return self.program(STEP)
        return self._interface("schedule", [program.name for program in self.programs])

    def interface_of(self, schedule: Schedule) -> Program:
        """What a request of one schedule takes and is answered with."""
        return self._interface(schedule.name, schedule.programs)

    @property
    def optional_inputs(self) -> frozenset[str]:
        """The inputs that requests of some schedule leave out."""
        each = [frozenset(schedule_inputs(one, self.programs)) for one in self.schedules]
        return frozenset().union(*each) - each[0].intersection(*each)

    def _interface(self, name: str, called: Collection[str]) -> Program:
        programs = [program for program in self.programs if program.name in called]
        inputs = {spec.name: spec for each in programs for spec in each.client_inputs}
        outputs = [spec for each in programs for spec in each.outputs]
        return Program(
            name=name,
            row_layout="rectangular",
            inputs=tuple(inputs.values()),
            outputs=tuple(
                spec.model_copy(update={"shape": (-1,)}) if spec.role in JOINED_ROLES else spec
                for spec in outputs
            ),
            aliases=(),
            max_rows=max(program.max_rows for program in programs),
            chunk=1,
        )

    def program(self, name: str) -> CompiledProgram:
        """The program of this name; LoadError if there is none."""
        for program in self.programs:
            if program.name == name:
                return program
        raise LoadError(
            f"the engine has no program {name!r}, only {[p.name for p in self.programs]}"
        )
