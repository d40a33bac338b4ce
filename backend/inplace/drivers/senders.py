"""Threads beside the engine's: they send responses and watch for cancelled requests.

They run Python only while the engine's thread does not need the GIL (`GilPriority`). Once a step,
the engine's thread hands over what it has for clients (`ResponseBuffer`).
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from time import monotonic
from typing import Generic, TypeVar

from inplace.drivers.detokenizer import TokenizerError
from inplace.drivers.generation import FinishReason, GenerationState
from inplace.drivers.queues import StreamRequest
from inplace.drivers.reply import FinalResponse, Outputs, Piece, Reply
from inplace.errors import RequestError, backend_failure
from inplace.runtime.observer import Observer

MAX_GIL_WAIT = 0.005
"""Seconds after which a waiting thread runs all the same: on a busy machine, the engine's thread
may acquire the lock again before any waiting thread has woken up."""


NUM_SENDERS = 2
"""Sending waits for the server, so one thread sends too little. More than two keep the GIL from the
engine's thread; see `GilPriority`."""


CANCEL_CHECK_INTERVAL, MIN_CANCEL_CHECK_PAUSE = 0.04, 0.005
"""Seconds between two checks of a client, and the shortest pause between two rounds of checks."""


log = logging.getLogger("inplace")


class GilPriority:
    """Priority of the engine's thread for the GIL (Python's global interpreter lock).

    The engine's thread holds it except while the device computes or while there is nothing to do;
    other threads work then. Python gives the GIL to any waiting thread: without priority, the
    engine's thread would get it back only after each sender with a response in hand, at every call
    that releases it, and the device would wait. Tokens that are not sent meanwhile go into the next
    response.

    Attributes:
        released: a context manager for the engine's thread; other threads may run inside it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._acquired = False
        self.released: AbstractContextManager[None] = _Released(self)

    def acquire(self) -> None:
        """Take priority. Only from the engine's thread.

        Waits for nothing but the few microseconds in which another thread has the lock.
        """
        self._acquired = True
        self._lock.acquire()

    def release(self) -> None:
        """Let other threads run. Only from the engine's thread."""
        self._acquired = False
        self._lock.release()

    def wait_for_engine(self) -> None:
        """Wait until the engine's thread does not need the GIL, at most `MAX_GIL_WAIT` seconds.

        From any other thread, before each piece of work.
        """
        if self._acquired and self._lock.acquire(timeout=MAX_GIL_WAIT):
            self._lock.release()


class _Released(AbstractContextManager[None]):
    def __init__(self, gil: GilPriority) -> None:
        self._gil = gil

    def __enter__(self) -> None:
        self._gil.release()

    def __exit__(self, *_: object) -> None:
        self._gil.acquire()


TokenUpdate = tuple[Reply, Piece]
"""A token for a reply, or several."""


FinalUpdate = tuple[Reply, FinalResponse]
"""A reply and how it ends."""


class Senders:
    """Threads that send replies; each reply in turn, with all that it has.

    Updates go through one more thread, so that `publish` costs the engine's thread little.

    Attributes:
        gil: the threads wait for it before each response.
    """

    def __init__(self, num_senders: int = NUM_SENDERS) -> None:
        self.gil = GilPriority()
        self._updates: queue.SimpleQueue[tuple[list[TokenUpdate], list[FinalUpdate]] | None]
        self._updates = queue.SimpleQueue()
        self._queue: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._publisher = threading.Thread(
            target=self._apply_updates, name="inplace-publish", daemon=True
        )
        self._threads = [
            threading.Thread(target=self._send, name=f"inplace-send-{index}", daemon=True)
            for index in range(num_senders)
        ]
        self._closed = False
        for thread in (self._publisher, *self._threads):
            thread.start()

    def publish(self, tokens: list[TokenUpdate], finals: list[FinalUpdate]) -> None:
        """Add tokens to replies, then finish replies; in the order of the calls."""
        self._updates.put((tokens, finals))
        if self._closed:  # no thread is left
            self._updates.put(None)
            self._apply_updates()
            self._queue.put(None)
            self._send()

    @property
    def behind(self) -> bool:
        """Whether more replies wait to be sent than there are threads."""
        return self._queue.qsize() > len(self._threads)

    def enqueue(self, reply: Reply) -> None:
        """Have a reply sent. Only if one of its methods has asked for it."""
        self._queue.put(reply)

    def close(self) -> None:
        """Send everything and stop the threads; later updates are sent by the caller's thread."""
        self._updates.put(None)
        self._publisher.join()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._closed = True
        self.publish([], [])  # send replies that were enqueued again while the threads stopped

    def _apply_updates(self) -> None:
        while (update := self._updates.get()) is not None:
            tokens, finals = update
            self.gil.wait_for_engine()
            for reply, piece in tokens:
                if reply.add(piece):
                    self._queue.put(reply)
            for reply, final in finals:
                if reply.finish(final):
                    self._queue.put(reply)

    def _send(self) -> None:
        while (reply := self._queue.get()) is not None:
            self.gil.wait_for_engine()
            while reply.send():
                if not self._queue.empty() and not self._closed:
                    self._queue.put(reply)  # behind the other replies
                    break
                self.gil.wait_for_engine()


