"""Which server has computed the beginning of a prompt, as far as this front end has seen."""

from collections import OrderedDict
from collections.abc import Collection, Sequence

from inplace.schema.prefixes import prefix_blocks

MAX_BLOCKS = 1 << 17
"""Blocks that are remembered: two million tokens."""


class PrefixRecord:
    """Servers by the blocks of tokens that sequences on them began with.

    A block is known by a digest of its tokens, of all before it, and of who may use them. What is
    recorded is a hint: a server may have given the slot to others since. Not thread-safe.

    Args:
        max_blocks: how many blocks are remembered; those that were not used for the longest time
            go first.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._servers: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._servers)

    def add(self, scope: bytes, tokens: Sequence[int], server: str) -> None:
        """Record that a server has a sequence that begins with these tokens.

        Args:
            scope: sequences of other scopes share nothing with it.
            tokens: of the sequence.
            server: the server.
        """
        for block in prefix_blocks(scope, tokens):
            self._servers[block] = server
            self._servers.move_to_end(block)
        while len(self._servers) > self._max_blocks:
            self._servers.popitem(last=False)

    def find(self, scope: bytes, prompt: Sequence[int], servers: Collection[str]) -> str | None:
        """The one of some servers that has the longest beginning of a prompt.

        Args:
            scope: of the sequence.
            prompt: its tokens.
            servers: those that can be chosen.
        """
        found = None
        for block in prefix_blocks(scope, prompt):
            server = self._servers.get(block)
            if server in servers:
                found = server
                self._servers.move_to_end(block)
        return found
