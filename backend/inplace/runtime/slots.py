"""Live sequences and the slots they own."""

import hmac
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from time import monotonic
from typing import Protocol

from torch import Tensor

from inplace.errors import Code, RequestError
from inplace.parameters import Parameter
from inplace.snapshots import Lease, Snapshot

SequenceId = int | str
"""A correlation id: a number or a text."""


MAX_RECLAIMED_IDS = 4096
"""Reclaimed ids that are remembered, so that a late client gets the reason."""


RECLAIM_INTERVAL, MAX_RECLAIM_DELAY = 0.05, 3600.0
"""Shortest and longest time between two searches for idle sequences, in seconds. A thread cannot
wait arbitrarily long, whatever the idle timeout is."""


class EndReason(StrEnum):
    """Why a sequence gave its slot back."""

    END = "end"
    START = "start"
    """A START of the same id took its place."""
    IDLE = "idle"
    ENGINE_FAILED = "engine_failed"
    CAPACITY = "capacity"
    """A request of several calls found no room in the middle, and could not be taken back."""
    CANCELLED = "cancelled"
    GRAMMAR = "grammar"
    """Its grammar could not be followed any further, or left no token that may be chosen."""
    SHUTDOWN = "shutdown"
    """The server was stopping, or the model was unloaded while a request was running."""
    FENCED = "fenced"
    """Another server has restored it."""


class DriverState(Protocol):
    """What a driver keeps with a sequence until its next request."""

    def copy(self) -> "DriverState | None":
        """What a copy of the sequence begins with."""


@dataclass(slots=True, eq=False)
class SequenceState:
    """A live sequence and the slot that it owns from START to END.

    Attributes:
        id: the correlation id.
        slot: its row of the arena.
        key_digest: digest of the ``sequence_key`` of its START; None without one.
        group: the parameter ``group`` of its START; None without one.
        salt: what it must have in common with sequences that use its prefixes; None if none may.
        token_ids: the tokens at these positions, where an engine may have to know them; else empty.
        length: positions that its slot holds (the cached length).
        pending_token: the last token of a generation, which no step has consumed yet. It belongs to
            the sequence and is fed before the tokens of the next request.
        last_response: when it was last answered, in seconds of the table's clock.
        busy: a request of it is running, so it is not reclaimed.
        driver_state: what a driver keeps with it until its next request.
        positions: of a schedule, by program how many positions its calls have taken; of a program
            that drafts tokens, how many its states hold.
        audio: of a stream, samples that are not a whole chunk yet; None before the first ones.
        lease: what this server has of it in the store of snapshots; None if it is not stored.
        num_prompt_tokens: how many tokens are before the first one that its last request generates;
            only of one that is stored.
        restored: it was restored, and no request has run since.
    """

    id: SequenceId
    slot: int
    key_digest: bytes | None = None
    group: Parameter | None = None
    salt: bytes | None = None
    length: int = 0
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    pending_token: int | None = None
    last_response: float = 0.0
    busy: bool = False
    driver_state: DriverState | None = None
    positions: dict[str, int] = field(default_factory=dict)
    audio: Tensor | None = None
    lease: Lease | None = None
    num_prompt_tokens: int = 0
    restored: bool = False

    def roll_back(self, length: int) -> None:
        """Forget what came after this length."""
        self.length = length
        del self.token_ids[length:]
        self.positions = {name: min(used, length) for name, used in self.positions.items()}

    def copy_from(self, source: "SequenceState") -> None:
        """Take over all of another sequence but its id, its slot and its key."""
        self.group = source.group if self.group is None else self.group
        self.salt = source.salt
        self.length, self.token_ids = source.length, source.token_ids[:]
        self.pending_token = source.pending_token
        self.positions = dict(source.positions)
        self.audio = source.audio  # never changed in place
        if source.driver_state is not None:
            self.driver_state = source.driver_state.copy()

    def restore(self, snapshot: Snapshot) -> None:
        """Take over what a snapshot has, but for the states."""
        self.group, self.salt = snapshot.group, snapshot.salt
        self.length, self.token_ids = snapshot.length, snapshot.token_ids[:]
        self.pending_token = snapshot.pending_token
        self.num_prompt_tokens = snapshot.num_prompt_tokens
        self.positions, self.audio = dict(snapshot.positions), snapshot.audio
        self.driver_state = list(snapshot.context) or None
        self.restored = True

    @property
    def position(self) -> int:
        """How many tokens (or entries) the sequence has, with the pending token."""
        return self.length + (self.pending_token is not None)

    def check_copy(self, key_digest: bytes | None) -> None:
        """Refuse a START that would begin as a copy of this sequence.

        Args:
            key_digest: digest of the request's ``sequence_key``.

        Raises:
            RequestError: SEQUENCE_KEY, or SEQUENCE_BUSY, which is retryable.
        """
        if self.key_digest is None:
            raise RequestError(
                Code.SEQUENCE_KEY,
                f"sequence {self.id!r} has no sequence_key, so it cannot be copied: send one with"
                f" its START",
            )
        self.check_key(key_digest, start=False)
        if self.busy:
            raise RequestError(
                Code.SEQUENCE_BUSY,
                f"a request of sequence {self.id!r} is running; nothing was copied: send it again"
                f" after the response to that",
                retryable=True,
            )

    def check_key(self, key_digest: bytes | None, *, start: bool) -> None:
        """Refuse a request whose key is not the sequence's. Takes the same time for every key.

        A sequence without a key accepts any START, but no step or END with a key: such a request
        was meant for another sequence.

        Args:
            key_digest: digest of the request's ``sequence_key``.
            start: whether the request has the START flag.

        Raises:
            RequestError: SEQUENCE_KEY; retryable for a START, which succeeds once the live sequence
                has ended.
        """
        if hmac.compare_digest(self.key_digest or b"", key_digest or b""):
            return
        if start and self.key_digest is None:
            return
        expected = "none" if self.key_digest is None else "another" if key_digest else "one"
        raise RequestError(
            Code.SEQUENCE_KEY,
            f"the request carries {'a' if key_digest else 'no'} sequence_key, the START of the live"
            f" sequence {self.id!r} set {expected}; nothing was changed: send the key of its START,"
            f" or use another id",
            retryable=start,
        )


