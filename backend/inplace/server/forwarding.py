"""Channels of requests that another instance of the model answers."""

import logging
import queue
import threading

from inplace.drivers.reply import Channel, Outputs
from inplace.errors import RequestError
from inplace.runtime.batcher import Answer
from inplace.server.peers import Peer

log = logging.getLogger("inplace")


class AnswerChannel:
    """The channel of a forwarded step; `result` waits for its answer."""

    def __init__(self, requested_outputs: frozenset[str]) -> None:
        self.requested_outputs = requested_outputs
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Take the answer."""
        self._answers.put(dict(outputs))

    def send_error(self, error: RequestError) -> None:
        """Take the error."""
        self._answers.put(error)

    def is_cancelled(self) -> bool:
        """Never: a step that runs is not stopped."""
        return False

    def result(self) -> Answer:
        """Wait for the answer, or for the end of the instance."""
        return self._answers.get()


class RoutedChannel:
    """A client's channel that is asked for cancellation only before its final response.

    A request that another instance answers is not asked by that one's reply.
    """

    def __init__(self, channel: Channel) -> None:
        self.requested_outputs = channel.requested_outputs
        self._channel, self._lock, self._finished = channel, threading.Lock(), False

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Send a response."""
        with self._lock:
            self._finished |= final
            self._channel.send(outputs, final=final)

    def send_error(self, error: RequestError) -> None:
        """Send an error as the final response."""
        with self._lock:
            self._finished = True
            self._channel.send_error(error)

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled; False after the final response."""
        with self._lock:
            return not self._finished and self._channel.is_cancelled()

    @property
    def finished(self) -> bool:
        """Whether the final response was sent."""
        return self._finished


class CancellationWatch:
    """Forwarded requests whose clients are asked whether they have cancelled. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forwarded: list[tuple[RoutedChannel, Peer, int]] = []

    def __len__(self) -> int:
        return len(self._forwarded)

    def add(self, channel: RoutedChannel, peer: Peer, number: int) -> None:
        """Ask from now on, until the final response."""
        with self._lock:
            self._forwarded.append((channel, peer, number))

    def check(self) -> None:
        """Ask all clients, and cancel the requests of those that have."""
        with self._lock:
            forwarded, self._forwarded = self._forwarded, []
        for channel, peer, number in forwarded:
            try:
                cancelled = channel.is_cancelled()
            except Exception:  # an error of the server
                log.exception("a request was not asked whether it is cancelled")
                continue
            if cancelled:
                peer.cancel(number)
            elif not channel.finished:
                self.add(channel, peer, number)
