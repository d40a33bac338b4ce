"""Which server has computed the beginning of a prompt, as far as this front end has seen."""

from collections.abc import Collection, Sequence

from inplace.openai.workers import Worker
from inplace.schema.prefixes import prefix_blocks

MAX_BLOCKS = 1 << 18
"""Blocks that are remembered: four million tokens, in two megabytes."""

MAX_SERVERS = 255
"""The most servers whose numbers a block has room for."""


class PrefixRecord:
    """Servers by the blocks of tokens that sequences on them began with.

    A block is known by a digest of its tokens, of all before it, and of who may use them. What is
    recorded is a hint: a server may have given the slot to others since. The record is a table of
    64-bit numbers that all processes of the front end read and write, each with seven bytes of a
    digest and the number of a server; a block takes the place of another with the same remainder.

    Args:
        servers: their addresses.
        worker: the process.
        max_blocks: how many blocks are remembered.
    """

    def __init__(
        self, servers: Sequence[str], worker: Worker | None = None, max_blocks: int = MAX_BLOCKS
    ) -> None:
        self._servers = tuple(servers)
        self._table = (worker or Worker()).shared("prefixes", max_blocks)

    def add(self, scope: bytes, tokens: Sequence[int], server: str) -> None:
        """Record that a server has a sequence that begins with these tokens.

        Args:
            scope: sequences of other scopes share nothing with it.
            tokens: of the sequence.
            server: the server.
        """
        number = self._servers.index(server) + 1
        for block in prefix_blocks(scope, tokens):
            place, tag = self._place(block)
            self._table[place] = tag | number

    def find(self, scope: bytes, prompt: Sequence[int], servers: Collection[str]) -> str | None:
        """The one of some servers that has the longest beginning of a prompt.

        Args:
            scope: of the sequence.
            prompt: its tokens.
            servers: those that can be chosen.
        """
        holder = None
        for block in prefix_blocks(scope, prompt):
            place, tag = self._place(block)
            number = int(self._table[place]) ^ tag
            if 0 < number <= len(self._servers) and self._servers[number - 1] in servers:
                holder = self._servers[number - 1]
        return holder

    def _place(self, block: bytes) -> tuple[int, int]:
        """Where a block is in the table, and its number there but for the server."""
        place = int.from_bytes(block[:8]) % len(self._table)
        return place, int.from_bytes(block[8:15] + b"\0", signed=True)
