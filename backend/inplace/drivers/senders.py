"""Threads beside the engine's: they send what is to be said, and ask whether anybody still listens.

Whose turn it is to run Python.

What comes of jobs, until it is handed to the senders once a step.
"""

import logging
import queue
import threading
from collections.abc import Callable
from time import monotonic
from typing import Generic, TypeVar

from inplace.drivers.generation import FinishReason, GenerationState
from inplace.drivers.reply import FinalResponse, Outputs, Reply
from inplace.drivers.sequence_queues import StreamRequest
from inplace.errors import RequestError
from inplace.runtime.observer import Observer

PATIENCE = 0.005
"""Seconds after which who waits goes on all the same: the engine's thread may come back before a busy machine has woken anybody."""


class GilPriority:
    """Held by the engine's thread, except while the device computes and while it has nothing to do; others work meanwhile.

    Python hands its interpreter lock to any thread that waits for it. An engine's thread that meets senders with a response in hand gets it
    after them, once for every call that lets go of it, and the device waits. What is said meanwhile goes with the next response.

    As a context manager it is given up inside the block. The engine's thread alone uses it so, and `take` and `give`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False

    def take(self) -> None:
        """The engine's thread goes on; who is in the middle of something may finish it."""
        self._taken = True
        self._lock.acquire()

    def give(self) -> None:
        """The engine's thread waits."""
        self._taken = False
        self._lock.release()

    def wait(self) -> None:
        """Return when the engine's thread waits, or has kept its turn for long. From any other thread, before each piece of work."""
        if self._taken and self._lock.acquire(timeout=PATIENCE):
            self._lock.release()

    def __enter__(self) -> None:
        self.give()

    def __exit__(self, *_: object) -> None:
        self.take()


Told = tuple[list[tuple[Reply, int, str | None]], list[tuple[Reply, FinalResponse]]]


THREADS = 2
"""Sending waits for the server, so one thread sends too little. More than two keep Python's lock from the engine's thread; see `GilPriority`."""


PERIOD = 0.04
"""Seconds between two questions whether a client is still there."""


LEAST_PAUSE = 0.005


Watched = TypeVar("Watched")


log = logging.getLogger("inplace")


class Senders:
    """Sends replies, fairly: each in its turn all that it has. What is told goes through a thread first, so that telling costs little.

    Attributes:
        turn: is waited for before each response.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self.turn = GilPriority()
        self._told: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
        self._queue: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._teller = threading.Thread(target=self._tell, name="inplace-tell", daemon=True)
        self._threads = [
            threading.Thread(target=self._send, name=f"inplace-send-{index}", daemon=True)
            for index in range(threads)
        ]
        self._closed = False
        for thread in (self._teller, *self._threads):
            thread.start()

    def tell(
        self, said: list[tuple[Reply, int, str | None]], finished: list[tuple[Reply, FinalResponse]]
    ) -> None:
        """Add tokens, with the text that each adds (see `Reply.say`), and then how replies end; in the order of the calls."""
        self._told.put((said, finished))
        if self._closed:
            self._told.put(None)
            self._tell()
            self._queue.put(None)
            self._send()

    @property
    def behind(self) -> bool:
        """Whether more replies wait to be sent than are being sent."""
        return self._queue.qsize() > THREADS

    def queue(self, reply: Reply) -> None:
        """Send what a reply has; only by who was told to queue it."""
        self._queue.put(reply)

    def close(self) -> None:
        """Send what was told and end the threads; what is told later is sent by who tells it."""
        self._told.put(None)
        self._teller.join()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._closed = True
        self.tell([], [])  # replies that were queued again while the threads ended

    def _tell(self) -> None:
        while (told := self._told.get()) is not None:
            said, finished = told
            self.turn.wait()
            for reply, token, text in said:
                if reply.say(token, text):
                    self._queue.put(reply)
            for reply, last in finished:
                if reply.finish(last):
                    self._queue.put(reply)

    def _send(self) -> None:
        while (reply := self._queue.get()) is not None:
            self.turn.wait()
            while reply.send():
                if not self._queue.empty() and not self._closed:
                    self._queue.put(reply)  # the others first
                    break
                self.turn.wait()


class CancellationWatcher(Generic[Watched]):
    """Asks each reply every `PERIOD` seconds whether its client has cancelled.

    Args:
        cancelled: called, on this thread, with what was watched; once each.
        turn: is waited for before each question.
    """

    def __init__(self, cancelled: Callable[[Watched], None], turn: GilPriority) -> None:
        self._cancelled, self._turn = cancelled, turn
        self._watched: dict[Watched, Reply] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inplace-cancel", daemon=True)
        self._thread.start()

    def add(self, watched: Watched, reply: Reply) -> None:
        """Watch until `remove`, or until it was cancelled."""
        self._watched[watched] = reply

    def remove(self, watched: Watched) -> None:
        """Watch it no longer."""
        self._watched.pop(watched, None)

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        pause = PERIOD
        while not self._closing.wait(pause):
            begin = monotonic()
            for watched, reply in self._watched.copy().items():  # other threads add and remove
                self._turn.wait()
                try:
                    gone = reply.cancelled()
                except Exception:  # one request that the server cannot speak of must not leave the others unwatched
                    log.exception("a request was not asked whether it is cancelled")
                    self.remove(watched)
                    continue
                if gone:
                    self.remove(watched)
                    self._cancelled(watched)
            pause = max(LEAST_PAUSE, PERIOD - (monotonic() - begin))


class ResponseBuffer:
    """Tells the observer at once, and the senders when `tell` is called.

    Args:
        senders: answer.
        observer: counts and logs.
    """

    def __init__(self, senders: Senders, observer: Observer) -> None:
        self._senders, self._observer = senders, observer
        self._said: list[tuple[Reply, int, str | None]] = []
        self._finished: list[tuple[Reply, FinalResponse]] = []

    def say(self, job: StreamRequest, generation: GenerationState, text: str | None) -> None:
        """A generation said its `GenerationState.token`; ``text`` as in `Reply.say`."""
        assert generation.token is not None
        if generation.said == 1:
            self._observer.first_token(monotonic() - job.checked.request.arrival_time)
        self._said.append((job.reply, generation.token, text))

    def answer(self, job: StreamRequest, outputs: Outputs) -> None:
        """A step was computed."""
        self._finished.append((job.reply, FinalResponse(outputs)))

    def finish(self, job: StreamRequest, generation: GenerationState, reason: FinishReason) -> None:
        """A generation has finished."""
        self._observer.generation_finished(
            job.sequence, job.checked.request.request_id, reason, generation.said
        )
        self._finished.append((job.reply, FinalResponse(reason, generation.rest())))

    def refuse(self, job: StreamRequest, error: RequestError) -> None:
        """A request is answered with an error."""
        request = job.checked.request
        self._observer.request_refused(
            request.sequence_id, request.request_id, error, end=request.end
        )
        self._finished.append((job.reply, FinalResponse(error)))

    def tell(self) -> None:
        """Hand over what has come since the last time."""
        if self._said or self._finished:
            self._senders.tell(self._said, self._finished)
            self._said, self._finished = [], []
