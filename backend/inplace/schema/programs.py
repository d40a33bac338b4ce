"""The programs of a served engine, and the schedules that call them.

Shapes leave out the batch: an input's is that of one request.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, Self

from pydantic import Field, model_validator

from inplace.protocol import AUDIO, AUDIO_INT16
from inplace.schema.artifacts import EngineFile
from inplace.schema.files import Record
from inplace.schema.schedule import RequestFlag, Schedule
from inplace.schema.specs import (
    CLIENT_ROLES,
    INPUT_ROLES,
    JOINED_ROLES,
    LOGPROB_ROLES,
    OUTPUT_ROLES,
    PROMPT_LOGPROB_ROLES,
    ROW_IS_SLOT_KINDS,
    SAMPLING_OPTION_ROLES,
    SAMPLING_ROLES,
    Alias,
    Dtype,
    Lowering,
    Role,
    TensorSpec,
    mask_words,
)

_OUTPUT_TYPES = {Role.TOKENS: Dtype.INT64, Role.DONE: Dtype.BOOL, Role.ACCEPTED: Dtype.INT64}


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
        max_positions: of a program that a schedule calls: how many positions of a sequence the
            states have room for that it appends to. A call takes one, or as many as its output of
            the role ``accepted`` says. None if it appends to none.
        restarts: the programs whose positions are counted from 0 again after a call of this one.
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
    max_positions: int | None = Field(default=None, ge=1)
    restarts: tuple[str, ...] = ()

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
    def input_names(self) -> tuple[str, ...]:
        """The names of the tensors that a request may have."""
        return tuple(
            name
            for spec in self.client_inputs
            if spec.role is not Role.OPTION
            for name in ((AUDIO, AUDIO_INT16) if spec.role is Role.AUDIO else (spec.name,))
        )

    @cached_property
    def entries_per_call(self) -> int:
        """How many positions a call of a schedule may take.

        One; or of a program with an output of the role ``accepted``, as many as it has tokens.
        """
        if all(spec.role is not Role.ACCEPTED for spec in self.outputs):
            return 1
        return min(spec.shape[0] for spec in self.outputs if spec.role is Role.TOKENS)

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
    def max_adjusted(self) -> int:
        """How many scores of a row can be adjusted; 0 in a program without sampling options."""
        return next((spec.shape[0] for spec in self.inputs if spec.role is Role.ADJUSTED_TOKENS), 0)

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
            has_tokens = spec.role in (Role.TOKENS, *PROMPT_LOGPROB_ROLES)
            if spec.role in JOINED_ROLES and spec.name in outputs:
                continue  # see `_check_roles`
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
            (self.outputs, OUTPUT_ROLES, "output"),
        ):
            if wrong := [spec for spec in specs if spec.role not in known]:
                raise ValueError(
                    f"program {self.name}: {kind} {wrong[0].name} has the role {wrong[0].role}; "
                    f"an {kind} has one of {sorted(known)}"
                )
        for spec in self.outputs:
            expected = _OUTPUT_TYPES.get(spec.role)
            if expected and (spec.dtype, len(spec.shape)) != (expected, 1):
                raise ValueError(
                    f"program {self.name}: output {spec.name} of the role {spec.role} must be "
                    f"{expected} with one axis a row; got {spec.dtype} {list(spec.shape)}"
                )
            joined = spec.role is Role.ACCEPTED and spec.shape == (-1,)  # over a schedule's calls
            if spec.role in (Role.DONE, Role.ACCEPTED) and spec.shape != (1,) and not joined:
                raise ValueError(
                    f"program {self.name}: output {spec.name} of the role {spec.role} must have "
                    f"one entry a row; got {list(spec.shape)}"
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
        self._check_sampling_options()
        self._check_prompt_logprobs()
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

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        lengths = [spec.name for spec in self.inputs if spec.role is Role.VALID_LENGTHS]
        padded = [spec.length_input for spec in self.inputs if spec.length_input is not None]
        if lengths and set(padded) - set(lengths):
            raise ValueError(
                f"program {self.name}: {sorted(set(padded))} are named as lengths of inputs; its "
                f"inputs of the role valid_lengths are {lengths}"
            )
        return self

    def _check_prompt_logprobs(self) -> None:
        names = [spec.name for spec in self.outputs if spec.role in PROMPT_LOGPROB_ROLES]
        has_input = any(spec.role is Role.FOLLOWING_TOKENS for spec in self.inputs)
        if sorted(names) != (sorted(PROMPT_LOGPROB_ROLES) if has_input else []):
            raise ValueError(
                f"program {self.name}: log-probabilities of fed tokens need an input of the role "
                f"{Role.FOLLOWING_TOKENS} and outputs named "
                f"{[str(role) for role in PROMPT_LOGPROB_ROLES]}; got the outputs {names}"
            )

    def _check_sampling_options(self) -> None:
        inputs = {spec.role: spec for spec in self.inputs if spec.role in SAMPLING_OPTION_ROLES}
        outputs = [spec for spec in self.outputs if spec.role in LOGPROB_ROLES]
        if not inputs and not outputs:
            return
        names = [spec.name for spec in outputs]
        if (
            len(inputs) != len(SAMPLING_OPTION_ROLES)
            or sorted(names) != sorted(LOGPROB_ROLES)
            or not self.vocab_size
        ):
            raise ValueError(
                f"program {self.name}: sampling options need an output that is sampled, inputs of "
                f"the roles {[str(role) for role in SAMPLING_OPTION_ROLES]} and outputs named "
                f"{[str(role) for role in LOGPROB_ROLES]}; got {[str(role) for role in inputs]} "
                f"and {names}"
            )
        entries = inputs[Role.ADJUSTED_TOKENS].shape
        if len(entries) != 1 or inputs[Role.ADJUSTMENTS].shape != (3, *entries):
            raise ValueError(
                f"program {self.name}: adjusted_tokens must be [entries] a row and adjustments "
                f"[3, entries]; got {list(entries)} and {list(inputs[Role.ADJUSTMENTS].shape)}"
            )
        if inputs[Role.TOKEN_MASK].shape != (words := (mask_words(self.vocab_size),)):
            raise ValueError(
                f"program {self.name}: token_mask must be {list(words)} a row, a bit for each of "
                f"{self.vocab_size} tokens; got {list(inputs[Role.TOKEN_MASK].shape)}"
            )


class CompiledProgram(Program):
    """A program with the file that runs it.

    Attributes:
        states: the names of the states that it is bound to, in the order of the graph's
            placeholders.
        read_only: those of them that it only reads. Each other one has an alias.
        appended: those to which a call only appends, behind what the sequence uses of them: to take
            a call back, the sequence forgets how many positions it has used.
        engine: the compiled graph.
        lowering: how the update of each state was lowered.
    """

    states: tuple[str, ...]
    read_only: tuple[str, ...] = ()
    appended: tuple[str, ...] = ()
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
        for spec in self.outputs:
            if spec.role in JOINED_ROLES and spec.shape == (-1,):
                raise ValueError(
                    f"program {self.name}: output {spec.name} must have a fixed shape in each call"
                )
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
        if unwritten := sorted(set(self.appended) - set(written)):
            raise ValueError(
                f"program {self.name}: it does not write {unwritten}, which it appends"
            )
        if shared := set(self.states) & {spec.name for spec in self.inputs}:
            raise ValueError(
                f"program {self.name}: {sorted(shared)} name both a state and an input"
            )
        return self


def check_interfaces(programs: Sequence[Program]) -> None:
    """Check that a request can have the inputs and outputs of all programs.

    Raises:
        ValueError: programs have different inputs of one name, or outputs of the same name; or the
            outputs of one do not say how many tokens are accepted.
    """
    for program in programs:
        accepted = [spec.name for spec in program.outputs if spec.role is Role.ACCEPTED]
        has_tokens = any(spec.role is Role.TOKENS for spec in program.outputs)
        if len(accepted) > 1 or (accepted and not has_tokens):
            raise ValueError(
                f"program {program.name}: outputs {accepted} have the role accepted; one, beside "
                f"an output of the role tokens, says how many tokens of a call count"
            )
    inputs: dict[str, TensorSpec] = {}
    for spec in (spec for program in programs for spec in program.client_inputs):
        if inputs.setdefault(spec.name, spec) != spec:
            raise ValueError(
                f"input {spec.name} differs between programs: {inputs[spec.name]} and {spec}"
            )
    outputs = [spec.name for program in programs for spec in program.outputs]
    if twice := sorted({name for name in outputs if outputs.count(name) > 1}):
        raise ValueError(f"outputs {twice} are of more than one program: rename them")
    if both := sorted(inputs.keys() & set(outputs)):
        raise ValueError(f"{both} name both an input and an output")


def schedule_inputs(schedule: Schedule, programs: Sequence[Program]) -> dict[str, TensorSpec]:
    """What a client sends for a schedule: the inputs of all programs that it calls, by name."""
    return {
        spec.name: spec
        for program in programs
        if program.name in schedule.programs
        for spec in program.client_inputs
    }


def check_schedules(schedules: Sequence[Schedule], programs: Sequence[Program]) -> None:
    """Check that each request has at most one schedule, and that sequences can begin.

    Raises:
        ValueError: two schedules have one name, or are for the same requests; or none is for START.
    """
    names = [schedule.name for schedule in schedules]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"schedules {twice} are given more than once: rename them")
    seen: dict[tuple[RequestFlag, frozenset[str]], str] = {}
    for schedule in schedules:
        # Parameters choose no schedule.
        inputs = frozenset(
            spec.name
            for spec in schedule_inputs(schedule, programs).values()
            if spec.role is not Role.OPTION
        )
        for flag in schedule.requests:
            other = seen.setdefault((flag, inputs), schedule.name)
            if other != schedule.name:
                raise ValueError(
                    f"schedules {other} and {schedule.name} are both for requests ({flag}) with "
                    f"the inputs {sorted(inputs)}"
                )
    if not any(flag == "start" for flag, _ in seen):
        raise ValueError(f"none of the schedules {names} is for requests with START")
