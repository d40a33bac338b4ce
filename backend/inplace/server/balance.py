"""Which instance of a model gets a new sequence: the one with most free slots.

Each instance says in a word of shared memory how many slots are free. The others get that memory
with the first byte of a connection.
"""

import mmap
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar

from inplace.runtime.slots import SlotTable

WORD = struct.Struct("q")
"""The number of free slots, less the sequences that are about to start."""


NEARLY = 16
"""Instances whose free slots differ by at most this part of an instance's slots count as equal.

A START that is passed on costs two passes through a socket for each request of its sequence, and
Triton divides sequences evenly in the mean. An instance with fewer slots passes on for one.
"""


class SlotBoard:
    """Memory in which an instance says how many of its slots are free, as long as it runs."""

    def __init__(self) -> None:
        self._file = os.memfd_create("inplace-slots")
        os.ftruncate(self._file, WORD.size)
        self._memory = mmap.mmap(self._file, WORD.size)

    def write(self, free: int) -> None:
        """Say how many."""
        WORD.pack_into(self._memory, 0, free)

    def send(self, connected: socket.socket) -> None:
        """Give the memory to the other end of a connection, with one byte."""
        socket.send_fds(connected, [b"\0"], [self._file])


class SlotReader:
    """The memory of another instance.

    Args:
        connected: the connection, from which nothing was received yet; it has a timeout.

    Raises:
        OSError: it was not given.
    """

    def __init__(self, connected: socket.socket) -> None:
        _, files, _, _ = socket.recv_fds(connected, 1, 1)
        if not files:
            raise ConnectionRefusedError("the other instance has closed the connection")
        self._memory = mmap.mmap(files[0], WORD.size, prot=mmap.PROT_READ)
        os.close(files[0])

    def read(self) -> int:
        """How many slots are free there."""
        (free,) = WORD.unpack_from(self._memory)
        return int(free)


class Target(Protocol):
    """Another instance."""

    @property
    def free_slots(self) -> int:
        """How many slots are free there, less the sequences that it is about to start."""


AnyTarget = TypeVar("AnyTarget", bound=Target)


class Balance:
    """Free slots of the instances, less the STARTs that were sent there and have none yet.

    Thread-safe.

    Args:
        table: the sequences of this instance.

    Attributes:
        board: what the others read of this instance.
    """

    def __init__(self, table: SlotTable) -> None:
        self.board = SlotBoard()
        self._table = table
        self._targets: dict[object, object] = {}
        self._starting: Counter[object] = Counter()
        self._lock = threading.Lock()
        self.publish()

    def send(self, start: object, target: Target | None) -> None:
        """A START goes to an instance now; None is this one."""
        with self._lock:
            self._forget(start)
            self._targets[start] = target
            self._starting[target] += 1
            self._write()

    def forget(self, start: object) -> None:
        """A START has a slot, waits for one, or is refused."""
        with self._lock:
            self._forget(start)
            self._write()

    def publish(self) -> None:
        """A slot was given to a sequence, or given back."""
        with self._lock:
            self._write()

    def most_free(self, others: Iterable[AnyTarget]) -> AnyTarget | None:
        """The instance for a new sequence; None is this one."""
        with self._lock:
            best, most = None, self._free() + self._table.num_slots // NEARLY
            for other in others:
                if (free := other.free_slots - self._starting[other]) > most:
                    best, most = other, free
        return best

    def _free(self) -> int:
        return self._table.num_free - self._starting[None]

    def _write(self) -> None:
        self.board.write(self._free())

    def _forget(self, start: object) -> None:
        if start in self._targets:
            target = self._targets.pop(start)
            self._starting[target] -= 1
            if not self._starting[target]:
                del self._starting[target]
