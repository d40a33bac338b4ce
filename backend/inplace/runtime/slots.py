"""Sequences and the slots they own."""

import hmac
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic
from typing import Protocol

from inplace.errors import Code, RequestError

SequenceId = int | str


REMEMBERED = 4096
"""How many reclaimed ids are remembered, only to tell a late client what happened to it."""


class EndReason(StrEnum):
    """Why a sequence gave its slot back."""

    END = "end"
    START = "start"
    """A START of the same id took its place."""
    IDLE = "idle"
    ENGINE_FAILED = "engine_failed"
    CANCELLED = "cancelled"
    SHUTDOWN = "shutdown"
    """The model was unloaded while a request of it was under way."""


@dataclass(slots=True)
class SequenceState:
    """One stream of requests and the slot it owns from START to END.

    Attributes:
        id: the correlation id.
        slot: its row of the arena.
        key: digest of the key that its START set; None where it set none.
        length: positions its slot holds (the cached length).
        pending: the last token that a generation said: it belongs to the sequence, and is fed before the tokens of its next request.
        last_response: when it was last answered, by the table's clock, in seconds.
        busy: a step of it is under way; it is not reclaimed then.
        rest: what a driver keeps with it until its next request.
    """

    id: SequenceId
    slot: int
    key: bytes | None = None
    length: int = 0
    pending: int | None = None
    last_response: float = 0.0
    busy: bool = False
    rest: object = None

    @property
    def position(self) -> int:
        """How many tokens (or entries) the sequence has, the pending one included."""
        return self.length + (self.pending is not None)

    def check_key(self, key: bytes | None, *, start: bool) -> None:
        """Refuse a request that was not meant for this sequence, or not sent by its owner. Takes the same time whatever differs.

        A sequence without a key is open to any START, but not to a step or END that carries one: that was meant for another sequence.

        Raises:
            RequestError: SEQUENCE_KEY; retryable for a START, which may follow when the live sequence has ended.
        """
        if hmac.compare_digest(self.key or b"", key or b"") or (start and self.key is None):
            return
        kept = "none" if self.key is None else "another" if key else "one"
        raise RequestError(
            Code.SEQUENCE_KEY,
            f"the request carries {'a' if key else 'no'} sequence_key, the START of the live sequence {self.id!r} set {kept}; nothing was "
            f"changed: send what its START sent, or use an id of your own",
            retryable=start,
        )


class SlotObserver(Protocol):
    """Is told of every sequence that gets a slot, and of every one that loses it."""

    def started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot."""

    def ended(self, sequence: SequenceState, why: EndReason) -> None:
        """A sequence gave its slot back."""


class SlotTable:
    """Which sequence owns which slot. A slot is owned by at most one live sequence.

    Args:
        slots: how many there are.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        clock: monotonic seconds; a test may drive it.
        watcher: is told of starts and ends.
    """

    def __init__(
        self,
        slots: int,
        idle_timeout: float,
        clock: Callable[[], float] = monotonic,
        watcher: SlotObserver | None = None,
    ) -> None:
        self.slots = slots
        self.idle_timeout = idle_timeout
        self._clock = clock
        self._watcher = watcher
        self._free = list(range(slots - 1, -1, -1))
        self._live: OrderedDict[SequenceId, SequenceState] = (
            OrderedDict()
        )  # by last response, the longest idle first
        self._reclaimed: OrderedDict[SequenceId, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    @property
    def free(self) -> int:
        """Slots nobody owns."""
        return len(self._free)

    def get(self, id: SequenceId) -> SequenceState | None:
        """The live sequence of that id."""
        return self._live.get(id)

    def find(self, id: SequenceId) -> SequenceState:
        """The live sequence of that id.

        Raises:
            RequestError: UNKNOWN_SEQUENCE, and whether it was reclaimed.
        """
        sequence = self._live.get(id)
        if sequence is not None:
            return sequence
        if (idle := self._reclaimed.get(id)) is not None:
            why = f"it was idle for {idle:.0f} s and its slot was reclaimed (idle timeout {self.idle_timeout:g} s)"
        else:
            why = "it has not started, has ended, or its START was refused"
        raise RequestError(
            Code.UNKNOWN_SEQUENCE,
            f"no sequence {id!r} is live: {why}; send a request with the START flag",
        )

    def start(self, id: SequenceId, key: bytes | None = None) -> SequenceState:
        """Give a new sequence a slot, and the key that its later requests must carry.

        Raises:
            RequestError: NO_FREE_SLOT, retryable.
        """
        assert id not in self._live
        if not self._free:
            self.reclaim()
        if not self._free:
            raise RequestError(
                Code.NO_FREE_SLOT,
                f"all {self.slots} slots are owned by live sequences; retry when one has ended, or build with more slots",
                retryable=True,
            )
        self._reclaimed.pop(id, None)
        sequence = self._live[id] = SequenceState(
            id, self._free.pop(), key, last_response=self._clock()
        )
        if self._watcher is not None:
            self._watcher.started(sequence)
        return sequence

    def end(self, sequence: SequenceState, why: EndReason = EndReason.END) -> None:
        """Take the slot back."""
        del self._live[sequence.id]
        self._free.append(sequence.slot)
        if self._watcher is not None:
            self._watcher.ended(sequence, why)

    def answered(self, sequence: SequenceState) -> None:
        """Restart the sequence's idle clock: it was sent a response just now."""
        sequence.last_response = self._clock()
        self._live.move_to_end(sequence.id)

    def reclaim(self) -> list[SequenceState]:
        """End every sequence that has been idle for too long, and return them."""
        now = self._clock()
        idle = []
        for sequence in self._live.values():
            if now - sequence.last_response < self.idle_timeout:
                break
            if not sequence.busy:
                idle.append(sequence)
        for sequence in idle:
            self.end(sequence, EndReason.IDLE)
            self._reclaimed[sequence.id] = now - sequence.last_response
            if len(self._reclaimed) > REMEMBERED:
                self._reclaimed.popitem(last=False)
        return idle

    def next_expiry(self) -> float:
        """Seconds until some live sequence may have been idle for too long; the whole timeout if there is none."""
        for sequence in self._live.values():
            return max(0.0, sequence.last_response + self.idle_timeout - self._clock())
        return self.idle_timeout
