"""Connections between the instances of one model, which are processes of one server.

An instance listens on an abstract socket of Linux (unix(7)), whose name has the server's process id
and digests of the model and of the instance. The kernel says which process is at the other end
(``SO_PEERCRED``): only children of the same server are spoken to. What passes over a connection is
in `inplace.server.frames`.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, monotonic_ns
from typing import Any, Protocol, Self

from torch import Tensor

from inplace.drivers import Arrival
from inplace.drivers.reply import Channel, Outputs
from inplace.drivers.shutdown import unloading
from inplace.errors import Code, RequestError
from inplace.runtime.slots import EndReason, SequenceId, SequenceState
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

PREFIX = "inplace"
"""The names of all our sockets begin so."""


LISTENING = "00010000"
"""The flags of a listening socket in ``/proc/net/unix`` (proc(5))."""


LIST_INTERVAL = 0.25
"""Seconds for which a list of the other instances is used."""


CONNECT_TIMEOUT = 1.0
"""Seconds within which another instance must accept a connection."""


CLOSE_TIMEOUT = 1.0
"""Seconds that a thread of a connection is waited for when the model is unloaded."""


RECEIVE_BYTES = 1 << 20
"""Bytes read from a socket at once."""


CREDENTIALS = struct.Struct("3i")
"""Process, user and group of ``SO_PEERCRED``."""


log = logging.getLogger("inplace")


class PeerLostError(RequestError):
    """The instance that was to answer has ended."""

    def __init__(self) -> None:
        super().__init__(
            Code.ENGINE_FAILED,
            "the instance of the model that had this sequence has ended; START again",
        )


@dataclass(frozen=True)
class Address:
    """Where an instance listens.

    Attributes:
        server: the process id of the server.
        model: digest of the engine and of the configuration.
        instance: digest of the instance's name and device.
        since: when it began to listen, in monotonic nanoseconds.
        process: its process id.
    """

    server: int
    model: str
    instance: str
    since: int
    process: int

    @classmethod
    def of(cls, args: Mapping[str, str], engine: str) -> Self:
        """The address of this process.

        Args:
            args: what Triton passes to ``initialize``.
            engine: digest of the engine's files.
        """
        model = (args["model_name"], args["model_version"], args["model_config"], engine)
        instance = (args["model_instance_name"], args.get("model_instance_device_id", "0"))
        return cls(os.getppid(), _digest(*model), _digest(*instance), monotonic_ns(), os.getpid())

    @property
    def name(self) -> str:
        """The name of the socket, without the NUL byte before it."""
        parts = (self.server, self.model, self.instance, self.since, self.process)
        return "/".join((PREFIX, *map(str, parts)))

    @classmethod
    def read(cls, name: str) -> Self | None:
        """The address with this name; None if it is not one."""
        parts = name.split("/")
        if len(parts) != 6 or parts[0] != PREFIX:
            return None
        _, server, model, instance, since, process = parts
        if not all(part.isascii() and part.isdigit() for part in (server, since, process)):
            return None
        return cls(int(server), model, instance, int(since), int(process))

    def others(self, listening: Iterable[str]) -> "list[Address]":
        """The other instances of the model, of all names of sockets that listen."""
        newest = self._newest(listening)
        newest.pop(self.instance, None)
        return sorted(newest.values(), key=lambda each: each.instance)

    def listener(self, listening: Iterable[str]) -> "Address | None":
        """The process of this instance that listens now; None if none does."""
        return self._newest(listening).get(self.instance)

    def _newest(self, listening: Iterable[str]) -> "dict[str, Address]":
        """The instances of the model.

        While a model is loaded again, its old processes still listen: of each instance the newest
        counts.
        """
        newest: dict[str, Address] = {}
        for name in listening:
            each = Address.read(name)
            if each is None or (each.server, each.model) != (self.server, self.model):
                continue
            if each.instance not in newest or each.since > newest[each.instance].since:
                newest[each.instance] = each
        return newest


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def listening_sockets(path: Path = Path("/proc/net/unix")) -> list[str]:
    """The names of the abstract sockets that listen on this machine."""
    names = []
    for line in path.read_text().splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[3] == LISTENING and fields[7].startswith("@"):
            names.append(fields[7][1:])
    return names


def is_child_of(server: int, connected: socket.socket) -> bool:
    """Whether the process at the other end is a child of the server."""
    packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    process = CREDENTIALS.unpack(packed)[0]
    try:
        # The name of the program may have spaces and brackets; state and parent come after it.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return False
    return int(fields[1]) == server


class Connection:
    """Sends and receives frames, on two threads. Thread-safe.

    Args:
        connected: the socket.
        on_frames: called with the frames that have arrived together, in order.
        on_closed: called once, when the other end has gone or `close` was called.
    """

    def __init__(
        self,
        connected: socket.socket,
        on_frames: "Callable[[Connection, list[Frame]], None]",
        on_closed: "Callable[[Connection], None]",
    ) -> None:
        self._socket, self._on_frames, self._on_closed = connected, on_frames, on_closed
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
        OSError: it cannot be connected to, or is no process of this server.
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
            connected.settimeout(None)
            if not is_child_of(address.server, connected):
                raise ConnectionRefusedError(f"{address.name} is not a process of this server")
        except OSError:
            connected.close()
            raise
        self._connection = Connection(connected, self._on_frames, self._on_closed)
        self._connection.send(encode({"type": "hello", "nonce": nonce, "relays": relays}, {}))

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
            return [peer for peer in self._peers.values() if not peer.closed]

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
        on_greeting: called with the same of an instance that has connected.

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
        on_greeting: Callable[[str], None],
    ) -> None:
        self._address, self._is_live = address, is_live
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