class SlotObserver(Protocol):
    """Receives an event for every sequence that gets or loses a slot."""

    def sequence_started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot."""

    def sequence_ended(self, sequence: SequenceState, reason: EndReason) -> None:
        """A sequence gave its slot back."""


class FreeSlots(Protocol):
    """Keeps free slots for a later use (`inplace.runtime.prefixes.PrefixCache`)."""

    def __len__(self) -> int:
        """The number of kept slots."""

    def keep(self, sequence: SequenceState, reason: EndReason) -> list[int]:
        """Keep the slot of a sequence that has ended; returns slots that are not kept any more."""

    def take_oldest(self) -> int:
        """Forget the slot that has not been used for the longest time; returns it."""

    def take_expired(self) -> list[int]:
        """Forget the slots whose time is over; returns them."""


class SlotTable:
    """Which sequence owns which slot. A slot has at most one owner. Not thread-safe.

    Args:
        num_slots: slots of the arena.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        clock: monotonic seconds.
        observer: receives the starts and ends of sequences.

    Attributes:
        kept: keeps slots of sequences that have ended; they are free. None keeps none.
    """

    def __init__(
        self,
        num_slots: int,
        idle_timeout: float,
        clock: Callable[[], float] = monotonic,
        observer: SlotObserver | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.idle_timeout = idle_timeout
        self._clock = clock
        self._observer = observer
        self.kept: FreeSlots | None = None
        self._free = list(range(num_slots - 1, -1, -1))
        self._live: OrderedDict[SequenceId, SequenceState] = OrderedDict()  # longest idle first
        self._reclaimed: OrderedDict[SequenceId, float] = OrderedDict()  # seconds they were idle
        self._left: OrderedDict[SequenceId, RequestError] = OrderedDict()  # what their requests get

    def __len__(self) -> int:
        """The number of live sequences."""
        return len(self._live)

    @property
    def num_free(self) -> int:
        """Slots without an owner."""
        return len(self._free) + (0 if self.kept is None else len(self.kept))

    @property
    def live(self) -> Iterable[SequenceState]:
        """The live sequences, those first that were last answered the longest time ago."""
        return self._live.values()

    def get(self, id: SequenceId) -> SequenceState | None:
        """The live sequence with this id; None without one."""
        return self._live.get(id)

    def find(self, id: SequenceId) -> SequenceState:
        """The live sequence with this id.

        Raises:
            RequestError: UNKNOWN_SEQUENCE; the text says whether it was reclaimed. Of a sequence
                that has left (`leave`), the error that was given then.
        """
        sequence = self._live.get(id)
        if sequence is not None:
            return sequence
        if (error := self._left.get(id)) is not None:
            # A new one: the traceback of one that is kept would keep the request.
            raise RequestError(error.code, str(error), retryable=error.retryable)
        if (idle := self._reclaimed.get(id)) is not None:
            reason = (
                f"it was idle for {idle:.0f} s and its slot was reclaimed"
                f" (idle timeout {self.idle_timeout:g} s)"
            )
        else:
            reason = "it has not started, has ended, or its START was refused"
        raise RequestError(
            Code.UNKNOWN_SEQUENCE,
            f"no sequence {id!r} is live: {reason}; send a request with the START flag",
        )

    def start(
        self,
        id: SequenceId,
        key_digest: bytes | None = None,
        slot: int | None = None,
        lease: Lease | None = None,
    ) -> SequenceState:
        """Give a new sequence a slot; idle sequences are reclaimed if there is none.

        Args:
            id: the correlation id; no live sequence has it.
            key_digest: digest of the key that its later requests must carry; None for no key.
            slot: one that was kept and is not any more; None for any free one.
            lease: of a sequence that is restored.

        Raises:
            RequestError: NO_FREE_SLOT, retryable.
        """
        assert id not in self._live
        if slot is None and not self.num_free:
            self.reclaim_idle()
        if slot is None and not self.num_free:
            raise self.no_free_slot()
        self._reclaimed.pop(id, None)
        self._left.pop(id, None)
        if slot is None:
            slot = self._take_free()
        sequence = SequenceState(id, slot, key_digest, last_response=self._clock(), lease=lease)
        self._live[id] = sequence
        if self._observer is not None:
            self._observer.sequence_started(sequence)
        return sequence

    def no_free_slot(self) -> RequestError:
        """The error of a START that cannot have a slot."""
        return RequestError(
            Code.NO_FREE_SLOT,
            f"all {self.num_slots} slots are owned by live sequences; retry when one has ended,"
            f" or build with more slots",
            retryable=True,
        )

    def end(self, sequence: SequenceState, reason: EndReason = EndReason.END) -> None:
        """End a live sequence and free its slot."""
        del self._live[sequence.id]
        if self.kept is None:
            self._free.append(sequence.slot)
        else:
            self._free += self.kept.keep(sequence, reason)
        if self._observer is not None:
            self._observer.sequence_ended(sequence, reason)

    def leave(self, sequence: SequenceState, reason: EndReason, error: RequestError) -> None:
        """End a live sequence that another server goes on with; later requests get this error."""
        self.end(sequence, reason)
        self._left[sequence.id] = error
        if len(self._left) > MAX_RECLAIMED_IDS:
            self._left.popitem(last=False)

    def _take_free(self) -> int:
        if not self._free and self.kept is not None:
            return self.kept.take_oldest()
        return self._free.pop()

    def touch(self, sequence: SequenceState) -> None:
        """Restart the idle clock of a sequence that has just been answered."""
        sequence.last_response = self._clock()
        self._live.move_to_end(sequence.id)

    def reclaim_idle(self) -> list[SequenceState]:
        """End every sequence that has been idle for the timeout, and return them."""
        now = self._clock()
        if self.kept is not None:
            self._free += self.kept.take_expired()
        idle = self.idle_for(self.idle_timeout)
        for sequence in idle:
            self.end(sequence, EndReason.IDLE)
            self._reclaimed[sequence.id] = now - sequence.last_response
            if len(self._reclaimed) > MAX_RECLAIMED_IDS:
                self._reclaimed.popitem(last=False)
        return idle

    def idle_for(self, seconds: float) -> list[SequenceState]:
        """The live sequences that were last answered so many seconds ago, or earlier."""
        now = self._clock()
        idle = []
        for sequence in self._live.values():
            if now - sequence.last_response < seconds:
                break
            if not sequence.busy:
                idle.append(sequence)
        return idle

    def next_expiry(self) -> float:
        """Seconds until the next live sequence may expire; the idle timeout if none is live."""
        for sequence in self._live.values():
            return max(0.0, sequence.last_response + self.idle_timeout - self._clock())
        return self.idle_timeout

    def reclaim_delay(self) -> float:
        """Seconds for which a thread may wait before it calls `reclaim_idle` again."""
        return min(max(RECLAIM_INTERVAL, self.next_expiry()), MAX_RECLAIM_DELAY)
