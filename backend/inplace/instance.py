"""A model instance: one engine, its arena and its sequences. The step that every driver uses is here."""

from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from inplace.arena import Arena
from inplace.batcher import Work, form
from inplace.engines import Engine
from inplace.errors import Code, RequestError
from inplace.manifest import Manifest, Program
from inplace.observer import Observer
from inplace.requests import Request, checked_inputs
from inplace.sequences import Ended, Sequence, SlotTable
from inplace.specs import Update


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
    """

    def __init__(
        self, manifest: Manifest, arena: Arena, engine: Engine, idle_timeout: float, clock: Callable[[], float] = monotonic
    ) -> None:
        self.manifest = manifest
        self.program: Program = manifest.program("step")
        self.arena = arena
        self.engine = engine
        self.observer = Observer(arena.slots, arena.bytes)
        self.table = SlotTable(arena.slots, idle_timeout, clock, self.observer)
        self._appends_only = all(state.update is Update.APPEND for state in manifest.states)

    def admit(self, request: Request) -> Work:
        """Check a request and give it its sequence. After this nothing of the client's can make the step fail.

        A START resets: a live sequence of that id ends first; but with the live sequence's key and a position above 0 it is a step of that
        sequence (Triton forgets sequences that are alive here, and then takes nothing but a START). A refused START leaves no slot, a
        refused END still frees; any other refused request, and any that is refused for its key, changes nothing.

        Raises:
            RequestError: with the reason.
        """
        key = request.key()
        live = self.table.get(request.sequence)
        if live is not None:
            live.check_key(key, start=request.start)
            if request.start and live.key is not None and request.goes_on:
                request = replace(request, start=False)
            elif request.start:
                self.table.end(live, Ended.START)
        try:
            if request.sequence in (0, ""):
                raise RequestError(Code.NO_SEQUENCE_ID, "the request names no sequence; send a correlation id that is not 0 or empty")
            inputs, tokens = checked_inputs(self.program, request.inputs)
            for output in self.program.outputs:
                if output.on_request:
                    request.flag(output.name)
            sampling = request.sampling(self.program)
            length = 0 if request.start else self.table.find(request.sequence).length
            self._check_room(request, length, tokens)
            sequence = self._start(request) if request.start else self.table.find(request.sequence)
        except RequestError:
            if request.end and (live := self.table.get(request.sequence)) is not None:
                self.table.end(live)
            raise
        sequence.busy = True
        self.observer.admitted(monotonic() - request.received)
        return Work(request, sequence, inputs, tokens, before=length, sampling=sampling)

    def step(self, rows: list[Work]) -> None:
        """Run one step over at most ``program.max_rows`` rows, each of its own sequence, and advance them.

        Where the engine raises, every row has its ``error`` afterwards. A START leaves no slot then, an END has ended; other sequences are
        as they were before their requests where states only append (what lies beyond the cached length is never read), and have
        ended where states are rewritten.
        """
        batch = form(self.program, rows)
        ending = [work for work, count in zip(rows, batch.counts, strict=True) if work.done + count == work.tokens]
        wanted = {name for work in ending for name in self.wanted(work)}
        begin = monotonic()
        try:
            outputs = self.engine.step(batch.inputs, wanted)
        except Exception as error:  # whatever the engine throws must reach the clients, not the server
            self.observer.failed(monotonic() - begin, [(work.sequence.id, work.request.id) for work in rows], error)
            for work in rows:
                work.error = self._failed(work, error)
            return
        decode = sum(work.tokens == 1 and work.sequence.length > 0 for work in rows)
        self.observer.stepped(monotonic() - begin, len(rows), sum(batch.counts) - decode, decode)
        for row, (work, count) in enumerate(zip(rows, batch.counts, strict=True)):
            work.done += count
            work.sequence.length += count
            if work.finished:
                work.outputs = {name: outputs[name][row : row + 1] for name in self.wanted(work)}

    def finish(self, work: Work) -> None:
        """The request is being answered: an END frees the slot, otherwise the idle clock starts again."""
        sequence = work.sequence
        sequence.busy = False
        if self.table.get(sequence.id) is not sequence:
            return  # it ended when the engine failed
        if work.request.end:
            self.table.end(sequence)
        else:
            self.table.answered(sequence)

    def wanted(self, work: Work) -> list[str]:
        """The outputs to send: all, but those ``on_request`` only when their parameter is true."""
        return [spec.name for spec in self.program.outputs if not spec.on_request or work.request.flag(spec.name)]

    def _start(self, request: Request) -> Sequence:
        sequence = self.table.start(request.sequence, request.key())
        self.arena.reset(sequence.slot)
        return sequence

    def _check_room(self, request: Request, length: int, tokens: int) -> None:
        position = request.position()
        if position is not None and position != length:
            raise RequestError(
                Code.POSITION,
                f"the request was meant for position {position}, the sequence holds {length}; an earlier request or its answer was "
                f"lost: send what is missing, or START again",
            )
        capacity = self.manifest.capacity
        if capacity is not None and length + tokens > capacity:
            raise RequestError(
                Code.CAPACITY,
                f"{tokens} tokens do not fit: the sequence holds {length} of {capacity} positions, {capacity - length} are left; "
                f"send fewer, or build with a larger capacity",
            )

    def _failed(self, work: Work, error: Exception) -> RequestError:
        """Undo what can be undone of a request whose step failed."""
        kept = self._appends_only and not work.request.start and not work.request.end
        if kept:
            work.sequence.length = work.before
            after = "nothing was changed, send it again"
        else:
            self.table.end(work.sequence, Ended.ENGINE_FAILED)
            after = "no slot is held, START again" if work.request.start else "the sequence has ended, START it again"
        text = str(error).partition("\n")[0]
        return RequestError(
            Code.ENGINE_FAILED, f"the engine failed ({type(error).__name__}: {text}); {after}", retryable=kept or work.request.start
        )
