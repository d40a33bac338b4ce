"""Threads beside the engine's: they send what is to be said, and ask whether anybody still listens."""

import queue
import threading
from collections.abc import Callable
from time import monotonic
from typing import Generic, TypeVar

from inplace.drivers.reply import Reply

THREADS = 2
"""More send no faster beside an engine whose thread needs the interpreter too."""
PERIOD = 0.03
"""Seconds between two questions whether a client is still there."""
LEAST_PAUSE = 0.005

Watched = TypeVar("Watched")


class Senders:
    """Sends replies, fairly: each in its turn all that it has."""

    def __init__(self, threads: int = THREADS) -> None:
        self._queue: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"inplace-send-{index}", daemon=True) for index in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, reply: Reply) -> None:
        """Send this reply; the caller got its turn from `Reply.say` or `Reply.finish`. After `close` it is sent at once."""
        if not self._closed:
            self._queue.put(reply)
            return
        while reply.send():
            pass

    def close(self) -> None:
        """Send what is queued and end the threads."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._closed = True
        while not self._queue.empty():  # queued again while the threads ended
            if (reply := self._queue.get()) is not None:
                self.put(reply)

    def _run(self) -> None:
        while (reply := self._queue.get()) is not None:
            if reply.send():
                self._queue.put(reply)


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
            for watched, reply in list(self._watched.items()):
                if reply.cancelled():
                    self.remove(watched)
                    self._cancelled(watched)
            pause = max(LEAST_PAUSE, PERIOD - (monotonic() - begin))
