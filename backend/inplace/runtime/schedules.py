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
from inplace.runtime.batcher import ActiveRequest, ScheduleProgress, form_batch
from inplace.runtime.instance import InFlightStep, ModelInstance
from inplace.runtime.loading import load_engine
from inplace.runtime.requests import ValidatedRequest
from inplace.schema.files import EngineFolder
from inplace.schema.served import Loop, Manifest
from inplace.schema.specs import Role

_READ_BY_SCHEDULE = frozenset({Role.TOKENS, Role.DONE})


class ScheduledInstance(ModelInstance):
    """A model instance whose requests run a schedule; a step is one call of one program.

    Args:
        manifest: describes the engine.
        arena: the memory of its states; all engines are bound to it.
        engines: by program, what runs a call of it.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        clock: monotonic seconds.
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
        active.progress = ScheduleProgress(self.loops)
        return active

    def next_rows(self, waiting: Sequence[ActiveRequest]) -> list[ActiveRequest]:
        """The rows of the next call: of the program at which the first of them waits.

        But no program is called twice in succession while rows wait for another one: the other one
        is called first.

        Args:
            waiting: the longest waiting first.
        """
        program = _next_program(waiting[0])
        if program == self._last_program:
            names = (_next_program(active) for active in waiting)
            program = next((name for name in names if name != program), program)
        rows = [active for active in waiting if _next_program(active) == program]
        return rows[: self.programs[program].max_rows]

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
        num_finished = 0
        for row, active in enumerate(step.batch.rows):
            if active.dropped:
                continue
            assert active.progress is not None
            active.progress.add(program, outputs, row)
            if active.progress.finished:
                num_finished += 1
                active.sequence.length += 1
                active.num_computed_tokens = active.num_tokens
                active.step_outputs = (active.progress.answer(), 0)
        self.observer.step_finished(step.seconds, len(step.batch.rows), num_finished, 0)


def _next_program(active: ActiveRequest) -> str:
    assert active.progress is not None
    return active.progress.next_call.program


def open_model(
    folder: Path | str,
    manifest: Manifest,
    *,
    idle_timeout: float,
    trust: Sequence[Path | str] | None,
) -> ModelInstance:
    """Load an engine with an arena of its own, whatever its programs; see `ModelInstance.open`."""
    kind = ScheduledInstance if manifest.is_scheduled else ModelInstance
    return kind.open(folder, manifest, idle_timeout=idle_timeout, trust=trust)
