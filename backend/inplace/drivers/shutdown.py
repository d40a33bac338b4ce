"""What becomes of the sequences of a driver when the server stops or the model is unloaded."""

import logging
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from inplace.errors import Code, RequestError

MAX_SILENCE = 0.5
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
