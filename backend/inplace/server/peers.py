"""Connections between the instances of one model, which are processes of one server.

Only children of the same server are spoken to (`inplace.server.addresses`). What passes over a
connection is in `inplace.server.frames`; the first byte carries the memory that says how many slots
are free there (`inplace.server.balance`).
"""

import contextlib
import itertools
import logging
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any, Protocol

from torch import Tensor

from inplace.drivers import Arrival
from inplace.drivers.reply import Channel, Outputs
from inplace.drivers.shutdown import unloading
from inplace.errors import Code, RequestError
from inplace.runtime.slots import EndReason, SequenceId, SequenceState
from inplace.server.addresses import Address, is_child_of, listening_sockets, newest
from inplace.server.balance import SlotBoard, SlotReader
from inplace.server.frames import (
    Frame,
    decode,
    encode,
    error_fields,
    read_error,
    read_request,
    read_texts,
    request_frame,
)

LIST_INTERVAL = 0.25
"""Seconds for which a list of the other instances is used."""


CONNECT_TIMEOUT = 1.0
"""Seconds within which another instance must accept a connection."""


CLOSE_TIMEOUT = 1.0
"""Seconds that a thread of a connection is waited for when the model is unloaded."""


NOT_KNOWN = -(1 << 31)
"""Free slots of an instance that has not reported them yet."""


RECEIVE_BYTES = 1 << 20
"""Bytes read from a socket at once."""


log = logging.getLogger("inplace")


class PeerLostError(RequestError):
    """The instance that was to answer has ended."""

    def __init__(self) -> None:
        super().__init__(
            Code.ENGINE_FAILED,
            "the instance of the model that had this sequence has ended; START again",
        )


class Connection:
    """Sends and receives frames, on two threads. Thread-safe.

    Args:
        connected: the socket.
        on_frames: called with the frames that have arrived together, in order.
        on_closed: called once, when the other end has gone or `close` was called.
        prepare: receives what comes before the frames.
    """

    def __init__(
        self,
        connected: socket.socket,
        on_frames: "Callable[[Connection, list[Frame]], None]",
        on_closed: "Callable[[Connection], None]",
        prepare: Callable[[socket.socket], None] = lambda _: None,
    ) -> None:
        self._socket, self._on_frames, self._on_closed = connected, on_frames, on_closed
        self._prepare = prepare
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._receiver, self._writer = (
            threading.Thread(target=target, name="inplace-peer", daemon=True)
            for target in (self._receive, self._write)
        )
        self._receiver.start()
        self._writer.start()

    def send(self, frame: bytes) -> None:
        """Send a frame soon; nothing happens if the other end has gone."""
        self._outgoing.put(frame)

    def finish(self) -> None:
        """Send what is to be sent, then close the connection."""
        self._outgoing.put(None)
        self._writer.join(CLOSE_TIMEOUT)

    def close(self) -> None:
        """Close the connection at once; both ends notice."""
        self._shut_down()
        self._receiver.join(CLOSE_TIMEOUT)

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def _receive(self) -> None:
        received = bytearray()
        try:
            self._prepare(self._socket)
            while chunk := self._socket.recv(RECEIVE_BYTES):
                received += chunk
                if frames := decode(received):
                    self._on_frames(self, frames)
        except OSError:
            pass
        except Exception:  # a defect: without answers, both ends would wait
            log.exception("a connection between instances failed")
        self._shut_down()
        self._outgoing.put(None)
        self._on_closed(self)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the other end has gone; `_receive` notices
            while (frame := self._outgoing.get()) is not None:
                self._socket.sendall(frame)
        self._shut_down()


class PeerEvents(Protocol):
    """Learns what another instance does with the sequences that it was given."""

    def peer_greeted(self, nonce: str) -> None:
        """Another instance marks its own requests to the model so; it may not be the peer."""

    def peer_started(self, peer: "Peer", sequence_id: SequenceId) -> None:
        """A sequence was given a slot there."""

    def peer_ended(self, peer: "Peer", sequence_id: SequenceId) -> None:
        """A sequence gave its slot back, or was refused one."""

    def peer_lost(self, peer: "Peer") -> None:
        """The instance has ended, after all requests to it were answered with an error."""


