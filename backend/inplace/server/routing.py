"""Sequences over the instances of a model: each belongs to one, whichever Triton sends it to.

Triton leaves a sequence with the instance that it chose at START. That one sends a new sequence to
the instance with most free slots (`inplace.server.balance`); a START that cannot be admitted there
is offered to the others. Requests of a sequence that another instance has admitted are forwarded to
it.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic

from torch import Tensor

from inplace.drivers import Arrival, StepDriver, StreamDriver
from inplace.drivers.reply import Outputs
from inplace.drivers.senders import CANCEL_CHECK_INTERVAL
from inplace.errors import Code, RequestError, backend_failure
from inplace.protocol import FROM
from inplace.runtime.batcher import Answer
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.runtime.slots import EndReason, SequenceId, SequenceState
from inplace.schema.prefixes import prefix_blocks
from inplace.server.addresses import Address
from inplace.server.balance import MUCH_FULLER, NEARLY, Balance
from inplace.server.forwarding import (
    AnswerChannel,
    CancellationWatch,
    RemotePlaces,
    RoutedChannel,
    Routes,
)
from inplace.server.peers import Peer, PeerLostError, Peers, PeerServer

log = logging.getLogger("inplace")


Texts = Mapping[str, tuple[bytes, ...]]
"""Inputs of BYTES by name."""


NO_TEXTS: Texts = {}


class _Router:
    """What routers of both kinds of models have: the connections, and what comes over them.

    Args:
        instance: of the driver.
        address: of this instance.
        places: of this instance in Triton.
        serve: serves requests that other instances forward.
        serve_relayed: serves requests of instances that have no engine.
        part: of the slots, by which instances must differ (`inplace.server.balance`).
    """

    def __init__(
        self,
        instance: ModelInstance,
        address: Address,
        places: RemotePlaces,
        serve: Callable[[list[Arrival]], None],
        serve_relayed: Callable[[list[Arrival]], None],
        part: int,
    ) -> None:
        self._table, self._observer, self._places = instance.table, instance.observer, places
        self._instance, self._balance = instance, Balance(instance.table, part)
        if instance.prefixes is not None:
            instance.prefixes.on_tokens = self._balance.board.add
        self._routes = Routes(places, self._observer)
        self._peers = Peers(address, self, places.nonce)
        self._server = self._routes.server = PeerServer(
            address,
            serve,
            serve_relayed,
            self._is_served,
            places.nonce,
            self._balance.board,
            self._on_greeting,
        )
        self._observer.forward_to(self._server)
        self._observer.forward_to(self)
        places.watch_starts(self._on_foreign_start)
        self._server.start()
        self._peers.refresh()

    def _is_live(self, sequence_id: SequenceId) -> bool:
        return self._table.get(sequence_id) is not None

    def _is_served(self, sequence_id: SequenceId) -> bool:
        return self._is_live(sequence_id) or self._routes.get(sequence_id) is not None

    def _destination(self, request: Request, texts: Texts = NO_TEXTS) -> Peer | None:
        """Where a START is sent first, if no other instance has its sequence; None is here.

        A copy goes to the original, and what begins empty to the instance with most free slots, or
        to one that has the beginning of its prompt. The others may continue a sequence, which this
        instance may have.
        """
        if FROM in request.parameters:
            return self._routes.source(request)
        if not request.begins_empty or self._is_live(request.sequence_id):
            return None
        peers = self._peers.connected()
        return self._balance.choose(peers, self._blocks(request, texts) if peers else ())

    def _most_free(self) -> Peer | None:
        return self._balance.choose(self._peers.connected())

    def _blocks(self, request: Request, texts: Texts) -> list[bytes]:
        """The blocks of a prompt by which another instance may know it."""
        prefixes, io = self._instance.prefixes, self._instance.program.decoder_io
        if prefixes is None or io is None:
            return []
        try:
            salt = prefixes.salt(request.key_digest(), request.cache_salt())
            prompt = self._prompt(request, texts).get(io[0])
        except RequestError:  # it is refused
            return []
        if salt is None or prompt is None or prompt.is_floating_point():
            return []
        return list(prefix_blocks(salt, prompt.flatten().tolist()))

    def _prompt(self, request: Request, texts: Texts) -> Mapping[str, Tensor]:
        """The inputs of a START, with the tokens of its text."""
        return request.inputs

    def sequence_started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot here."""
        self._balance.publish()

    def sequence_ended(self, sequence: SequenceState, reason: EndReason) -> None:
        """A sequence gave its slot back here."""
        self._balance.publish()

    def _on_greeting(self, nonce: str) -> None:
        """Another instance has connected, which may have begun later than this one."""
        self._places.recognize(nonce)
        self._peers.refresh()

    def _on_foreign_start(self, sequence_id: SequenceId, nonce: str) -> None:
        """Triton has given this instance the place that another opened for a live sequence."""
        for peer in self._peers.all():
            if nonce in peer.nonces and not self._is_live(sequence_id):
                self._routes.add(sequence_id, peer)
                peer.watch(sequence_id)

    def peer_greeted(self, nonce: str) -> None:
        """Another instance marks its own requests to the model so."""
        self._places.recognize(nonce)
        self._server.learn(nonce)

    def peer_started(self, peer: Peer, sequence_id: SequenceId) -> None:
        """A sequence was given a slot there."""
        self._routes.add(sequence_id, peer)

    def peer_ended(self, peer: Peer, sequence_id: SequenceId) -> None:
        """A sequence gave its slot back, or was refused one."""
        self._routes.remove(sequence_id, peer)

    def peer_lost(self, peer: Peer) -> None:
        """The instance has ended."""
        self._routes.remove_all(peer)


