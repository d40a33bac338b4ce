"""Instances without an engine: they read requests and answer clients, and another one computes.

With ``share_engine`` the first instance of a group owns the engine: the weights, the arena and the
sequences of all of them. The others relay: what Triton sends to them goes to the owner
(`inplace.server.peers`), which batches it with its own requests. So the weights are in memory once,
and reading requests and writing responses takes the time of other processes than the owner's.
"""

import logging
import re
import threading
from collections.abc import Iterable, Sequence
from time import monotonic

from inplace.drivers import Arrival
from inplace.drivers.senders import CANCEL_CHECK_INTERVAL
from inplace.errors import RequestError
from inplace.runtime.batcher import Answer
from inplace.runtime.observer import Observer
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceId
from inplace.server.addresses import Address, listening_sockets
from inplace.server.forwarding import (
    AnswerChannel,
    CancellationWatch,
    RemotePlaces,
    RoutedChannel,
    Routes,
)
from inplace.server.peers import LIST_INTERVAL, Peer, PeerLostError

log = logging.getLogger("inplace")


def engine_owner(instance: str) -> str:
    """The instance whose engine an instance uses, where engines are shared: the first of its group.

    Args:
        instance: the name that Triton gives it, ``<group>_<number in the group>``.
    """
    return re.sub(r"_[0-9]+\Z", "_0", instance)


class _Relay:
    """What relays of both kinds of models have: the connection to the owner of the engine.

    Until the first request a thread looks for the owner, so that each instance learns early how the
    others mark their own requests.

    Args:
        owner: where the owner listens; its process may be any.
        observer: of this instance.
    """

    _places: RemotePlaces
    _routes: Routes

    def __init__(self, owner: Address, observer: Observer) -> None:
        self._address, self._observer = owner, observer
        self._peer: Peer | None = None
        self._listed = -LIST_INTERVAL
        self._served = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inplace-relay", daemon=True)

    def start(self, places: RemotePlaces) -> None:
        """Look for the owner from now on.

        Args:
            places: of this instance in Triton.
        """
        self._places, self._routes = places, Routes(places, self._observer)
        places.watch_starts(self._on_foreign_start)
        self._thread.start()

    def hand_over(self) -> None:
        """Nothing: the owner stores the sequences."""

    def end_idle(self, seconds: float) -> None:
        """Nothing: the owner ends its idle sequences."""

    def stop_running(self, error: RequestError) -> None:
        """Answer every request with SHUTDOWN; the owner ends the sequences."""
        if self._peer is not None:
            self._peer.close()

    def close(self) -> None:
        """Close the connection; what the owner has not answered is answered with SHUTDOWN."""
        self._closing.set()
        with self._lock:
            if self._peer is not None:
                self._peer.close()
        self._thread.join()

    def _owner_of_requests(self) -> Peer | None:
        """The owner, for requests that have arrived; None if none listens.

        While the model is loaded again, the owner of before listens still. The new one listens
        before this instance gets its first request, so the list of sockets is read anew then.
        """
        first, self._served = not self._served, True
        return self._owner(refresh=first)

    def _owner(self, *, refresh: bool = False) -> Peer | None:
        """The owner, connected to; None if none listens.

        Args:
            refresh: read the list of sockets, however new it is.
        """
        with self._lock:
            if refresh or self._peer is None or monotonic() - self._listed >= LIST_INTERVAL:
                self._listed = monotonic()
                address = self._address.listener(listening_sockets())
                if address is not None and not self._closing.is_set():
                    self._connect(address)
            return self._peer

    def _connect(self, address: Address) -> None:
        before = self._peer
        if before is not None and before.address == address and not before.closed:
            return
        try:
            self._peer = Peer(address, self, self._places.nonce, relays=True)
        except OSError as error:
            log.warning("the instance that has the engine cannot be reached: %s", error)
            return
        if before is not None:
            before.close()

    def _on_foreign_start(self, sequence_id: SequenceId, nonce: str) -> None:
        """Triton has given this instance the place that another opened for a live sequence."""
        if (peer := self._owner()) is not None:
            self._routes.add(sequence_id, peer)
            peer.watch(sequence_id)

    def _run(self) -> None:
        while not self._closing.wait(CANCEL_CHECK_INTERVAL):
            try:
                self._work()
            except Exception:  # a defect; requests are answered on
                log.exception("a relay failed")

    def _work(self) -> None:
        if self._peer is None:
            self._owner()

    def peer_greeted(self, nonce: str) -> None:
        """Another instance marks its own requests to the model so."""
        self._places.recognize(nonce)

    def peer_started(self, peer: Peer, sequence_id: SequenceId) -> None:
        """A sequence was given a slot."""
        self._routes.add(sequence_id, peer)

    def peer_ended(self, peer: Peer, sequence_id: SequenceId) -> None:
        """A sequence gave its slot back, or was refused one."""
        self._routes.remove(sequence_id, peer)

    def peer_lost(self, peer: Peer) -> None:
        """An owner has ended, with its sequences."""
        self._routes.remove_all(peer)


class StepRelay(_Relay):
    """Has the requests of a step model answered by the owner of the engine."""

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request, in order. Those of one sequence take effect in the order given."""
        peer = self._owner_of_requests()
        if peer is None:
            return [PeerLostError() for _ in requests]
        channels = [AnswerChannel(request.requested_outputs or frozenset()) for request in requests]
        arrivals: list[Arrival] = [
            (request, {}, channel) for request, channel in zip(requests, channels, strict=True)
        ]
        self._routes.forward(peer, arrivals)
        return [channel.result() for channel in channels]


class StreamRelay(_Relay):
    """Has the requests of a stream model answered by the owner of the engine."""

    def __init__(self, owner: Address, observer: Observer) -> None:
        super().__init__(owner, observer)
        self._watch = CancellationWatch()

    def submit(self, arrivals: Iterable[Arrival]) -> None:
        """Forward requests that came together; each is answered through its channel."""
        peer = self._owner_of_requests()
        relayed = [(request, texts, RoutedChannel(channel)) for request, texts, channel in arrivals]
        if peer is None:
            for _, _, channel in relayed:
                channel.send_error(PeerLostError())
            return
        numbers = self._routes.forward(peer, relayed)
        for (_, _, channel), number in zip(relayed, numbers, strict=True):
            self._watch.add(channel, peer, number)

    def _work(self) -> None:
        super()._work()
        self._watch.check()
