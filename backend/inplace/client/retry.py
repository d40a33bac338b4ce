"""How often a request is tried again, and how long to wait before."""

import logging
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Retry:
    """A policy. Only errors that say ``retryable`` are tried again, after a random time that doubles on average.

    Attributes:
        attempts: tries of one request, the first one included; a response that arrives begins a new count.
        limit: seconds after which no further try is begun.
        first: seconds of the longest pause before the second try.
        longest: seconds of the longest pause.
    """

    attempts: int = 12
    limit: float = 60.0
    first: float = 0.05
    longest: float = 5.0

    def retrying(self) -> Retrying:
        """For one request of a synchronous client."""
        return Retrying(**self._options())

    def retrying_async(self) -> AsyncRetrying:
        """For one request of an asyncio client."""
        return AsyncRetrying(**self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "stop": stop_after_attempt(self.attempts) | stop_after_delay(self.limit),
            "wait": wait_random_exponential(multiplier=self.first, max=self.longest),
            "retry": retry_if_exception(
                lambda error: isinstance(error, ClientError) and error.retryable
            ),
            "before_sleep": _tell,
            "reraise": True,
        }


ONCE = Retry(attempts=1)
"""Nothing is tried again."""


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.info(
        "try %d failed, the next in %.2f s: %s", state.attempt_number, state.upcoming_sleep, error
    )
