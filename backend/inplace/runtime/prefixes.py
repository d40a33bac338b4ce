"""Free slots that are kept with their tokens, so that a prompt that begins with them uses them."""

import hmac
import secrets
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from inplace.runtime.slots import EndReason, SequenceState
from inplace.schema.prefixes import BLOCK_TOKENS, PrefixOptions

MIN_COPIED_TOKENS = BLOCK_TOKENS
"""Fewest tokens whose positions are copied to another slot; fewer are cheaper to prefill."""


_UNCHANGED = frozenset({EndReason.END, EndReason.START, EndReason.IDLE})
"""Ends of sequences whose states are those of their tokens, whatever updates them."""


@dataclass(slots=True, eq=False)
class KeptSlot:
    """A free slot with what it holds.

    Attributes:
        slot: a row of the arena.
        salt: only sequences with the same salt may use it.
        token_ids: the tokens at its positions.
        until: when it is forgotten, in seconds of the clock.
    """

    slot: int
    salt: bytes
    token_ids: "array[int]"
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class Prefix:
    """Positions of a slot that hold the first tokens of a prompt.

    Attributes:
        slot: the slot.
        length: how many positions.
        kept: the slot, if it is free and only the sequence that uses it would have a use for it;
            None if the positions must be copied.
    """

    slot: int
    length: int
    kept: KeptSlot | None = None


class PrefixCache:
    """Free slots with their tokens, the longest unused first. Not thread-safe.

    Args:
        options: what the operator has set.
        num_slots: slots of the arena.
        appends_only: whether all states append, so that a part of a slot's positions can be used.
        clock: monotonic seconds.
        secret: of the server, which makes salts; random if None.

    Attributes:
        on_tokens: called with the salt and the tokens that a slot holds, or is about to hold.
    """

    def __init__(
        self,
        options: PrefixOptions,
        num_slots: int,
        *,
        appends_only: bool,
        clock: Callable[[], float] = monotonic,
        secret: bytes | None = None,
    ) -> None:
        self._options, self._appends_only, self._clock = options, appends_only, clock
        self._max_kept = max(1, num_slots // 2) if options.slots is None else options.slots
        self._secret = secrets.token_bytes(32) if secret is None else secret
        self.on_tokens: Callable[[bytes, Sequence[int]], None] | None = None
        self._kept: OrderedDict[int, KeptSlot] = OrderedDict()
        self._num_kept: Counter[bytes] = Counter()

    def __len__(self) -> int:
        """The number of kept slots."""
        return len(self._kept)

    def salt(self, key_digest: bytes | None, cache_salt: str) -> bytes | None:
        """What sequences must have in common to share prefixes; None if one shares with no other.

        Args:
            key_digest: digest of the ``sequence_key``.
            cache_salt: the client's own part; empty without one.
        """
        if key_digest is None and not self._options.without_key:
            return None
        identity = b"none" if key_digest is None else b"key " + key_digest
        own = cache_salt.encode(errors="surrogatepass")
        message = len(identity).to_bytes(1, "big") + identity + own
        return hmac.digest(self._secret, message, "sha256")

    def keep(self, sequence: SequenceState, reason: EndReason) -> list[int]:
        """Keep the slot of a sequence that has ended.

        Returns:
            Slots that are not kept, or not any more.
        """
        salt, length = sequence.salt, sequence.length
        unchanged = reason in _UNCHANGED or (reason is EndReason.CANCELLED and self._appends_only)
        if salt is None or not length or not unchanged or not self._max_kept:
            return [sequence.slot]
        dropped = []
        if self._num_kept[salt] >= self._max_kept:
            oldest = next(kept for kept in self._kept.values() if kept.salt == salt)
            dropped.append(self.take(oldest))
        kept = KeptSlot(sequence.slot, salt, sequence.token_ids[:length])
        self._kept[kept.slot] = kept
        self._num_kept[salt] += 1
        self._use(kept)
        if self.on_tokens is not None:
            self.on_tokens(salt, kept.token_ids)
        return dropped

    def take(self, kept: KeptSlot) -> int:
        """Forget a kept slot; returns the slot."""
        del self._kept[kept.slot]
        self._num_kept[kept.salt] -= 1
        if not self._num_kept[kept.salt]:
            del self._num_kept[kept.salt]
        return kept.slot

    def take_oldest(self) -> int:
        """Forget the slot that has not been used for the longest time; returns it."""
        return self.take(next(iter(self._kept.values())))

    def take_expired(self) -> list[int]:
        """Forget the slots whose time is over; returns them."""
        now, expired = self._clock(), list[int]()
        while self._kept and (oldest := next(iter(self._kept.values()))).until <= now:
            expired.append(self.take(oldest))
        return expired

    def find(
        self, salt: bytes, prompt: NDArray[np.int32], live: Iterable[SequenceState]
    ) -> Prefix | None:
        """The slot with the most of the first tokens of a prompt, but for its last token.

        Args:
            salt: of the sequence that begins with the prompt.
            prompt: its tokens, int32 ``[tokens]``.
            live: the live sequences.
        """
        best: Prefix | None = None
        for kept in self._kept.values():
            if kept.salt != salt:
                continue
            length = self._usable(prompt, kept.token_ids)
            whole = length >= len(kept.token_ids) - 1
            if length > (0 if best is None else best.length) and (
                whole or length >= MIN_COPIED_TOKENS
            ):
                best = Prefix(kept.slot, length, kept if whole else None)
        for sequence in live:
            if sequence.salt != salt or (sequence.busy and not self._appends_only):
                continue
            length = self._usable(prompt, sequence.token_ids)
            if length >= MIN_COPIED_TOKENS and (best is None or length > best.length):
                best = Prefix(sequence.slot, length)
        if best is not None and best.slot in self._kept:
            self._use(self._kept[best.slot])
        return best

    def _use(self, kept: KeptSlot) -> None:
        kept.until = self._clock() + self._options.seconds
        self._kept.move_to_end(kept.slot)

    def _usable(self, prompt: NDArray[np.int32], token_ids: "array[int]") -> int:
        """How many positions of a slot with these tokens a prompt can use."""
        most = min(len(prompt) - 1, len(token_ids))
        if most <= 0:
            return 0
        differ = prompt[:most] != np.frombuffer(token_ids, dtype=np.int32, count=most)
        length = int(differ.argmax()) if differ.any() else most
        return length if self._appends_only or length == len(token_ids) else 0
