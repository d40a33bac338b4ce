"""Which instance of a model gets a new sequence: the one with most free slots.

Where prefixes are reused, it is the one that has the longest beginning of the prompt, unless that
one is much fuller. Each instance publishes in shared memory how many slots are free, and which
blocks of tokens its sequences begin with. The others get that memory with the first byte of a
connection.
"""

import mmap
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from inplace.runtime.slots import SlotTable
from inplace.schema.prefixes import prefix_blocks

WORD = struct.Struct("q")
"""The number of free slots, less the sequences that are about to start."""


NEARLY = 16
"""Instances of a stream model whose free slots differ by at most this part of an instance's slots
count as equal: what is passed on costs two passes through a socket for each request and response.
An instance with fewer slots passes on for one."""


MUCH_FULLER = 4
"""The same for a step model, whose batch waits in both instances for a request that is passed on,
and whose sequences Triton divides well by itself, because it keeps a place for each. An instance
that is fuller than another by more than this part gets no sequence for the beginning of its prompt
either: else all that begin alike would go to one instance until it is full."""


BLOCKS = 1 << 16
"""Blocks that are remembered of an instance: a million tokens. One takes the place of another."""


BLOCK = 8
"""Bytes of a block's digest that are kept."""


SIZE = WORD.size + BLOCKS * BLOCK
"""Bytes of the memory. What was never written takes none."""


def _place(block: bytes) -> int:
    """Where a block is in the memory."""
    return WORD.size + int.from_bytes(block[BLOCK:], "little") % BLOCKS * BLOCK


def _known(memory: mmap.mmap, blocks: Sequence[bytes]) -> int:
    """How many of the first blocks are in a memory."""
    for count, block in enumerate(blocks):
        place = _place(block)
        if memory[place : place + BLOCK] != block[:BLOCK]:
            return count
    return len(blocks)


class SlotBoard:
    """Memory in which an instance publishes what its slots have, as long as it runs."""

    def __init__(self) -> None:
        self._file = os.memfd_create("inplace-slots")
        os.ftruncate(self._file, SIZE)
        self._memory = mmap.mmap(self._file, SIZE)

    def write(self, free: int) -> None:
        """Publish the number of free slots."""
        WORD.pack_into(self._memory, 0, free)

    def add(self, salt: bytes, tokens: Sequence[int]) -> None:
        """Publish that a slot has these tokens, or is about to; a hint, which may be outdated."""
        for block in prefix_blocks(salt, tokens):
            place = _place(block)
            self._memory[place : place + BLOCK] = block[:BLOCK]

    def known_blocks(self, blocks: Sequence[bytes]) -> int:
        """How many of the first blocks of a prompt are here."""
        return _known(self._memory, blocks)

    def send(self, connected: socket.socket) -> None:
        """Give the memory to the other end of a connection, with one byte."""
        socket.send_fds(connected, [b"\0"], [self._file])


class SlotReader:
    """The memory of another instance.

    Args:
        connected: the connection, from which nothing was received yet.

    Raises:
        OSError: it was not given.
    """

    def __init__(self, connected: socket.socket) -> None:
        _, files, _, _ = socket.recv_fds(connected, 1, 1)
        if not files:
            raise ConnectionRefusedError("the other instance has closed the connection")
        self._memory = mmap.mmap(files[0], SIZE, prot=mmap.PROT_READ)
        os.close(files[0])

    def read(self) -> int:
        """How many slots are free there."""
        (free,) = WORD.unpack_from(self._memory)
        return int(free)

    def known_blocks(self, blocks: Sequence[bytes]) -> int:
        """How many of the first blocks of a prompt are there."""
        return _known(self._memory, blocks)


class Candidate(Protocol):
    """An instance that may get a new sequence."""

    @property
    def free_slots(self) -> int:
        """How many slots are free there, less the sequences that it is about to start."""

    def known_blocks(self, blocks: Sequence[bytes]) -> int:
        """How many of the first blocks of a prompt are there."""


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


class Balance:
    """Free slots of the instances, less the STARTs that were sent there and have none yet.

    Thread-safe.

    Args:
        table: the sequences of this instance.
        part: `NEARLY` or `MUCH_FULLER`.

    Attributes:
        board: what the others read of this instance.
    """

    def __init__(self, table: SlotTable, part: int) -> None:
        self.board = SlotBoard()
        self._table, self._margin = table, table.num_slots // part
        self._targets: dict[object, object] = {}
        self._starting: Counter[object] = Counter()
        self._lock = threading.Lock()
        self.publish()

    def send(self, start: object, target: Candidate | None) -> None:
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

    def choose(
        self, others: Sequence[AnyCandidate], blocks: Sequence[bytes] = ()
    ) -> AnyCandidate | None:
        """The instance for a new sequence; None is this one.

        Args:
            others: the other instances.
            blocks: of the prompt (`inplace.schema.prefixes`); none where prefixes are not reused.
        """
        with self._lock:
            free: dict[AnyCandidate | None, int] = {None: self._free()}
            free |= {other: other.free_slots - self._starting[other] for other in others}
        most_free = self._most_free(free, self._margin)
        if not blocks:
            return most_free
        known: dict[AnyCandidate | None, int] = {None: self.board.known_blocks(blocks)}
        known |= {other: other.known_blocks(blocks) for other in others}
        longest = max(known.values())
        having = {each: count for each, count in free.items() if longest and known[each] == longest}
        if not having:
            return most_free
        nearest = self._most_free(having, 0)
        fuller = free[most_free] - having[nearest]
        return most_free if fuller > self._table.num_slots // MUCH_FULLER else nearest

    @staticmethod
    def _most_free(free: Mapping[AnyCandidate | None, int], margin: int) -> AnyCandidate | None:
        """Of some instances; this one, the first, unless another has more than the margin more."""
        best = next(iter(free))
        most = free[best] + (margin if best is None else 0)
        for each, count in free.items():
            if count > most:
                best, most = each, count
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