def final_error(
    request: Request,
    errors: Sequence[tuple[Peer | None, RequestError]],
    most_free: Peer | None,
) -> tuple[Peer | None, bool]:
    """Where a START belongs that every instance has declined.

    Args:
        request: the START.
        errors: of every instance, this one (None) first.
        most_free: the instance with most free slots.

    Returns:
        The instance, and whether the START may be admitted there after all: it may wait for a slot,
        or its sequence comes from the store of snapshots.
    """
    if request.asks_to_restore:
        return most_free, True
    for peer, error in errors:
        if error.code is Code.NO_FREE_SLOT:
            return peer, True
    return None, False


# Step models


class StepRouter(_Router):
    """Answers the requests of a step model, here or in another instance.

    Args:
        driver: of this instance.
        address: of this instance.
        places: of this instance in Triton.
    """

    def __init__(self, driver: StepDriver, address: Address, places: RemotePlaces) -> None:
        self._driver = driver
        super().__init__(
            driver.instance,
            address,
            places,
            partial(_answer, driver.run),
            partial(_answer, self.run),
            MUCH_FULLER,
        )

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request, in order. Those of one sequence take effect in the order given."""
        answers: list[Answer] = []
        for batch in self._split(requests):
            answers += self._run(batch)
        return answers

    def close(self) -> None:
        """Close the connections to the other instances. The driver is closed before."""
        self._server.close()
        self._peers.close()

    @staticmethod
    def _split(requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Batches in which no request comes after a START of its sequence.

        Where a sequence lives is known only after the answer to its START.
        """
        batch: list[Request] = []
        started: set[SequenceId] = set()
        for request in requests:
            if request.sequence_id in started:
                yield batch
                batch, started = [], set()
            batch.append(request)
            if request.start:
                started.add(request.sequence_id)
        yield batch

    def _run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests; forwarded ones run beside those of this instance."""
        try:
            answers = self._run_where_they_belong(requests)
        finally:
            for request in requests:
                self._balance.forget(id(request))
        return [answers[index] for index in range(len(requests))]

    def _run_where_they_belong(self, requests: Sequence[Request]) -> dict[int, Answer]:
        """The answers by the index of the request."""
        here: list[tuple[int, Request]] = []
        waits: dict[int, tuple[Peer, AnswerChannel]] = {}
        for index, request in enumerate(requests):
            asked = replace(request, offered=True) if request.start else request
            peer = self._routes.get(request.sequence_id)
            if request.start:
                peer = peer or self._destination(request)
                self._balance.send(id(request), peer)
            if peer is None:
                here.append((index, asked))
            else:
                waits[index] = peer, self._send(peer, asked)
        answers: dict[int, Answer] = {}
        run = self._driver.run([request for _, request in here])
        for (index, request), answer in zip(here, run, strict=True):
            self._balance.forget(id(requests[index]))
            answers[index] = self._or_elsewhere(request, None, answer)
        for index, (peer, channel) in waits.items():
            answer = channel.result()
            request = requests[index]
            self._balance.forget(id(request))
            if request.start:
                answer = self._or_elsewhere(replace(request, offered=True), peer, answer)
            answers[index] = answer
        return answers

    def _send(self, peer: Peer, request: Request) -> AnswerChannel:
        channel = AnswerChannel(request.requested_outputs or frozenset())
        self._routes.forward(peer, [(request, {}, channel)])
        return channel

    def _or_elsewhere(self, request: Request, asked: Peer | None, answer: Answer) -> Answer:
        """The answer; or, if another instance might admit the request, that one's."""
        errors: list[tuple[Peer | None, RequestError]] = []
        targets = itertools.chain([asked], self._untried(asked))
        for target in targets:
            if target is not asked:
                answer = self._ask(target, request)
            declined = isinstance(answer, RequestError) and _declines(request, answer)
            if not declined:
                if target is not None and not isinstance(answer, RequestError):
                    self._confirm(request, target)
                return answer
            assert isinstance(answer, RequestError)
            errors.append((target, answer))
        errors.sort(key=lambda each: each[0] is not None)
        target, is_full = final_error(request, errors, self._most_free())
        return self._ask(target, replace(request, offered=False)) if is_full else errors[0][1]

    def _untried(self, asked: Peer | None) -> Iterator[Peer | None]:
        """The other instances; made when the first has declined."""
        if asked is not None:
            yield None
        yield from (peer for peer in self._peers.all() if peer is not asked)

    def _ask(self, target: Peer | None, request: Request) -> Answer:
        if target is None:
            return self._driver.run([request])[0]
        return self._send(target, request).result()

    def _confirm(self, request: Request, peer: Peer) -> None:
        """A START without a new sequence continues one that the instance has."""
        if not request.end and request.continues_sequence:
            self._routes.add(request.sequence_id, peer)