class ResponseBuffer:
    """What a step has for clients, until it is published. Reports to the observer at once.

    Args:
        senders: send the responses.
        observer: counts and logs.
    """

    def __init__(self, senders: Senders, observer: Observer) -> None:
        self._senders, self._observer = senders, observer
        self._tokens: list[TokenUpdate] = []
        self._finals: list[FinalUpdate] = []

    def add_token(
        self, request: StreamRequest, generation: GenerationState, text: str | None
    ) -> None:
        """Add the last token of a generation; ``text`` as `GenerationState.append` returns it."""
        assert generation.last_token is not None
        if generation.num_tokens == 1:
            self._observer.first_token(monotonic() - request.request.arrival_time)
        active = request.active
        assert active is not None
        if generation.num_tokens == 1:
            request.reply.prompt_outputs = active.prompt_outputs
        place = None if active.sampling_params.logprobs is None else active.step_outputs
        self._tokens.append((request.reply, (generation.last_token, text, place)))

    def add_tokens(
        self, request: StreamRequest, tokens: Mapping[str, list[int]], *, first: bool
    ) -> None:
        """Add tokens of a schedule by the names of the outputs; ``first`` if it had none before."""
        if first:
            self._observer.first_token(monotonic() - request.request.arrival_time)
        self._tokens.append((request.reply, tokens))

    def add_end(
        self, request: StreamRequest, reason: FinishReason, outputs: Outputs, num_tokens: int
    ) -> None:
        """Add the final response of a schedule.

        Args:
            request: the request.
            reason: why it ended.
            outputs: all but its tokens.
            num_tokens: how many it produced.
        """
        self._observer.generation_finished(
            request.sequence_id, request.request.request_id, reason, num_tokens
        )
        self._finals.append((request.reply, FinalResponse(reason, outputs=outputs)))

    def add_outputs(self, request: StreamRequest, outputs: Outputs) -> None:
        """Add the outputs of a step, its final response."""
        self._finals.append((request.reply, FinalResponse(outputs)))

    def add_finish(
        self, request: StreamRequest, generation: GenerationState, reason: FinishReason
    ) -> None:
        """Add the final response of a generation."""
        self._observer.generation_finished(
            request.sequence_id, request.request.request_id, reason, generation.num_tokens
        )
        try:
            final = FinalResponse(reason, generation.flush_text())
        except TokenizerError as error:
            final = FinalResponse(backend_failure(error))
        self._finals.append((request.reply, final))

    def add_error(self, request: StreamRequest, error: RequestError) -> None:
        """Add an error as the final response."""
        if not request.request.may_succeed_elsewhere(error):
            self._observer.request_refused(
                request.sequence_id, request.request.request_id, error, end=request.request.end
            )
        self._finals.append((request.reply, FinalResponse(error)))

    def flush(self) -> None:
        """Publish everything that was added."""
        if self._tokens or self._finals:
            self._senders.publish(self._tokens, self._finals)
            self._tokens, self._finals = [], []


Watched = TypeVar("Watched")


class CancellationWatcher(Generic[Watched]):
    """Checks every `CANCEL_CHECK_INTERVAL` seconds whether clients have cancelled.

    Args:
        on_cancelled: called on the watcher's thread, once for each cancelled request.
        gil: the thread waits for it before each check.
    """

    def __init__(self, on_cancelled: Callable[[Watched], None], gil: GilPriority) -> None:
        self._on_cancelled, self._gil = on_cancelled, gil
        self._watched: dict[Watched, Reply] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inplace-cancel", daemon=True)
        self._thread.start()

    def add(self, watched: Watched, reply: Reply) -> None:
        """Watch a request until `remove` or until it is cancelled."""
        self._watched[watched] = reply

    def remove(self, watched: Watched) -> None:
        """Stop watching a request, if it is watched."""
        self._watched.pop(watched, None)

    def close(self) -> None:
        """Stop the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        pause = CANCEL_CHECK_INTERVAL
        while not self._closing.wait(pause):
            begin = monotonic()
            for watched, reply in self._watched.copy().items():  # other threads change it
                self._check(watched, reply)
            pause = max(MIN_CANCEL_CHECK_PAUSE, CANCEL_CHECK_INTERVAL - (monotonic() - begin))

    def _check(self, watched: Watched, reply: Reply) -> None:
        self._gil.wait_for_engine()
        try:
            cancelled = reply.is_cancelled()
        except Exception:  # an error of the server; the other requests must still be watched
            log.exception("a request was not asked whether it is cancelled")
            self.remove(watched)
            return
        if cancelled:
            self.remove(watched)
            self._on_cancelled(watched)
