"""A model instance: one engine, its arena and its sequences. All drivers run steps through it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from time import monotonic
from typing import Self

from torch import Tensor

from inplace.engines import NO_OTHER_THREADS, Finish, StepEngine
from inplace.engines.arena import Arena
from inplace.errors import Code, LoadError, RequestError
from inplace.runtime.admission import Admission
from inplace.runtime.batcher import (
    ActiveRequest,
    Batch,
    changed_decode_batch,
    count_tokens,
    form_batch,
    next_decode_batch,
)
from inplace.runtime.loading import load_engines, make_arena
from inplace.runtime.prompt import StepPart, launch_parts
from inplace.runtime.slots import EndReason
from inplace.schema.files import EngineFolder
from inplace.schema.programs import Program
from inplace.schema.schedule import PROMPT_LOGPROBS, STEP
from inplace.schema.served import Manifest


@dataclass(slots=True)
class InFlightStep:
    """A step that has been launched and not waited for.

    Attributes:
        batch: its rows and inputs.
        requested_outputs: names of the outputs that are read.
        launch_time: when it was launched, in monotonic seconds.
        finish: waits for it; an exception if it could not be launched.
        seconds: from its launch until it was waited for.
        failed: the engine raised.
        num_calls: how many times the program is called, of a schedule.
        scored: of the rows that the program with log-probabilities of fed tokens runs, each with
            its first token in that program's step.
    """

    batch: Batch
    requested_outputs: frozenset[str]
    launch_time: float
    finish: Finish | Exception
    seconds: float = 0.0
    failed: bool = False
    num_calls: int = 1
    scored: Mapping[int, int] = field(default_factory=dict)


class ModelInstance(Admission):
    """Admits requests and runs steps for their sequences.

    The life of a request: `admit`, `step` until it is finished, `finish`. A driver may take the
    first apart into `validate` and `admit_validated`, and a step into `launch`, `wait` and
    `advance`, to overlap the step with its own work. Not thread-safe, except `validate`.

    Args:
        manifest: describes the engine.
        arena: the memory of its states; the engine is bound to it.
        engine: runs a step.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        clock: monotonic seconds.
        prompt_engine: runs the rows that ask for log-probabilities of fed tokens; None if the
            engine does not have that program.

    Attributes:
        gil_released: entered by the engine while it waits for the device, so that other threads
            can run Python meanwhile.
    """

    def __init__(
        self,
        manifest: Manifest,
        arena: Arena,
        engine: StepEngine,
        idle_timeout: float,
        clock: Callable[[], float] = monotonic,
        prompt_engine: StepEngine | None = None,
    ) -> None:
        prompt_program = None if prompt_engine is None else manifest.prompt_program
        super().__init__(manifest, arena, idle_timeout, clock, prompt_program)
        self.engine, self.prompt_engine = engine, prompt_engine
        self.gil_released: AbstractContextManager[object] = NO_OTHER_THREADS

    @classmethod
    def open(
        cls,
        folder: Path | str,
        manifest: Manifest | None = None,
        *,
        slots: int | None = None,
        idle_timeout: float = 600.0,
        trust: Sequence[Path | str] | None = None,
    ) -> Self:
        """Load an engine with an arena of its own, on the device that it was built for.

        Args:
            folder: the engine directory, ``model_repository/<name>/1``.
            manifest: its manifest, if it has been loaded or its capacity was chosen
                (`Manifest.at_capacity`).
            slots: sequences that can live at the same time; None for what the manifest says.
            idle_timeout: seconds after its last response at which a sequence loses its slot.
            trust: folders from which TensorRT plans are loaded, because a plan is code; None is
                ``folder`` itself.

        Raises:
            LoadError: the engine cannot be loaded here, or there is not enough memory.
        """
        manifest = manifest or Manifest.load(folder)
        files = EngineFolder(folder, trust)
        arena = make_arena(files, manifest, slots or manifest.slots)
        return cls._load(files, manifest, arena, idle_timeout)

    @classmethod
    def _load(
        cls, files: EngineFolder, manifest: Manifest, arena: Arena, idle_timeout: float
    ) -> Self:
        """Load the engines over an arena."""
        if manifest.is_scheduled or manifest.decode_schedule is not None:
            raise LoadError(
                f"{files.path} has a schedule of programs; open it with "
                "inplace.runtime.schedules.open_model"
            )
        names = [program.name for program in manifest.programs]
        engines = load_engines(files, manifest, arena, names)
        prompt_engine = engines.get(PROMPT_LOGPROBS)
        return cls(manifest, arena, engines[STEP], idle_timeout, prompt_engine=prompt_engine)

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched for rows that may turn out to have finished before it.

        The engine must run launched steps by itself. What the step writes for such a row lies
        beyond the cached length of its sequence, where nothing is read, if states only append.
        """
        return self._appends_only and self.engine.overlaps

    def step(self, rows: list[ActiveRequest], token_budget: int | None = None) -> dict[str, Tensor]:
        """Run one step: `launch`, `wait` and `advance`."""
        step = self.launch(rows, token_budget)
        outputs = self.wait(step)
        self.advance(step, outputs)
        return outputs

    def launch(self, rows: list[ActiveRequest], token_budget: int | None = None) -> InFlightStep:
        """Launch a step.

        The step before must have been waited for. If it has not been advanced, its rows may only be
        launched by `launch_next`.

        Args:
            rows: at most ``program.max_rows`` requests of different sequences.
            token_budget: as in `form_batch`.
        """
        counts = count_tokens(self.program, rows, token_budget)
        requested = frozenset[str]().union(
            *{
                active.requested_outputs
                for active, count in zip(rows, counts, strict=True)
                if active.num_waiting_tokens == count
            }
        )
        scored = [row for row, active in enumerate(rows) if active.scores_prompt]
        if scored:
            return self._launch_scored(rows, counts, scored, requested)
        batch = form_batch(self.program, rows, counts=counts)
        return self._launch(self.engine.launch, batch, requested)

    def _launch_scored(
        self,
        rows: list[ActiveRequest],
        counts: list[int],
        scored: list[int],
        requested: frozenset[str],
    ) -> InFlightStep:
        """Launch a step with rows that ask for log-probabilities of what they feed.

        Another program runs these rows, beside the one that runs the others as always.

        Args:
            rows: the rows of the step.
            counts: how many tokens of each it consumes.
            scored: the indices of those that ask.
            requested: names of the outputs that are read.
        """
        assert self.prompt_engine is not None
        assert self._prompt_program is not None
        places: list[tuple[StepEngine, Program, list[int]]]
        places = [(self.prompt_engine, self._prompt_program, scored)]
        if others := sorted(set(range(len(rows))) - set(scored)):
            places.append((self.engine, self.program, others))
        parts = []
        for engine, program, each in places:
            part = [rows[row] for row in each], [counts[row] for row in each]
            batch = form_batch(program, part[0], counts=part[1])
            parts.append(StepPart(engine, batch.inputs, each))
        whole = Batch(rows, counts, {}, [], [])
        step = self._launch(partial(launch_parts, parts), whole, requested)
        starts = accumulate((counts[row] for row in scored), initial=0)
        step.scored = dict(zip(scored, starts, strict=False))
        return step

    def launch_next(
        self,
        step: InFlightStep,
        outputs: Mapping[str, Tensor],
        kept: Sequence[int] | None = None,
        joined: Sequence[ActiveRequest] = (),
    ) -> InFlightStep:
        """Launch the decode step after ``step``, as if each row was fed the token it has sampled.

        Args:
            step: a step that was waited for; each row has one token.
            outputs: its outputs, with the sampled tokens.
            kept: the rows that go on; None for all.
            joined: requests with a token to decode, which no step in flight has.
        """
        assert self.program.decoder_io is not None
        tokens = outputs[self.program.decoder_io[1]]
        if kept is None and not joined:
            batch = next_decode_batch(self.program, step.batch, tokens)
        else:
            kept = range(len(step.batch.rows)) if kept is None else kept
            batch = changed_decode_batch(self.program, step.batch, tokens, kept, joined)
        requested = step.requested_outputs.union(*(each.requested_outputs for each in joined))
        return self._launch(self.engine.launch, batch, requested)

    def _launch(
        self,
        launch: Callable[[Mapping[str, Tensor], Collection[str]], Finish],
        batch: Batch,
        requested_outputs: frozenset[str],
    ) -> InFlightStep:
        launch_time = monotonic()
        try:
            finish: Finish | Exception = launch(batch.inputs, requested_outputs)
        except Exception as error:  # raised in `wait`, like an error of the step itself
            finish = error
        return InFlightStep(batch, requested_outputs, launch_time, finish)

    def wait(self, step: InFlightStep) -> dict[str, Tensor]:
        """Wait for a step that is in flight.

        If the engine raises, every row that is not dropped has its ``error`` afterwards. A START
        leaves no slot then and an END has ended. Other sequences are as they were before their
        requests if states only append (nothing reads beyond the cached length); they have ended if
        states are rewritten, or if generated tokens have been fed.

        Returns:
            The requested outputs by name, ``[rows, ...]``; rows with tokens left to consume hold
            arbitrary values. Empty if the engine raised.
        """
        try:
            if isinstance(step.finish, Exception):
                raise step.finish
            return step.finish(self.gil_released)
        except Exception as error:  # of any type: it goes to the clients, not to the server
            step.failed = True
            rows = [active for active in step.batch.rows if not active.dropped]
            self.observer.step_failed(
                monotonic() - step.launch_time,
                [(active.sequence.id, active.request.request_id) for active in rows],
                error,
            )
            for active in rows:
                active.error = self._roll_back(active, error)
            return {}
        finally:
            step.seconds = monotonic() - step.launch_time

    def advance(self, step: InFlightStep, outputs: Mapping[str, Tensor]) -> None:
        """Advance the rows of a step that was waited for, except those that are dropped."""
        if step.failed:
            return
        num_tokens = num_decode_tokens = 0
        for row, active in enumerate(step.batch.rows):
            if active.dropped:
                continue
            is_decode = active.num_tokens == 1 and active.sequence.length
            count = self._advance_row(step, outputs, row, active)
            num_tokens += count
            if is_decode:
                num_decode_tokens += count
        num_prefill_tokens = num_tokens - num_decode_tokens
        self.observer.step_finished(
            step.seconds, len(step.batch.rows), num_prefill_tokens, num_decode_tokens
        )

    def _advance_row(
        self, step: InFlightStep, outputs: Mapping[str, Tensor], row: int, active: ActiveRequest
    ) -> int:
        """Advance a row; how many tokens of its sequence were consumed."""
        count = step.batch.num_scheduled_tokens[row]
        active.sequence.length += count
        if self._counted_input is not None:
            self._remember_tokens(active, count)
        active.num_computed_tokens += count
        if row in step.scored and active.prompt_logprobs is not None:
            active.prompt_logprobs.add(outputs, step.scored[row], count)
        active.accepted_rows = ()
        if active.num_computed_tokens == active.num_tokens:
            active.step_outputs = (outputs, row)
        return count

    def _remember_tokens(self, active: ActiveRequest, count: int) -> None:
        """Add the tokens that a step has consumed to those of its sequence."""
        token_ids = active.sequence.token_ids
        if active.decode_token is not None:
            token_ids.append(active.decode_token)
            return
        assert self._counted_input is not None
        begin = active.num_computed_tokens
        consumed = active.inputs[self._counted_input][begin : begin + count]
        token_ids.extend(consumed.tolist())

    def _roll_back(self, active: ActiveRequest, error: Exception) -> RequestError:
        """Restore the sequence of a request whose step failed, or end it; what its client reads."""
        restored, advice = self._take_back(active)
        text = str(error).partition("\n")[0]
        return RequestError(
            Code.ENGINE_FAILED,
            f"the engine failed ({type(error).__name__}: {text}); {advice}",
            retryable=restored or active.request.start,
        )

    def _take_back(
        self, active: ActiveRequest, reason: EndReason = EndReason.ENGINE_FAILED
    ) -> tuple[bool, str]:
        """Undo a request that cannot be finished: restore its sequence, or end it.

        Returns:
            Whether it was restored, and the advice to the client.
        """
        request = active.request
        if not request.start and not request.end and self.restore(active):
            return True, "nothing was changed, send it again"
        self.table.end(active.sequence, reason)
        if request.start:
            return False, "no slot is held, START again"
        return False, "the sequence has ended, START it again"

    def restore(self, active: ActiveRequest) -> bool:
        """Restore a sequence to what it was before a request, if its states allow it."""
        if not self._appends_only or active.decode_token is not None:
            return False
        sequence = active.sequence
        sequence.roll_back(active.start_length)
        sequence.pending_token = active.pending_token
        return True
