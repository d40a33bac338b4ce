"""What becomes of the sequences of a driver when the server stops or the model is unloaded."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from time import monotonic
from typing import Protocol

from inplace.drivers.queues import SequenceQueues, StreamRequest
from inplace.errors import Code, RequestError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.slots import EndReason, SequenceId, SequenceState

MAX_SILENCE = 2.0
"""Seconds since its last response after which a sequence is ended while the server stops. A client
that sends one step after another is given the time to end its sequence itself."""


EXIT_MARGIN = 3.0
"""Seconds before the server gives up at which requests that still run are answered with SHUTDOWN;
after that their clients would get no response. Half of the exit timeout, if that is less."""


log = logging.getLogger("inplace")


class StoppableDriver(Protocol):
    """A driver, as its shutdown needs it. The methods may return before it is done."""

    def hand_over(self) -> None:
        """Store the sequences that may be stored, then end them; those that run after their step.

        Does nothing where sequences are not stored.
        """

    def end_idle(self, seconds: float) -> None:
        """End the sequences that have had no request for so many seconds."""

    def stop_running(self, error: RequestError) -> None:
        """Answer every request with this error, and end all sequences."""


class Shutdown:
    """Idle sequences end; running requests finish, or are answered with SHUTDOWN.

    Sequences that are stored (`inplace.runtime.snapshots`) end at once, for another server to go on
    with them. The others: while the server stops, it serves live sequences until the last has
    ended, or for its exit timeout. So a sequence ends once it has been silent for `MAX_SILENCE`,
    and what runs `EXIT_MARGIN` before the timeout is answered. When the model is unloaded,
    everything is answered at once.

    Args:
        driver: has the sequences.
        exit_timeout: seconds for which the server waits.
        clock: monotonic seconds.

    Attributes:
        has_begun: the server is stopping.
    """

    def __init__(
        self,
        driver: StoppableDriver,
        exit_timeout: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._driver, self._exit_timeout, self._clock = driver, exit_timeout, clock
        self._deadline = 0.0
        self.has_begun = False

    def begin(self) -> None:
        """The server is stopping."""
        remaining = self._exit_timeout - min(EXIT_MARGIN, self._exit_timeout / 2)
        log.info(
            "the server is stopping: idle sequences are ended, running requests have %g s",
            remaining,
        )
        self._deadline = self._clock() + remaining
        self.has_begun = True

    def advance(self) -> None:
        """End what must end by now. To be called again and again while the server stops."""
        self._driver.hand_over()
        if self._clock() < self._deadline:
            self._driver.end_idle(MAX_SILENCE)
        else:
            self.stop_now()

    def stop_now(self) -> None:
        """Answer everything with SHUTDOWN and end all sequences."""
        self._driver.stop_running(unloading())


class StoppableLoop(Protocol):
    """A loop that runs requests, as `HandOver` needs it."""

    def call(self, function: Callable[[], None]) -> None:
        """Call a function on the loop's thread, between two steps. Thread-safe."""

    def stop_generation(self, request: StreamRequest) -> None:
        """Stop a generation that will be answered with `answer`."""

    def answer(self, request: StreamRequest, error: RequestError) -> None:
        """Answer a request with an error, and start the next one of its sequence."""

    def start_next(self, sequence_id: SequenceId) -> None:
        """Start the next request of a sequence."""


