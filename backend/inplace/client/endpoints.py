"""The servers a client may talk to, and which of them to choose."""

import threading
from collections.abc import Callable, Sequence
from itertools import count
from time import monotonic

AVOIDED = 5.0
"""Seconds for which a server that did not answer is asked only if every other one did not answer either."""


class Endpoints:
    """A list of servers that serve the same models. Thread-safe.

    Args:
        urls: ``host:port`` of each server's gRPC endpoint.
        clock: monotonic seconds.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = monotonic) -> None:
        if not urls:
            raise ValueError("a client needs at least one server: give its host:port")
        self.urls = tuple(urls)
        self._clock = clock
        self._failed = [float("-inf")] * len(urls)
        self._turn = count()
        self._lock = threading.Lock()

    def choose(self, other_than: str | None = None) -> str:
        """The server for a sequence that begins: each in turn, but those last that failed of late.

        Args:
            other_than: come back to this one only where there is no better one (it had no free slot, or was lost).
        """
        with self._lock:
            turn, now = next(self._turn), self._clock()

        def rank(index: int) -> tuple[float, bool, int]:
            failed = self._failed[index]
            recent = (
                failed if now - failed < AVOIDED else float("-inf")
            )  # of those that failed, the one that failed first
            return recent, self.urls[index] == other_than, (index - turn) % len(self.urls)

        return self.urls[min(range(len(self.urls)), key=rank)]

    def failed(self, url: str) -> None:
        """It did not answer."""
        self._failed[self.urls.index(url)] = self._clock()
