"""What an operator sets about the reuse of prefixes, and what names the beginning of a prompt."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 16
"""Tokens of a block: the fewest that are copied from one slot to another."""


def prefix_blocks(scope: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
    """The digests of the whole blocks of a sequence, 16 bytes each.

    Each is of its tokens, of all before it, and of who may use them.

    Args:
        scope: sequences of other scopes share nothing with it.
        tokens: of the sequence.
    """
    content = array("q", tokens).tobytes()
    size = BLOCK_TOKENS * array("q").itemsize
    digest = scope
    for end in range(size, len(content) + 1, size):
        digest = hashlib.blake2b(digest + content[end - size : end], digest_size=16).digest()
        yield digest


@dataclass(frozen=True)
class PrefixOptions:
    """How prompts use what earlier ones have computed.

    Attributes:
        seconds: for which a free slot is kept after its last use.
        slots: the most slots that are kept with one salt; None for half of all.
        without_key: whether sequences without a ``sequence_key`` share prefixes with each other.
    """

    seconds: float = 600.0
    slots: int | None = None
    without_key: bool = False
