"""What another instance of the model answers: routes of sequences, and channels of requests."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from inplace.drivers import Arrival
from inplace.drivers.reply import Channel, Outputs
from inplace.errors import RequestError
from inplace.protocol import FROM
from inplace.runtime.batcher import Answer
from inplace.runtime.observer import Observer
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceId
from inplace.server.peers import Peer, PeerServer

log = logging.getLogger("inplace")


class RemotePlaces(Protocol):
    """Keeps a sequence's place in Triton while another instance has it."""

    @property
    def nonce(self) -> str:
        """Marks the requests of this instance to the model."""

    def recognize(self, nonce: str) -> None:
        """Take the requests that another instance marks so for its own, not for a client's."""

    def watch_starts(self, on_start: Callable[[SequenceId, str], None]) -> None:
        """Call back with sequence and nonce for STARTs by which other instances open places."""

    def moved(self, sequence_id: SequenceId) -> None:
        """Another instance has admitted the sequence."""

    def left(self, sequence_id: SequenceId) -> None:
        """The sequence has ended there."""


class Routes:
    """Which sequences other instances have, of those that Triton sends to this one. Thread-safe.

    Args:
        places: of this instance in Triton.
        observer: of this instance.

    Attributes:
        server: tells the instance without an engine to which Triton sends a sequence.
    """

    def __init__(self, places: RemotePlaces, observer: Observer) -> None:
        self._places, self._observer = places, observer
        self.server: PeerServer | None = None
        self._peers: dict[SequenceId, Peer] = {}
        self._lock = threading.Lock()

    def get(self, sequence_id: SequenceId) -> Peer | None:
        """The instance that has a sequence; None if no other has it."""
        return self._peers.get(sequence_id)

    def source(self, request: Request) -> Peer | None:
        """The other instance that has the sequence which a request copies."""
        source = request.parameters.get(FROM)
        return self._peers.get(source) if isinstance(source, (int, str)) else None

    def add(self, sequence_id: SequenceId, peer: Peer) -> None:
        """An instance has admitted a sequence."""
        with self._lock:
            known = sequence_id in self._peers
            self._peers[sequence_id] = peer
        if not known:
            self._places.moved(sequence_id)
            if self.server is not None:
                self.server.sequence_moved(sequence_id)

    def remove(self, sequence_id: SequenceId, peer: Peer) -> None:
        """A sequence has ended there, or was never admitted."""
        with self._lock:
            if self._peers.get(sequence_id) is not peer:
                return
            del self._peers[sequence_id]
        self._places.left(sequence_id)
        if self.server is not None:
            self.server.sequence_left(sequence_id)

    def remove_all(self, peer: Peer) -> None:
        """An instance has ended, with all of its sequences."""
        lost = [each for each, having in self._peers.copy().items() if having is peer]
        for sequence_id in lost:
            self.remove(sequence_id, peer)
        if lost:
            log.warning("another instance of the model has ended, with %d sequences", len(lost))

    def forward(self, peer: Peer, arrivals: Sequence[Arrival]) -> list[int]:
        """Forward requests that came together, and count them; returns a number for each."""
        self._observer.request_forwarded(len(arrivals))
        return peer.forward(arrivals)


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