def _answer(run: Callable[[Sequence[Request]], list[Answer]], arrivals: Sequence[Arrival]) -> None:
    """Answer requests that another instance has forwarded."""
    try:
        answers = run([request for request, _, _ in arrivals])
    except Exception as error:  # a defect; the other instance waits for answers
        log.exception("forwarded requests failed")
        answers = [backend_failure(error)] * len(arrivals)
    for (_, _, channel), answer in zip(arrivals, answers, strict=True):
        if isinstance(answer, RequestError):
            channel.send_error(answer)
        else:
            channel.send(answer, final=True)


def _declines(request: Request, error: RequestError) -> bool:
    return request.may_succeed_elsewhere(error) or isinstance(error, PeerLostError)


# Stream models


@dataclass(eq=False)
class _Offer:
    """A START until an instance has admitted or refused it.

    Attributes:
        arrival: the request.
        channel: its client's.
        target: the instance that has it now; None for this one.
        errors: why others have declined it.
        settled: it was admitted, or is refused by all.
        queued: later requests of its sequence, which follow it.
    """

    arrival: Arrival
    channel: RoutedChannel
    target: Peer | None
    errors: list[tuple[Peer | None, RequestError]] = field(default_factory=list)
    settled: bool = False
    queued: list[Arrival] = field(default_factory=list)

    @property
    def request(self) -> Request:
        """The client's request."""
        return self.arrival[0]


