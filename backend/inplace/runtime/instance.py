"""A model instance: one engine, its arena and its sequences. The step that every driver uses is here.

A step between its launch and what comes of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Self

import torch
from torch import Tensor

from inplace.engines import NO_OTHER_THREADS, Finish, StepEngine
from inplace.engines.arena import Arena
from inplace.errors import Code, RequestError
from inplace.runtime.batcher import ActiveRequest, Batch, follow, form
from inplace.runtime.loading import load_engine
from inplace.runtime.observer import Observer
from inplace.runtime.requests import Request, ValidatedRequest, checked_inputs
from inplace.runtime.sampling import GREEDY
from inplace.runtime.slots import EndReason, SlotTable
from inplace.schema.served import Manifest, Program
from inplace.schema.specs import Update


@dataclass(slots=True)
class InFlightStep:
    """A step that was launched.

    Attributes:
        batch: its rows and inputs.
        wanted: the outputs that are read.
        begin: when, in monotonic seconds.
        finish: waits for it; or why it could not be launched.
        seconds: from then until it was waited for.
        failed: the engine raised.
    """

    batch: Batch
    wanted: frozenset[str]
    begin: float
    finish: Finish | Exception
    seconds: float = 0.0
    failed: bool = False


class ModelInstance:
    """Admits requests, runs steps and keeps the sequences. Not thread-safe: its driver holds a lock.

    Args:
        manifest: what the engine is.
        arena: the memory its states live in; the engine is bound to it.
        engine: what runs a step.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        clock: monotonic seconds.

    Attributes:
        observer: is told what happens.
        waiting: handed to the engine, which enters it while it waits.
    """

    def __init__(
        self,
        manifest: Manifest,
        arena: Arena,
        engine: StepEngine,
        idle_timeout: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.manifest = manifest
        self.program: Program = manifest.program("step")
        self.arena = arena
        self.engine = engine
        self.observer = Observer(arena.slots, arena.bytes)
        self.table = SlotTable(arena.slots, idle_timeout, clock, self.observer)
        self.waiting = NO_OTHER_THREADS
        self._always = frozenset(spec.name for spec in self.program.outputs if not spec.on_request)
        self._on_request = frozenset(spec.name for spec in self.program.outputs if spec.on_request)
        self._appends_only = all(state.update is Update.APPEND for state in manifest.states)

    @classmethod
    def open(
        cls,
        folder: Path,
        manifest: Manifest | None = None,
        *,
        slots: int | None = None,
        idle_timeout: float = 600.0,
    ) -> Self:
        """Load an engine with an arena of its own, on the device that it was built for.

        Args:
            folder: the engine directory, ``model_repository/<name>/1``.
            manifest: its manifest, where it was read already or a capacity was chosen from its range (`Manifest.at_capacity`).
            slots: sequences to have room for, where it is not what the manifest says.
            idle_timeout: seconds after its last response at which a sequence loses its slot.

        Raises:
            LoadError: the engine cannot be loaded here, or there is not enough memory.
        """
        manifest = manifest or Manifest.load(folder)
        arena = Arena(
            manifest.states, slots or manifest.slots, torch.device(manifest.engine.device)
        )
        return cls(manifest, arena, load_engine(folder, manifest, arena), idle_timeout)

    def admit(self, request: Request) -> ActiveRequest:
        """`check` and `enter` in one."""
        return self.enter(self.check(request))

    def check(self, request: Request) -> ValidatedRequest:
        """Everything that can be found out about a step without looking at its sequence. Safe to call from any thread.

        Raises:
            RequestError: its key cannot be read: it changes nothing, whatever flags it has.
        """
        asked = request.parameters.keys()
        key = request.key() if asked else None
        try:
            _check_named(request)
            inputs, tokens = checked_inputs(self.program, request.inputs)
            if not asked:
                return ValidatedRequest(request, key, inputs, tokens, wanted=self._always)
            wanted = self._always | {
                name for name in self._on_request & asked if request.flag(name)
            }
            sampling, position = request.sampling(self.program), request.position()
            if sampling.temperature == 0:
                sampling = (
                    GREEDY  # whatever else it says: steps of such rows only are formed faster
                )
        except RequestError as error:
            return ValidatedRequest(request, key, refusal=error)
        return ValidatedRequest(
            request, key, inputs, tokens, position=position, sampling=sampling, wanted=wanted
        )

    def enter(self, checked: ValidatedRequest) -> ActiveRequest:
        """Give a checked request its sequence. After this nothing of the client's can make the step fail.

        A START resets: a live sequence of that id ends first; but with the live sequence's key and a position above 0 it is a step of that
        sequence (Triton forgets sequences that are alive here, and then takes nothing but a START). A refused START leaves no slot, a
        refused END still frees; any other refused request, and any that is refused for its key, changes nothing.

        Raises:
            RequestError: with the reason.
        """
        request = checked.request
        live = self.table.get(request.sequence)
        if live is not None:
            live.check_key(checked.key, start=request.start)
            if request.start and live.key is not None and request.goes_on:
                request = replace(request, start=False)
            elif request.start:
                self.table.end(live, EndReason.START)
        try:
            if checked.refusal is not None:
                raise checked.refusal
            sequence = None if request.start else self.table.find(request.sequence)
            self._check_room(checked, sequence.position if sequence is not None else 0)
            if sequence is None:
                sequence = self.table.start(request.sequence, checked.key)
                self.arena.reset(sequence.slot)
        except RequestError:
            if request.end and (live := self.table.get(request.sequence)) is not None:
                self.table.end(live)
            raise
        sequence.busy = True
        self.observer.admitted(monotonic() - request.received)
        work = ActiveRequest(
            request,
            sequence,
            checked.inputs,
            checked.tokens,
            sequence.length,
            checked.sampling,
            checked.wanted,
        )
        if sequence.pending is not None:
            self._put_first(work, sequence.pending)
            sequence.pending = None
        return work

    def end(self, checked: ValidatedRequest) -> None:
        """End a sequence for a request that brings nothing else.

        Raises:
            RequestError: UNKNOWN_SEQUENCE or SEQUENCE_KEY.
        """
        live = self.table.find(checked.request.sequence)
        live.check_key(checked.key, start=False)
        self.table.end(live)

    @property
    def ahead(self) -> bool:
        """Whether a step may be launched for rows that turn out to be over.

        The engine goes on by itself then, and what such a row writes lies beyond the cached length of its sequence, where nobody reads.
        """
        return self._appends_only and self.engine.overlaps

    def step(self, rows: list[ActiveRequest], budget: int | None = None) -> dict[str, Tensor]:
        """Run one step: `launch`, `wait` and `settle`."""
        flight = self.launch(rows, budget)
        outputs = self.wait(flight)
        self.settle(flight, outputs)
        return outputs

    def launch(self, rows: list[ActiveRequest], budget: int | None = None) -> InFlightStep:
        """Begin one step over at most ``program.max_rows`` rows, each of its own sequence, that brings at most ``budget`` of their tokens.

        It must be waited for before the next is launched, and settled before its rows are launched by anything but `follow`.
        """
        batch = form(self.program, rows, budget)
        ending = [
            work.wanted
            for work, count in zip(rows, batch.counts, strict=True)
            if work.done + count == work.tokens
        ]
        return self._launched(batch, frozenset().union(*set(ending)))

    def follow(self, flight: InFlightStep, outputs: Mapping[str, Tensor]) -> InFlightStep:
        """Begin the step after one of single tokens, with the tokens that its rows have said, as if each was `ActiveRequest.feed` its own."""
        assert self.program.decoder_io is not None
        return self._launched(
            follow(self.program, flight.batch, outputs[self.program.decoder_io[1]]), flight.wanted
        )

    def _launched(self, batch: Batch, wanted: frozenset[str]) -> InFlightStep:
        begin = monotonic()
        try:
            finish: Finish | Exception = self.engine.launch(batch.inputs, wanted)
        except Exception as error:  # its rows are told as if it had been launched
            finish = error
        return InFlightStep(batch, wanted, begin, finish)

    def wait(self, flight: InFlightStep) -> dict[str, Tensor]:
        """Wait for a step.

        Where the engine raises, every row has its ``error`` afterwards. A START leaves no slot then, an END has ended; other sequences are
        as they were before their requests where states only append (what lies beyond the cached length is never read), and have
        ended where states are rewritten, or where tokens that they said themselves have been fed.

        Returns:
            What the rows that finish with it want to know, by output name, ``[rows, ...]``; entries of other rows mean nothing. Nothing
            where the engine raised.
        """
        try:
            if isinstance(flight.finish, Exception):
                raise flight.finish
            return flight.finish(self.waiting)
        except (
            Exception
        ) as error:  # whatever the engine throws must reach the clients, not the server
            failed = [work for work in flight.batch.rows if not work.over]
            flight.failed = True
            self.observer.failed(
                monotonic() - flight.begin,
                [(work.sequence.id, work.request.id) for work in failed],
                error,
            )
            for work in failed:
                work.error = self._failed(work, error)
            return {}
        finally:
            flight.seconds = monotonic() - flight.begin

    def settle(self, flight: InFlightStep, outputs: Mapping[str, Tensor]) -> None:
        """Advance the rows of a step that was waited for; those that are over stay as they are."""
        if flight.failed:
            return
        tokens = decode = 0
        for row, (work, count) in enumerate(
            zip(flight.batch.rows, flight.batch.counts, strict=True)
        ):
            if work.over:
                continue
            sequence = work.sequence
            tokens += count
            if work.tokens == 1 and sequence.length:
                decode += 1
            sequence.length += count
            work.done += count
            if work.done == work.tokens:
                work.found = (outputs, row)
        self.observer.stepped(flight.seconds, len(flight.batch.rows), tokens - decode, decode)

    def finish(self, work: ActiveRequest) -> None:
        """The request is being answered: an END frees the slot, otherwise the idle clock starts again."""
        sequence = work.sequence
        sequence.busy = False
        if self.table.get(sequence.id) is not sequence:
            return  # it ended when the engine failed
        if work.request.end:
            self.table.end(sequence)
        else:
            self.table.answered(sequence)

    def _put_first(self, work: ActiveRequest, token: int) -> None:
        """Feed a pending token before those that the request brings."""
        assert self.program.decoder_io is not None
        name = self.program.decoder_io[0]
        work.inputs = {name: torch.cat([torch.tensor([token]), work.inputs[name]])}
        work.tokens += 1
        work.pending = token

    def _check_room(self, checked: ValidatedRequest, length: int) -> None:
        position, tokens = checked.position, checked.tokens
        if position is not None and position != length:
            raise RequestError(
                Code.POSITION,
                f"the request was meant for position {position}, the sequence holds {length}; an earlier request or its answer was "
                f"lost: send what is missing, or START again",
            )
        capacity = self.manifest.capacity
        if capacity is not None and length + tokens + checked.said > capacity:
            more = f" and {checked.said} more" if checked.said else ""
            raise RequestError(
                Code.CAPACITY,
                f"{tokens} tokens{more} do not fit: the sequence holds {length} of {capacity} positions, {capacity - length} are left; "
                f"send fewer, or build with a larger capacity",
            )

    def _failed(self, work: ActiveRequest, error: Exception) -> RequestError:
        """Undo what can be undone of a request whose step failed."""
        kept = (
            self._appends_only
            and not work.request.start
            and not work.request.end
            and work.token is None
        )
        if kept:
            work.sequence.length, work.sequence.pending = work.before, work.pending
            after = "nothing was changed, send it again"
        else:
            self.table.end(work.sequence, EndReason.ENGINE_FAILED)
            after = (
                "no slot is held, START again"
                if work.request.start
                else "the sequence has ended, START it again"
            )
        text = str(error).partition("\n")[0]
        return RequestError(
            Code.ENGINE_FAILED,
            f"the engine failed ({type(error).__name__}: {text}); {after}",
            retryable=kept or work.request.start,
        )


def _check_named(request: Request) -> None:
    if request.sequence in (0, ""):
        raise RequestError(
            Code.NO_SEQUENCE_ID,
            "the request names no sequence; send a correlation id that is not 0 or empty",
        )