class Peer:
    """Another instance of the model, to which requests are forwarded.

    Args:
        address: where it listens.
        events: learns of its sequences.
        nonce: marks this instance's own requests to the model.
        relays: whether this instance has no engine and forwards all of its requests there.

    Attributes:
        nonces: mark the requests to the model of the other one, and of instances that relay to it.
        closed: the connection has ended.

    Raises:
        OSError: it cannot be connected to, or is not a process of this server.
    """

    def __init__(
        self, address: Address, events: PeerEvents, nonce: str, *, relays: bool = False
    ) -> None:
        self.address, self._events = address, events
        self.nonces: set[str] = set()
        self._numbers = itertools.count()
        self._pending: dict[int, Channel] = {}
        self._lock = threading.Lock()
        self.closed, self._unloading = False, False
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(CONNECT_TIMEOUT)
            connected.connect(f"\0{address.name}")
            if not is_child_of(address.server, connected):
                raise ConnectionRefusedError(f"{address.name} is not a process of this server")
            connected.settimeout(None)
        except OSError:
            connected.close()
            raise
        self._slots: SlotReader | None = None
        self._connection = Connection(
            connected, self._on_frames, self._on_closed, self._receive_memory
        )
        self._connection.send(encode({"type": "hello", "nonce": nonce, "relays": relays}, {}))

    @property
    def free_slots(self) -> int:
        """How many slots are free there, less the sequences that it is about to start.

        Fewer than anywhere until that is known.
        """
        return NOT_KNOWN if self._slots is None else self._slots.read()

    def known_blocks(self, blocks: Sequence[bytes]) -> int:
        """How many of the first blocks of a prompt a slot there has."""
        return 0 if self._slots is None else self._slots.known_blocks(blocks)

    def _receive_memory(self, connected: socket.socket) -> None:
        self._slots = SlotReader(connected)

    def forward(self, arrivals: Sequence[Arrival]) -> list[int]:
        """Have requests that came together answered there, each through its channel.

        Returns:
            A number for each, to cancel it by.
        """
        with self._lock:
            numbers = [next(self._numbers) for _ in arrivals]
            closed = self.closed
            if not closed:
                self._pending.update(
                    (number, channel)
                    for number, (_, _, channel) in zip(numbers, arrivals, strict=True)
                )
        if closed:
            for _, _, channel in arrivals:
                channel.send_error(self._lost())
        else:
            self._connection.send(b"".join(map(request_frame, numbers, arrivals)))
        return numbers

    def watch(self, sequence_id: SequenceId) -> None:
        """Have `PeerEvents.peer_ended` called when a sequence ends there, or if it has ended."""
        self._connection.send(encode({"type": "watch", "sequence_id": sequence_id}, {}))

    def cancel(self, number: int) -> None:
        """The client of a request has cancelled it."""
        self._connection.send(encode({"type": "cancel", "number": number}, {}))

    def close(self) -> None:
        """Close the connection; pending requests are answered with SHUTDOWN."""
        self._unloading = True
        self._connection.close()

    def _lost(self) -> RequestError:
        return unloading() if self._unloading else PeerLostError()

    def _on_frames(self, _: Connection, frames: list[Frame]) -> None:
        for header, tensors in frames:
            try:
                self._on_frame(header, tensors)
            except Exception:  # of one client's channel; the others go on
                log.exception("a response of another instance was not passed on")

    def _on_frame(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        match header["type"]:
            case "nonces":
                self.nonces.update(header["nonces"])
                for nonce in header["nonces"]:
                    self._events.peer_greeted(nonce)
            case "started":
                self._events.peer_started(self, header["sequence_id"])
            case "ended":
                self._events.peer_ended(self, header["sequence_id"])
            case "error":
                channel = self._pending.pop(header["number"])
                channel.send_error(read_error(header["error"]))
            case "response":
                number, final = header["number"], header["final"]
                channel = self._pending.pop(number) if final else self._pending[number]
                channel.send({**tensors, **header["texts"]}, final=final)

    def _on_closed(self, _: Connection) -> None:
        with self._lock:
            self.closed = True
            pending, self._pending = self._pending, {}
        for channel in pending.values():
            with contextlib.suppress(Exception):  # of one client's channel
                channel.send_error(self._lost())
        self._events.peer_lost(self)


class Peers:
    """The other instances of the model, connected to when they are needed.

    Args:
        address: of this instance.
        events: learns of their sequences.
        nonce: marks this instance's own requests to the model.
    """

    def __init__(self, address: Address, events: PeerEvents, nonce: str) -> None:
        self._address, self._events, self._nonce = address, events, nonce
        self._peers: dict[Address, Peer] = {}
        self._listed, self._closed = -LIST_INTERVAL, False
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Connect to those that listen now."""
        self._listed = -LIST_INTERVAL
        self.all()

    def all(self) -> list[Peer]:
        """Those that have listened lately."""
        with self._lock:
            if not self._closed and monotonic() - self._listed >= LIST_INTERVAL:
                self._listed = monotonic()
                for address in self._address.others(listening_sockets()):
                    if address not in self._peers or self._peers[address].closed:
                        self._connect(address)
        return self.connected()

    def connected(self) -> list[Peer]:
        """Those that there is a connection to."""
        peers = {each: peer for each, peer in self._peers.copy().items() if not peer.closed}
        return [peers[each] for each in newest(peers).values()]

    def close(self) -> None:
        """Close the connections, and make no more."""
        self._closed = True
        for peer in list(self._peers.values()):
            peer.close()

    def _connect(self, address: Address) -> None:
        self._peers.pop(address, None)
        try:
            self._peers[address] = Peer(address, self._events, self._nonce)
        except OSError as error:
            log.debug("an instance of the model cannot be reached: %s", error)


class _PeerChannel:
    """The channel of a request that another instance has forwarded."""

    def __init__(
        self,
        connection: Connection,
        number: int,
        outputs: frozenset[str],
        on_final: Callable[[RequestError | None], None],
    ) -> None:
        self._connection, self._number, self._on_final = connection, number, on_final
        self.requested_outputs = outputs
        self.cancelled = False

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Send a response."""
        texts = {name: value for name, value in outputs.items() if isinstance(value, str)}
        tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        header = {"type": "response", "number": self._number, "final": final, "texts": texts}
        if final:
            self._on_final(None)
        self._connection.send(encode(header, tensors))

    def send_error(self, error: RequestError) -> None:
        """Send an error as the final response."""
        self._on_final(error)
        header = {"type": "error", "number": self._number, "error": error_fields(error)}
        self._connection.send(encode(header, {}))

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled, or the instance that forwarded it has ended."""
        return self.cancelled


class PeerServer:
    """Serves requests that other instances forward. It observes the slot table (`SlotObserver`).

    Args:
        address: where to listen.
        serve: serves requests that arrived together and are for this instance.
        serve_relayed: serves those of instances without an engine, wherever they belong.
        is_live: whether a sequence owns a slot here, or in an instance that this one forwards to.
        nonce: marks this instance's own requests to the model.
        board: says how many slots are free here.
        on_greeting: called with the nonce of an instance that has connected.

    Raises:
        OSError: the socket cannot be made.
    """

    def __init__(
        self,
        address: Address,
        serve: Callable[[list[Arrival]], None],
        serve_relayed: Callable[[list[Arrival]], None],
        is_live: Callable[[SequenceId], bool],
        nonce: str,
        board: SlotBoard,
        on_greeting: Callable[[str], None],
    ) -> None:
        self._address, self._is_live, self._board = address, is_live, board
        self._serve, self._serve_relayed = serve, serve_relayed
        self._on_greeting = on_greeting
        self._own_nonces, self._nonces = {nonce}, {nonce}  # those of relays are our own
        self._connections: dict[Connection, dict[int, _PeerChannel]] = {}
        self._relays: set[Connection] = set()
        self._origins: dict[SequenceId, Connection] = {}  # who forwards a sequence's requests
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{address.name}")
        self._socket.listen()

    def start(self) -> None:
        """Accept connections from now on."""
        threading.Thread(target=self._accept, name="inplace-listen", daemon=True).start()

    def close(self) -> None:
        """Accept nothing more, and close the connections once all answers are sent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in list(self._connections):
            connection.finish()

    def learn(self, nonce: str) -> None:
        """Tell the instances without an engine how another instance marks its own requests."""
        if nonce not in self._nonces:
            self._nonces.add(nonce)
            for relay in self._relays.copy():
                relay.send(encode({"type": "nonces", "nonces": [nonce]}, {}))

    def sequence_moved(self, sequence_id: SequenceId) -> None:
        """Another instance has admitted a sequence whose requests this one forwards."""
        self._notify("started", sequence_id, self._origins.get(sequence_id))

    def sequence_left(self, sequence_id: SequenceId) -> None:
        """The sequence has ended in that instance."""
        self._notify("ended", sequence_id, self._origins.pop(sequence_id, None))

    def sequence_started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot."""
        self._notify("started", sequence.id, self._origins.get(sequence.id))

    def sequence_ended(self, sequence: SequenceState, reason: EndReason) -> None:
        """A sequence gave its slot back."""
        origins = self._origins
        restarts = reason is EndReason.START  # its START was forwarded too
        connection = origins.get(sequence.id) if restarts else origins.pop(sequence.id, None)
        self._notify("ended", sequence.id, connection)

    def _notify(self, kind: str, sequence_id: SequenceId, connection: Connection | None) -> None:
        if connection is not None:
            connection.send(encode({"type": kind, "sequence_id": sequence_id}, {}))

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._socket.accept()
            except OSError:  # closed
                return
            if not is_child_of(self._address.server, connected):
                connected.close()
                continue
            self._board.send(connected)
            self._connections[Connection(connected, self._on_frames, self._on_closed)] = {}

    def _on_frames(self, connection: Connection, frames: list[Frame]) -> None:
        arrivals: list[Arrival] = []
        channels = self._connections.setdefault(connection, {})
        for header, tensors in frames:
            if header["type"] != "request":
                self._on_notice(connection, channels, header)
                continue
            number = header["number"]
            request = read_request(header, tensors)
            on_final = partial(self._on_final, connection, channels, number, request.sequence_id)
            outputs = frozenset(header["outputs"])
            channel = channels[number] = _PeerChannel(connection, number, outputs, on_final)
            self._origins[request.sequence_id] = connection
            arrivals.append((request, read_texts(header), channel))
        if arrivals:
            serve = self._serve_relayed if connection in self._relays else self._serve
            serve(arrivals)

    def _on_notice(
        self, connection: Connection, channels: dict[int, _PeerChannel], header: dict[str, Any]
    ) -> None:
        match header["type"]:
            case "hello":
                self._on_hello(connection, header["nonce"], relays=header["relays"])
            case "watch":
                sequence_id = header["sequence_id"]
                self._origins[sequence_id] = connection
                if not self._is_live(sequence_id):
                    self._origins.pop(sequence_id, None)
                    self._notify("ended", sequence_id, connection)
            case "cancel":
                if (channel := channels.get(header["number"])) is not None:
                    channel.cancelled = True

    def _on_hello(self, connection: Connection, nonce: str, *, relays: bool) -> None:
        self.learn(nonce)
        if relays:
            self._relays.add(connection)
            self._own_nonces.add(nonce)
            for other in self._connections.keys() - self._relays:
                other.send(encode({"type": "nonces", "nonces": [nonce]}, {}))
        known = self._nonces if relays else self._own_nonces
        connection.send(encode({"type": "nonces", "nonces": sorted(known)}, {}))
        self._on_greeting(nonce)

    def _on_final(
        self,
        connection: Connection,
        channels: dict[int, _PeerChannel],
        number: int,
        sequence_id: SequenceId,
        error: RequestError | None,
    ) -> None:
        """A forwarded request is answered: one that was refused may have no sequence."""
        channels.pop(number, None)
        if error is None or self._is_live(sequence_id):
            return
        if self._origins.pop(sequence_id, None) is not None:
            self._notify("ended", sequence_id, connection)

    def _on_closed(self, connection: Connection) -> None:
        channels = self._connections.pop(connection, {})
        self._relays.discard(connection)
        for channel in channels.values():
            channel.cancelled = True
        for sequence_id, origin in list(self._origins.items()):
            if origin is connection:
                self._origins.pop(sequence_id, None)
