"""Engines whose requests are several calls: of one program until it is done, or of several.

Every program has an engine of its own, and all are bound to one arena. A request runs the
manifest's schedule. One engine call takes rows of one program, at whatever place of the schedule
and at whatever count of a loop they are.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Self

from torch import Tensor

from inplace.engines import StepEngine
from inplace.engines.arena import Arena
from inplace.errors import Code, RequestError
from inplace.runtime.batcher import ActiveRequest, CallOutputs, ScheduleProgress, form_batch
from inplace.runtime.instance import InFlightStep, ModelInstance
from inplace.runtime.loading import load_engine
from inplace.runtime.requests import Request, ValidatedRequest
from inplace.runtime.slots import EndReason, SequenceState
from inplace.schema.files import EngineFolder
from inplace.schema.served import Loop, Manifest, Program
from inplace.schema.specs import Role

_READ_BY_SCHEDULE = frozenset({Role.TOKENS, Role.DONE})


MAX_SAVED_BYTES = 64
"""Bytes of a state that is copied when a request begins, so that its calls can be taken back:
enough for a counter, a last token and the like."""


class ScheduledInstance(ModelInstance):
    """A model instance whose requests run a schedule; a step is one call of one program.

    Args:
        manifest: describes the engine.
        arena: the memory of its states; all engines are bound to it.
        engines: by program, what runs a call of it.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        clock: monotonic seconds.

    Attributes:
        loops: the schedule.
        engines: by program, what runs a call of it.
        programs: the programs by name.
        max_rows: by program, most rows of a call. Fewer let decoding wait less for an encoder.
    """

    def __init__(
        self,
        manifest: Manifest,
        arena: Arena,
        engines: Mapping[str, StepEngine],
        idle_timeout: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.loops: tuple[Loop, ...] = manifest.schedules[0].loops
        # A fresh slot is filled on the stream of the program that a START calls first; the others
        # are called after that call was waited for.
        first = engines[self.loops[0].calls[0].program]
        super().__init__(manifest, arena, first, idle_timeout, clock)
        self.engines = engines
        self.programs = {program.name: program for program in manifest.programs}
        self._read = {
            program.name: frozenset(
                spec.name for spec in program.outputs if spec.role in _READ_BY_SCHEDULE
            )
            for program in manifest.programs
        }
        self.max_rows = {program.name: program.max_rows for program in manifest.programs}
        self._repeated = _repeated_programs(self.loops)
        self._saved_states = saved_states(manifest)
        self._last_program = ""

    @classmethod
    def _load(
        cls, files: EngineFolder, manifest: Manifest, arena: Arena, idle_timeout: float
    ) -> Self:
        engines = {
            program.name: load_engine(files, manifest, arena, program.name)
            for program in manifest.programs
        }
        return cls(manifest, arena, engines, idle_timeout)

    def admit_validated(self, validated: ValidatedRequest) -> ActiveRequest:
        """Give a request its sequence, and put it at the start of the schedule."""
        active = super().admit_validated(validated)
        sequence, names = active.sequence, self._saved_states
        active.progress = ScheduleProgress(
            self.loops,
            start_positions=dict(sequence.positions),
            saved=None if names is None else self.arena.save(sequence.slot, names),
        )
        return active

    def _check_tokens(self, validated: ValidatedRequest, sequence: SequenceState | None) -> None:
        super()._check_tokens(validated, sequence)
        if sequence is not None:
            name = self.loops[0].calls[0].program
            if (full := self.full(name, sequence)) is not None:
                raise RequestError(Code.CAPACITY, f"{full}; nothing was changed: START it again")

    def full(self, name: str, sequence: SequenceState) -> str | None:
        """Why a program cannot be called for a sequence any more; None if it can."""
        limit, used = self.programs[name].max_positions, sequence.positions.get(name, 0)
        if limit is None or used < limit:
            return None
        restarting = [each.name for each in self.programs.values() if name in each.restarts]
        begins = f", which {restarting[0]} begins anew" if restarting else ""
        return f"program {name} has used {used} of the sequence's {limit} positions{begins}"

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
        """As for one program, without the outputs that the client has not named."""
        outputs, named = super()._outputs(request), request.requested_outputs
        return outputs if named is None else outputs & named

    def launch(self, rows: list[ActiveRequest], token_budget: int | None = None) -> InFlightStep:
        """Launch a call of the program at which these rows are, the same for all."""
        name = _next_program(rows[0])
        self._last_program = name
        batch = form_batch(self.programs[name], rows, token_budget)
        requested = self._read[name].union(*(active.requested_outputs for active in rows))
        return self._launch(self.engines[name], batch, requested)

    def advance(self, step: InFlightStep, outputs: Mapping[str, Tensor]) -> None:
        """Advance the rows of a call; a row whose schedule ends has its answer."""
        if step.failed:
            return
        program = self.programs[self._last_program]
        called = CallOutputs(program, outputs)
        num_finished = 0
        for row, active in enumerate(step.batch.rows):
            if active.dropped:
                continue
            assert active.progress is not None
            active.progress.add(called, row)
            self._count(program, active.sequence)
            if active.progress.finished:
                num_finished += 1
                active.sequence.length += 1
                active.num_computed_tokens = active.num_tokens
                active.step_outputs = (active.progress.answer(), 0)
            elif (full := self.full(_next_program(active), active.sequence)) is not None:
                restored, advice = self._take_back(active, EndReason.CAPACITY)
                advice = "nothing was changed: START it again" if restored else advice
                active.error = RequestError(
                    Code.CAPACITY, f"{full}, and the request is not done; {advice}"
                )
        self.observer.step_finished(step.seconds, len(step.batch.rows), num_finished, 0)

    def _count(self, program: Program, sequence: SequenceState) -> None:
        """Count the positions that a call has taken."""
        for name in program.restarts:
            sequence.positions[name] = 0
        if program.max_positions is not None:
            sequence.positions[program.name] = sequence.positions.get(program.name, 0) + 1

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
        sequence.length = active.start_length
        return True


def saved_states(manifest: Manifest) -> tuple[str, ...] | None:
    """The states that must be copied to take calls of a request back; None if some are too large.

    States to which every program that writes them only appends need no copy.
    """
    replaced = {
        alias.input
        for program in manifest.programs
        for alias in program.aliases
        if alias.input not in program.appended
    }
    states = [state for state in manifest.states if state.name in replaced]
    if any(state.slot_bytes > MAX_SAVED_BYTES for state in states):
        return None
    return tuple(state.name for state in states)


def _repeated_programs(loops: Sequence[Loop]) -> frozenset[str]:
    """The programs that a request calls more than once in succession."""
    return frozenset(
        call.program
        for loop in loops
        for call in loop.calls
        if (loop.at_most or 1) > 1 or (call.at_most or 1) > 1
    )


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
) -> ModelInstance:
    """Load an engine with an arena of its own, whatever its programs; see `ModelInstance.open`.

    Args:
        folder, manifest, idle_timeout, trust: as `ModelInstance.open` takes them.
        call_rows: by program, most rows of a call, where they are fewer than it was built for.
    """
    kind = ScheduledInstance if manifest.is_scheduled else ModelInstance
    instance = kind.open(folder, manifest, idle_timeout=idle_timeout, trust=trust)
    if isinstance(instance, ScheduledInstance):
        instance.max_rows |= call_rows
    return instance
