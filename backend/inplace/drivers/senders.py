"""Threads beside the engine's: they send what is to be said, and ask whether anybody still listens."""

import logging
import queue
import threading
from collections.abc import Callable
from time import monotonic, sleep
from typing import Generic, TypeVar

from inplace.drivers.reply import Last, Reply

Told = tuple[list[tuple[Reply, int, str | None]], list[tuple[Reply, Last]]]

THREADS = 4
"""Sending waits for the server: 105 to 175 µs a response from one thread, 62 from four (2 cores)."""
LONGEST_REST = 0.001
"""Seconds that a thread rests at most before it sends more tokens: as long as sending took. Senders that never rest keep the interpreter
from the engine's thread, and tokens that wait meanwhile go with the next response."""
PERIOD = 0.03
"""Seconds between two questions whether a client is still there."""
LEAST_PAUSE = 0.005

Watched = TypeVar("Watched")

log = logging.getLogger("inplace")


class Senders:
    """Sends replies, fairly: each in its turn all that it has. What is told goes through a thread first, so that telling costs little."""

    def __init__(self, threads: int = THREADS) -> None:
        self._told: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
        self._queue: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._teller = threading.Thread(target=self._tell, name="inplace-tell", daemon=True)
        self._threads = [threading.Thread(target=self._send, name=f"inplace-send-{index}", daemon=True) for index in range(threads)]
        self._closed = False
        for thread in (self._teller, *self._threads):
            thread.start()

    def tell(self, said: list[tuple[Reply, int, str | None]], finished: list[tuple[Reply, Last]]) -> None:
        """Add tokens, with the text that each adds (see `Reply.say`), and then how replies end; in the order of the calls."""
        self._told.put((said, finished))
        if self._closed:
            self._told.put(None)
            self._tell()
            self._queue.put(None)
            self._send()

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
            for reply, token, text in said:
                if reply.say(token, text):
                    self._queue.put(reply)
            for reply, last in finished:
                if reply.finish(last):
                    self._queue.put(reply)

    def _send(self) -> None:
        while (reply := self._queue.get()) is not None:
            begin = monotonic()
            more = reply.send()
            busy = not self._queue.empty() and not self._closed
            if busy and not reply.done:
                sleep(min(monotonic() - begin, LONGEST_REST))
            while more:
                if busy:
                    self._queue.put(reply)  # the others first
                    break
                more = reply.send()


class CancelWatch(Generic[Watched]):
    """Asks each reply every `PERIOD` seconds whether its client has cancelled.

    Args:
        cancelled: called, on this thread, with what was watched; once each.
    """

    def __init__(self, cancelled: Callable[[Watched], None]) -> None:
        self._cancelled = cancelled
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