class HandOver:
    """Stores the sequences of an engine loop for another server, and ends them.

    All methods are to be called on the loop's thread.

    Args:
        instance: has the sequences.
        queues: their requests.
        loop: runs them.

    Attributes:
        leaving: by sequence that is being stored and ends then, whether it was.
    """

    def __init__(
        self, instance: ModelInstance, queues: SequenceQueues, loop: StoppableLoop
    ) -> None:
        self._table, self._snapshots = instance.table, instance.snapshots
        self._queues, self._loop = queues, loop
        self.leaving: dict[SequenceId, Future[bool]] = {}
        self._not_stored: set[SequenceState] = set()

    def advance(self, *, wait: bool = False) -> None:
        """Store the sequences that may be stored, then end them; those that run after their step.

        Args:
            wait: do all of it now; else what threads have room for, and the rest when called again.
        """
        snapshots = self._snapshots
        if snapshots is None:
            return
        for sequence in list(self._table.live):
            if not snapshots.is_stored(sequence) or sequence in self._not_stored:
                continue
            if sequence.id in self.leaving:
                continue
            running = self._running(sequence)
            if not _may_leave(running):
                continue
            pending = sequence.pending_token
            if running is not None and running.generation is not None:
                pending = running.generation.last_token
            result = snapshots.write(sequence, pending, wait=wait)
            if result is None:
                return
            if running is not None:
                self._loop.stop_generation(running)
            sequence.busy = True
            self.leaving[sequence.id] = result
            if wait:
                self._finished(sequence, running, was_stored=result.result())
            else:
                result.add_done_callback(partial(self._finish_later, sequence, running))

    def finish(self) -> None:
        """Wait for the sequences that are being stored, and store the others."""
        for leaving in list(self.leaving.values()):
            leaving.result()
        self.advance(wait=True)

    def fence(self, sequence: SequenceState) -> None:
        """End a sequence that another server has restored, and answer its request."""
        if self._table.get(sequence.id) is not sequence:
            return
        running = self._running(sequence)
        if running is not None:
            self._loop.stop_generation(running)
        self._table.leave(sequence, EndReason.FENCED, fenced())
        if running is not None:
            self._loop.answer(running, fenced())

    def _running(self, sequence: SequenceState) -> StreamRequest | None:
        """The request of a sequence that has been admitted."""
        queued = self._queues.get(sequence.id)
        return queued[0] if queued and queued[0].active is not None else None

    def _finish_later(
        self, sequence: SequenceState, running: StreamRequest | None, result: Future[bool]
    ) -> None:
        """Let the loop end a sequence that was stored, or could not be. On any thread.

        Nothing that the future has refers to it: such a cycle would keep the request, for which a
        server that stops waits, until garbage is collected.
        """
        was_stored = result.result()
        self._loop.call(partial(self._finished, sequence, running, was_stored=was_stored))

    def _finished(
        self, sequence: SequenceState, running: StreamRequest | None, *, was_stored: bool
    ) -> None:
        """A sequence was stored, or could not be: end it, and answer its requests."""
        self.leaving.pop(sequence.id, None)
        sequence.busy = False
        if self._table.get(sequence.id) is sequence:
            if was_stored:
                self._table.leave(sequence, EndReason.SHUTDOWN, stored())
            elif running is not None:
                self._table.end(sequence, EndReason.SHUTDOWN)
            else:
                self._not_stored.add(sequence)
        if running is not None and running in self._queues:
            self._loop.answer(running, stored() if was_stored else unloading())
        else:
            self._loop.start_next(sequence.id)


def _may_leave(running: StreamRequest | None) -> bool:
    """Whether a sequence can be stored now: nothing of it runs, or a generation has a token.

    What does not, has one soon, or has finished.
    """
    if running is None:
        return True
    generation, active = running.generation, running.active
    if generation is None or active is None or active.decode_token is None:
        return False
    return active.decode_token == generation.last_token


def stored() -> RequestError:
    """The error of requests whose sequence was stored for another server."""
    return RequestError(
        Code.SHUTDOWN,
        "the server is stopping, and the sequence was stored: START with 'restore', its key and its"
        " position on another server",
        retryable=True,
    )


def fenced() -> RequestError:
    """The error of requests whose sequence another server has restored."""
    return RequestError(
        Code.FENCED,
        "another server has restored the sequence, which has ended here: send its requests there,"
        " or START again",
    )


def unloading() -> RequestError:
    """The error of requests that end with the model or the server."""
    return RequestError(
        Code.SHUTDOWN,
        "the model is being unloaded or the server is stopping; START again when it is back, or on "
        "another server",
        retryable=True,
    )
