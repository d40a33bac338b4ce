"""Where the instances of a model listen: abstract sockets of Linux (unix(7)).

Their names have the server's process id and digests of the model and of the instance. The kernel
says which process is at the other end (``SO_PEERCRED``).
"""

import hashlib
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Self

PREFIX = "inplace"
"""The names of all our sockets begin so."""


LISTENING = "00010000"
"""The flags of a listening socket in ``/proc/net/unix`` (proc(5))."""


CREDENTIALS = struct.Struct("3i")
"""Process, user and group of ``SO_PEERCRED``."""


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
        instances = self._instances(listening)
        instances.pop(self.instance, None)
        return sorted(instances.values(), key=lambda each: each.instance)

    def listener(self, listening: Iterable[str]) -> "Address | None":
        """The process of this instance that listens now; None if none does."""
        return self._instances(listening).get(self.instance)

    def _instances(self, listening: Iterable[str]) -> "dict[str, Address]":
        """The instances of the model."""
        addresses = [each for each in map(Address.read, listening) if each is not None]
        own = [each for each in addresses if (each.server, each.model) == (self.server, self.model)]
        return newest(own)


def newest(addresses: Iterable[Address]) -> dict[str, Address]:
    """The newest process of each instance, by its digest.

    While a model is loaded again, its old processes still listen.
    """
    found: dict[str, Address] = {}
    for each in addresses:
        if each.instance not in found or each.since > found[each.instance].since:
            found[each.instance] = each
    return found


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def server_digest(server: int) -> bytes:
    """A digest that is the same in all processes of one server, and in those of no other."""
    # The name of the program may have spaces and brackets; the start is 20 fields after it.
    started = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256(f"{boot} {server} {started}".encode()).digest()


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
