"""Engines whose requests are several calls: of one program until it is done, or of several.

Every program has an engine of its own, and all are bound to one arena. A request runs the
manifest's schedule. One engine call takes rows of one program, at whatever place of the schedule
and at whatever count of a loop they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Self

import torch
from torch import Tensor

from inplace.engines import RepeatingEngine
from inplace.engines.arena import Arena
from inplace.errors import Code, RequestError
from inplace.parameters import RequestKind, parse_parameters
from inplace.protocol import AUDIO, AUDIO_INT16
from inplace.runtime.audio import audio_spec, check_audio_parameters, count_tensor, cut_stream
from inplace.runtime.batcher import ActiveRequest, form_batch
from inplace.runtime.instance import InFlightStep, ModelInstance
from inplace.runtime.loading import load_engines
from inplace.runtime.progress import CallOutputs, ScheduleProgress
from inplace.runtime.requests import Request, ValidatedRequest
from inplace.runtime.slots import EndReason, SequenceState
from inplace.runtime.speculative import SpeculativeInstance
from inplace.schema.files import EngineFolder
from inplace.schema.programs import Program
from inplace.schema.schedule import RequestFlag, Schedule
from inplace.schema.served import Manifest
from inplace.schema.specs import JOINED_ROLES, Role, TensorSpec

_READ_BY_SCHEDULE = frozenset({Role.TOKENS, Role.DONE, Role.ACCEPTED})


MAX_SAVED_BYTES = 64
"""Bytes of a state that is copied when a request begins, so that its calls can be taken back:
enough for a counter, a last token and the like."""


GPU_LOOP_CALLS = 8
"""The default of `ScheduledInstance.loop_calls` on a GPU."""


NEEDED_REQUESTS = 8
"""Over how many requests the calls that are needed are averaged."""


class ScheduledInstance(ModelInstance):
    """A model instance whose requests run a schedule; a step is one call of one program.

    Args:
        manifest: describes the engine.
        arena: the memory of its states; all engines are bound to it.
        engines: by program, what runs a call of it.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        clock: monotonic seconds.

    Attributes:
        interfaces: by schedule, what a request takes and is answered with.
        engines: by program, what runs a call of it.
        programs: the programs by name.
        max_rows: by program, most rows of a call. Fewer let decoding wait less for an encoder.
        loop_calls: most calls of a program in succession before the host reads what they gave. On
            the CPU 1: there is no round trip to save, and calls of rows that are done cost time.
    """

    def __init__(
        self,
        manifest: Manifest,
        arena: Arena,
        engines: Mapping[str, RepeatingEngine],
        idle_timeout: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        # Slots are filled on the stream of this engine. The others' streams wait for the stream
        # that the caller has made its own (`StepEngine.on_stream`).
        first = engines[manifest.programs[0].name]
        super().__init__(manifest, arena, first, idle_timeout, clock)
        self.interfaces = {each.name: manifest.interface_of(each) for each in manifest.schedules}
        self._by_inputs = {
            (flag, _tensor_names(self.interfaces[each.name])): each
            for each in manifest.schedules
            for flag in each.requests
        }
        self.engines = engines
        self.programs = {program.name: program for program in manifest.programs}
        self._read = {
            program.name: frozenset(
                spec.name for spec in program.outputs if spec.role in _READ_BY_SCHEDULE
            )
            for program in manifest.programs
        }
        self.max_rows = {program.name: program.max_rows for program in manifest.programs}
        self._repeated = _repeated_programs(manifest)
        self.loop_calls = GPU_LOOP_CALLS if manifest.device == "cuda" else 1
        self._needed: dict[str, float] = {}  # by program, how many calls rows have needed of late
        self._saved_states = {
            each.name: saved_states(manifest, each) for each in manifest.schedules
        }
        self._output_names = {
            program.name: frozenset(spec.name for spec in program.outputs)
            for program in manifest.programs
        }
        audio = audio_spec(self.program)
        self._stream = None if audio is None or audio.lead is None else audio
        self._empty_answer = {} if self._stream is None else _empty_answer(self.program)
        self._last_program = ""

    @classmethod
    def _load(
        cls, files: EngineFolder, manifest: Manifest, arena: Arena, idle_timeout: float
    ) -> Self:
        names = [program.name for program in manifest.programs]
        engines = load_engines(files, manifest, arena, names)
        return cls(manifest, arena, engines, idle_timeout)

    def validate(self, request: Request, *, allow_empty: bool = False) -> ValidatedRequest:
        """As for one program; inputs that are empty are absent."""
        present = {name: tensor for name, tensor in request.inputs.items() if tensor.numel()}
        only_ends = request.end and not request.start and not present and not self.runs_at_end
        if len(present) < len(request.inputs):
            request = replace(request, inputs=present)
        if not only_ends or request.refusal is not None:
            return super().validate(request, allow_empty=allow_empty)
        validated = ValidatedRequest(request, request.key_digest(), only_ends=True)
        try:
            parse_parameters(request.parameters, RequestKind.END, self.is_forwarded)
            check_audio_parameters(self.program, request.parameters)
            validated.position = request.position()
        except RequestError as error:
            validated.only_ends, validated.refusal = False, error
        return validated

    @property
    def runs_at_end(self) -> bool:
        """Whether an END without inputs has a schedule; else it only ends the sequence.

        With END a stream may have a chunk left.
        """
        return self._stream is not None or ("end", frozenset()) in self._by_inputs

    def _interface(self, request: Request) -> Program:
        return self.interfaces[self._choose(request, start=request.begins_empty).name]

    def _choose(self, request: Request, *, start: bool) -> Schedule:
        """The schedule of a request.

        Raises:
            RequestError: BAD_INPUT, or MISSING_INPUT: there is none for its flags and inputs.
        """
        flag: RequestFlag = "start" if start else "end" if request.end else "next"
        inputs = frozenset(AUDIO if name == AUDIO_INT16 else name for name in request.inputs)
        if self._stream is not None and request.end:
            inputs |= {AUDIO}  # what is left of it
        if (schedule := self._by_inputs.get((flag, inputs))) is not None:
            return schedule
        takes = [sorted(names) for of, names in self._by_inputs if of == flag]
        given = f"a request ({flag}) has the inputs {sorted(inputs)}"
        if not takes:
            raise RequestError(Code.BAD_INPUT, f"{given}; no schedule of this model is for it")
        expected = " or ".join(str(names) if names else "none" for names in takes)
        missing = any(inputs < set(names) for names in takes)
        raise RequestError(
            Code.MISSING_INPUT if missing else Code.BAD_INPUT, f"{given}; it takes {expected}"
        )

    def admit_validated(self, validated: ValidatedRequest) -> ActiveRequest:
        """Give a request its sequence, and put it at the start of its schedule."""
        active = super().admit_validated(validated)
        sequence, schedule = active.sequence, validated.schedule
        assert schedule is not None
        names = self._saved_states[schedule.name]
        active.progress = ScheduleProgress(
            schedule.loops,
            start_positions=dict(sequence.positions),
            start_audio=sequence.audio,
            saved=None if names is None else self.arena.save(sequence.slot, names),
        )
        if self._stream is not None and self._stream.name in active.inputs:
            self._cut(self._stream, active, active.progress)
        return active

    def _cut(self, stream: TensorSpec, active: ActiveRequest, progress: ScheduleProgress) -> None:
        """Cut a stream into chunks. A request that completes none has its answer at once."""
        sequence, new, (chunk,) = active.sequence, active.inputs[stream.name], stream.shape
        buffered, ends = sequence.audio, active.request.end
        if buffered is None:
            buffered = torch.zeros(stream.lead or 0)
            ends = ends and len(new) > 0  # a stream without a sample has no chunk
        assert stream.length_input is not None
        chunks, sequence.audio = cut_stream(buffered, new, chunk, ends=ends)
        for samples, length in chunks:
            given = {stream.name: samples, stream.length_input: count_tensor(length)}
            progress.chunks.append({**active.inputs, **given})
        if not self._next_chunk(active, progress):
            progress.loop = len(progress.loops)
            self._finish(active, progress)

    @staticmethod
    def _next_chunk(active: ActiveRequest, progress: ScheduleProgress) -> bool:
        """Begin the schedule for the next chunk of a stream, if there is one."""
        if not progress.chunks:
            return False
        active.inputs, progress.loop = progress.chunks.popleft(), 0
        return True

    def _finish(self, active: ActiveRequest, progress: ScheduleProgress) -> None:
        active.sequence.length += 1
        active.num_computed_tokens = active.num_tokens
        answer = progress.answer(active.requested_outputs)
        active.step_outputs = ({**self._empty_answer, **answer}, 0)

    def _check_tokens(self, validated: ValidatedRequest, sequence: SequenceState | None) -> None:
        super()._check_tokens(validated, sequence)
        schedule = self._choose(validated.request, start=sequence is None)
        validated.schedule = schedule
        if sequence is not None:
            name = schedule.loops[0].calls[0].program
            if (full := self.full(name, sequence)) is not None:
                raise RequestError(Code.CAPACITY, f"{full}; nothing was changed: START it again")

    def _used_length(self, sequence: SequenceState) -> int | None:
        return None  # only the programs know where they append

    def full(self, name: str, sequence: SequenceState) -> str | None:
        """Why a program cannot be called for a sequence any more; None if it can."""
        program, used = self.programs[name], sequence.positions.get(name, 0)
        limit = program.max_positions
        if limit is None or used + program.entries_per_call <= limit:
            return None
        restarting = [each.name for each in self.programs.values() if name in each.restarts]
        begins = f", which {restarting[0]} begins anew" if restarting else ""
        takes = program.entries_per_call
        more = f", and a call may take {takes}" if takes > 1 else ""
        return f"program {name} has used {used} of the sequence's {limit} positions{more}{begins}"

    def next_rows(self, waiting: Sequence[ActiveRequest]) -> list[ActiveRequest]:
        """The rows of the next call, all of one program.

        It is the program at which the first of them waits, but no program is called twice in
        succession while rows wait for another one. After a program that is called once, one that is
        called repeatedly comes first: decoding waits for at most one call of another program.

        Args:
            waiting: the longest waiting first.
        """
        names = dict.fromkeys(_next_program(active) for active in waiting)  # in their order
        others = [name for name in names if name != self._last_program] or list(names)
        if self._last_program not in self._repeated:
            others = [name for name in others if name in self._repeated] or others
        rows = [active for active in waiting if _next_program(active) == others[0]]
        return rows[: self.max_rows[others[0]]]

    def _outputs(self, request: Request) -> frozenset[str]:
        """As for one program, without the outputs that the client has not named.

        Raises:
            RequestError: BAD_OUTPUT, it names some of the model's outputs, and one of them is none
                of its schedule's.
        """
        outputs, named = super()._outputs(request), request.requested_outputs
        if named is None:
            return outputs
        has = frozenset(spec.name for spec in self._interface(request).outputs)
        missing = sorted((named & self._all_outputs) - has)
        if missing and not named >= self._all_outputs:
            raise RequestError(
                Code.BAD_OUTPUT,
                f"this request has no outputs {missing}; with its inputs and flags it has"
                f" {sorted(has)}",
            )
        return outputs & named

    def launch(self, rows: list[ActiveRequest], token_budget: int | None = None) -> InFlightStep:
        """Launch calls of the program at which these rows are, the same for all."""
        name = _next_program(rows[0])
        self._last_program = name
        batch = form_batch(self.programs[name], rows, token_budget)
        requested = self._read[name].union(*(active.requested_outputs for active in rows))
        requested &= self._output_names[name]
        # Of outputs that are not tokens the last call's are sent, and which that is, is not known.
        num_calls = 1 if requested - self._read[name] else self._num_calls(name, rows)
        engine = self.engines[name]
        if num_calls == 1:
            return self._launch(engine.launch, batch, requested)
        repeated = partial(engine.launch_repeated, count=num_calls)
        step = self._launch(repeated, batch, requested)
        step.num_calls = num_calls
        return step

    def _num_calls(self, name: str, rows: Sequence[ActiveRequest]) -> int:
        """How often to call a program before the host looks at what it gave.

        As often as rows have needed of late, on average over these rows; where a row has had more
        calls than that, half as many again. No row is called beyond its limit or the end of its
        room; rows that are done meanwhile do not change.
        """
        most, expected = self.loop_calls, 0.0
        if most == 1:
            return 1
        room, needed = self.programs[name].max_positions, self._needed.get(name, 1.0)
        takes = self.programs[name].entries_per_call
        for active in rows:
            assert active.progress is not None
            call, count = active.progress.next_call, active.progress.count
            left = (call.at_most or 1) - count
            if room is not None:
                left = min(left, (room - active.sequence.positions.get(name, 0)) // takes)
            most = min(most, left)
            expected += left if call.until is None else max(1.0, needed - count, count / 2)
        return max(1, min(most, round(expected / len(rows))))

    def advance(self, step: InFlightStep, outputs: Mapping[str, Tensor]) -> None:
        """Advance the rows of a call, or calls; a row whose schedule ends has its answer."""
        if step.failed:
            return
        program = self.programs[self._last_program]
        try:
            calls = [
                CallOutputs(program, outputs if step.num_calls == 1 else _of_call(outputs, index))
                for index in range(step.num_calls)
            ]
        except ValueError as error:  # what the engine gave cannot be right
            for active in step.batch.rows:
                if not active.dropped:
                    active.error = self._roll_back(active, error)
            return
        num_finished = 0
        for row, active in enumerate(step.batch.rows):
            if active.dropped:
                continue
            progress = active.progress
            assert progress is not None
            self._add(program, calls, row, active)
            if progress.finished and not self._next_chunk(active, progress):
                num_finished += 1
                self._finish(active, progress)
            elif (full := self.full(_next_program(active), active.sequence)) is not None:
                restored, advice = self._take_back(active, EndReason.CAPACITY)
                advice = "nothing was changed: START it again" if restored else advice
                active.error = RequestError(
                    Code.CAPACITY, f"{full}, and the request is not done; {advice}"
                )
        self.observer.step_finished(step.seconds, len(step.batch.rows), num_finished, 0)

    def _add(
        self, program: Program, calls: Sequence[CallOutputs], row: int, active: ActiveRequest
    ) -> None:
        """Add calls of a program to a row, up to the one that ends what it repeats."""
        progress = active.progress
        assert progress is not None
        until, num_calls = progress.next_call.until, progress.count
        for outputs in calls:
            num_calls += 1
            moved = progress.add(outputs, row)
            taken = 1 if outputs.accepted is None else outputs.accepted[row]
            self._count(program, active.sequence, taken)
            if moved:
                break
        else:
            return
        if until is not None:
            needed = self._needed.get(program.name, float(num_calls))
            self._needed[program.name] = needed + (num_calls - needed) / NEEDED_REQUESTS

    def _count(self, program: Program, sequence: SequenceState, taken: int) -> None:
        """Count the positions that a call has taken."""
        for name in program.restarts:
            sequence.positions[name] = 0
        if program.max_positions is not None:
            sequence.positions[program.name] = sequence.positions.get(program.name, 0) + taken

    def restore(self, active: ActiveRequest) -> bool:
        """Restore a sequence to what it was before a request, if its states allow it.

        They do if each is appended to, or so small that it was copied.
        """
        progress, sequence = active.progress, active.sequence
        assert progress is not None
        if progress.saved is None:
            return False
        self.arena.restore(sequence.slot, progress.saved)
        sequence.positions = dict(progress.start_positions)
        sequence.audio = progress.start_audio
        sequence.length = active.start_length
        return True


def _tensor_names(interface: Program) -> frozenset[str]:
    """The inputs that a request has as tensors; audio under one name, whatever its type."""
    return frozenset(spec.name for spec in interface.inputs if spec.role is not Role.OPTION)


def saved_states(manifest: Manifest, schedule: Schedule) -> tuple[str, ...] | None:
    """The states that must be copied to take calls of a request back; None if some are too large.

    States to which every program that writes them only appends need no copy.
    """
    replaced = {
        alias.input
        for program in manifest.programs
        if program.name in schedule.programs
        for alias in program.aliases
        if alias.input not in program.appended
    }
    states = [state for state in manifest.states if state.name in replaced]
    if any(state.slot_bytes > MAX_SAVED_BYTES for state in states):
        return None
    return tuple(state.name for state in states)


def _empty_answer(program: Program) -> dict[str, Tensor]:
    """The answer to a request that calls nothing: no tokens, done, zeros for other outputs."""
    return {
        spec.name: torch.empty((1, 0), dtype=torch.int64)
        if spec.role in JOINED_ROLES
        else torch.full((1, *spec.shape), spec.role is Role.DONE, dtype=spec.dtype.as_torch)
        for spec in program.outputs
    }


def _repeated_programs(manifest: Manifest) -> frozenset[str]:
    """The programs that some request calls more than once in succession."""
    return frozenset(
        call.program
        for schedule in manifest.schedules
        for loop in schedule.loops
        for call in loop.calls
        if (loop.at_most or 1) > 1 or (call.at_most or 1) > 1
    )


def _of_call(outputs: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in outputs.items()}


def _next_program(active: ActiveRequest) -> str:
    assert active.progress is not None
    return active.progress.next_call.program


def open_model(
    folder: Path | str,
    manifest: Manifest,
    *,
    idle_timeout: float,
    trust: Sequence[Path | str] | None,
    call_rows: Mapping[str, int],
    loop_calls: int | None,
) -> ModelInstance:
    """Load an engine with an arena of its own, whatever its programs; see `ModelInstance.open`.

    Args:
        folder, manifest, idle_timeout, trust: as `ModelInstance.open` takes them.
        call_rows: by program, most rows of a call, where they are fewer than it was built for.
        loop_calls: `ScheduledInstance.loop_calls`; None for its default.
    """
    kind: type[ModelInstance] = ScheduledInstance if manifest.is_scheduled else ModelInstance
    if manifest.decode_schedule is not None:
        kind = SpeculativeInstance
    instance = kind.open(folder, manifest, idle_timeout=idle_timeout, trust=trust)
    if isinstance(instance, ScheduledInstance):
        instance.max_rows |= call_rows
        instance.loop_calls = loop_calls or instance.loop_calls
    return instance
