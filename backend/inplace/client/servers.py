"""The servers of a client: which one a sequence goes to, and how often a request is sent again."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from time import monotonic
from typing import Any

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from inplace.client.errors import ClientError

log = logging.getLogger("inplace.client")


COOLDOWN = 5.0
"""Seconds for which a server that did not answer is the last choice."""


class ServerList:
    """Servers that serve the same models. Thread-safe.

    Args:
        urls: ``host:port`` of each server's gRPC endpoint.
        clock: monotonic seconds.

    Raises:
        ValueError: there is no server.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = monotonic) -> None:
        if not urls:
            raise ValueError("a client needs at least one server: give its host:port")
        self.urls = tuple(urls)
        self._clock = clock
        self._failed_at = [float("-inf")] * len(urls)
        self._round_robin = count()
        self._lock = threading.Lock()

    def choose(self, avoid: str | None = None) -> str:
        """The server for a new sequence: round-robin, with servers that failed recently last.

        Args:
            avoid: a server without a free slot, or one that lost the sequence; chosen only where no
                other server is better.
        """
        with self._lock:
            first, now = next(self._round_robin), self._clock()

        def rank(index: int) -> tuple[float, bool, int]:
            failed_at = self._failed_at[index]
            # of several servers that failed recently, the one that failed first is chosen
            recent = failed_at if now - failed_at < COOLDOWN else float("-inf")
            return recent, self.urls[index] == avoid, (index - first) % len(self.urls)

        return self.urls[min(range(len(self.urls)), key=rank)]

    def mark_failed(self, url: str) -> None:
        """Record that a server did not answer."""
        self._failed_at[self.urls.index(url)] = self._clock()


@dataclass(frozen=True)
class Retry:
    """When a request with a ``retryable`` error is sent again: random exponential back-off.

    Attributes:
        attempts: maximum number of tries, the first one included. Each response of a generation
            begins a new count.
        timeout: seconds after which no further try begins.
        initial_delay: maximum delay before the second try, in seconds; doubled for each further
            one.
        max_delay: maximum delay before any try, in seconds.
    """

    attempts: int = 12
    timeout: float = 60.0
    initial_delay: float = 0.05
    max_delay: float = 5.0

    def since(self, begin: float) -> "Retry":
        """The same for a request whose first try began at that ``time.monotonic()``."""
        return replace(self, timeout=max(0.0, self.timeout - (monotonic() - begin)))

    def retrying(self) -> Retrying:
        """The tries of one request of a synchronous client."""
        return Retrying(**self._tenacity_options())

    def async_retrying(self) -> AsyncRetrying:
        """The tries of one request of an asyncio client."""
        return AsyncRetrying(**self._tenacity_options())

    def _tenacity_options(self) -> dict[str, Any]:
        return {
            "stop": stop_after_attempt(self.attempts) | stop_after_delay(self.timeout),
            "wait": wait_random_exponential(multiplier=self.initial_delay, max=self.max_delay),
            "retry": retry_if_exception(
                lambda error: isinstance(error, ClientError) and error.retryable
            ),
            "before_sleep": _log_failure,
            "reraise": True,
        }


NO_RETRY = Retry(attempts=1)
"""Nothing is sent again."""


def _log_failure(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.info(
        "try %d failed, the next in %.2f s: %s", state.attempt_number, state.upcoming_sleep, error
    )