class _OfferChannel:
    """The channel of an offer: an error that another instance might not share is kept back."""

    def __init__(self, router: "StreamRouter", offer: _Offer) -> None:
        self._router, self._offer = router, offer
        self.requested_outputs = offer.channel.requested_outputs

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Send a response: an instance has the request."""
        self._router.settle(self._offer)
        self._offer.channel.send(outputs, final=final)

    def send_error(self, error: RequestError) -> None:
        """Send an error as the final response, or offer the request to the next instance."""
        offer = self._offer
        if not offer.settled and _declines(replace(offer.request, offered=True), error):
            self._router.decline(offer, error)
            return
        self._router.settle(offer, refused=True)
        offer.channel.send_error(error)

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled; False after the final response."""
        return self._offer.channel.is_cancelled()


class StreamRouter(_Router):
    """Passes the requests of a stream model to this instance's driver, or to another instance.

    A thread offers declined requests to the next instance and checks whether the clients of
    forwarded ones have cancelled.

    Args:
        driver: of this instance.
        address: of this instance.
        places: of this instance in Triton.
    """

    def __init__(self, driver: StreamDriver, address: Address, places: RemotePlaces) -> None:
        self._driver = driver
        self._offers: dict[SequenceId, _Offer] = {}
        self._watch = CancellationWatch()
        self._lock = threading.RLock()
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        super().__init__(driver.instance, address, places, driver.submit, self.submit, NEARLY)
        self._thread = threading.Thread(target=self._run, name="inplace-route", daemon=True)
        self._thread.start()

    def submit(self, arrivals: Iterable[Arrival]) -> None:
        """Queue requests that came together; each is answered through its channel."""
        routed = (self._route(each) for each in arrivals)
        self._driver.submit(each for each in routed if each is not None)

    def close(self) -> None:
        """Close the connections; what others have of ours is answered with SHUTDOWN.

        The driver is closed before: it has answered what this instance had.
        """
        self._server.close()
        self._peers.close()
        self._events.put(None)
        self._thread.join()

    def _prompt(self, request: Request, texts: Texts) -> Mapping[str, Tensor]:
        return self._driver.tokenize(request, texts).inputs

    def _route(self, arrival: Arrival) -> Arrival | None:
        """Hold, forward or offer a request; returns what this instance's driver gets of it."""
        request, texts, channel = arrival
        with self._lock:
            if (offer := self._offers.get(request.sequence_id)) is not None:
                offer.queued.append(arrival)
                return None
            peer = self._routes.get(request.sequence_id)
            if not request.start:
                if peer is None:
                    return arrival
                self._forward(peer, request, arrival, RoutedChannel(channel))
                return None
            if peer is None:
                peer = self._destination(request, texts)
            offer = _Offer(arrival, RoutedChannel(channel), peer)
            self._offers[request.sequence_id] = offer
            self._balance.send(offer, peer)
            offered = replace(request, offered=True), texts, _OfferChannel(self, offer)
            if peer is None:
                return offered
            self._forward_offer(peer, offer, offered)
            return None

    def _forward(
        self, peer: Peer, request: Request, arrival: Arrival, channel: RoutedChannel
    ) -> None:
        [number] = self._routes.forward(peer, [(request, arrival[1], channel)])
        self._watch_cancelled(channel, peer, number)

    def _forward_offer(self, peer: Peer, offer: _Offer, offered: Arrival) -> None:
        offer.target = peer
        [number] = self._routes.forward(peer, [offered])
        self._watch_cancelled(offer.channel, peer, number)

    def _watch_cancelled(self, channel: RoutedChannel, peer: Peer, number: int) -> None:
        self._watch.add(channel, peer, number)
        self._events.put(_nothing)  # the thread checks from now on

    # Offers. They are called on threads of drivers and connections, and act on our own.

    def settle(self, offer: _Offer, *, refused: bool = False) -> None:
        """An instance has a START, or refuses it for good: queued requests may follow."""
        if offer.settled:
            return
        offer.settled = True
        self._balance.forget(offer)
        request, peer = offer.request, offer.target
        if peer is not None and not refused and request.continues_sequence:
            self._routes.add(request.sequence_id, peer)  # it gets no new slot there
        self._events.put(lambda: self._follow(offer))

    def decline(self, offer: _Offer, error: RequestError) -> None:
        """An instance cannot admit a START."""
        offer.errors.append((offer.target, error))
        self._events.put(lambda: self._offer_next(offer))

    def _offer_next(self, offer: _Offer) -> None:
        request, texts, _ = offer.arrival
        channel = _OfferChannel(self, offer)
        tried = [peer for peer, _ in offer.errors]
        if None not in tried:
            offer.target = None
            self._balance.send(offer, None)
            self._driver.submit([(replace(request, offered=True), texts, channel)])
            return
        for peer in self._peers.all():
            if peer not in tried:
                with self._lock:
                    arrival = replace(request, offered=True), texts, channel
                    self._balance.send(offer, peer)
                    self._forward_offer(peer, offer, arrival)
                return
        errors = sorted(offer.errors, key=lambda each: each[0] is not None)
        target, is_full = final_error(request, errors, self._most_free())
        if not is_full:
            error = errors[0][1]
            self._observer.request_refused(
                request.sequence_id, request.request_id, error, end=request.end
            )
            self.settle(offer, refused=True)
            offer.channel.send_error(error)
            return
        offer.target, offer.settled = target, True
        self._balance.forget(offer)
        if target is None:
            self._driver.submit([(request, texts, offer.channel)])
        else:
            self._routes.add(request.sequence_id, target)  # until it is refused there
            self._forward(target, request, offer.arrival, offer.channel)
        self._follow(offer)

    def _follow(self, offer: _Offer) -> None:
        """Route the requests that are queued behind a START."""
        sequence_id = offer.request.sequence_id
        while True:
            with self._lock:
                if self._offers.get(sequence_id) is not offer:
                    return  # it was settled twice, at the same time
                if not offer.queued:
                    del self._offers[sequence_id]
                    return
                arrival = offer.queued.pop(0)
                if arrival[0].start:
                    del self._offers[sequence_id]
                routed = self._route_queued(arrival)
                if (following := self._offers[sequence_id]) is not offer:
                    following.queued += offer.queued
            if routed is not None:
                self._driver.submit([routed])
            if following is not offer:
                return

    def _route_queued(self, arrival: Arrival) -> Arrival | None:
        """Route a request of a sequence whose START is settled."""
        request, _, channel = arrival
        if request.start:
            return self._route(arrival)
        peer = self._routes.get(request.sequence_id)
        if peer is None:
            return arrival
        self._forward(peer, request, arrival, RoutedChannel(channel))
        return None

    # Events

    def sequence_started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot here."""
        super().sequence_started(sequence)
        offer = self._offers.get(sequence.id)
        if offer is not None and offer.target is None:
            self.settle(offer)

    def peer_started(self, peer: Peer, sequence_id: SequenceId) -> None:
        """A sequence was given a slot there."""
        super().peer_started(peer, sequence_id)
        offer = self._offers.get(sequence_id)
        if offer is not None and offer.target is peer:
            self.settle(offer)

    # The thread

    def _run(self) -> None:
        next_check = 0.0
        while True:
            try:
                event = self._events.get(timeout=CANCEL_CHECK_INTERVAL if self._watch else None)
                if event is None:
                    return
                event()
            except queue.Empty:
                pass
            except Exception:  # a defect; the other requests go on
                log.exception("a request could not be offered to another instance")
            if monotonic() >= next_check:
                next_check = monotonic() + CANCEL_CHECK_INTERVAL
                self._watch.check()


def _nothing() -> None:
    """Wake the thread."""
