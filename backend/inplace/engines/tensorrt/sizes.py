"""The step sizes that CUDA graphs are captured for, and how a step is padded to one with null rows."""

from dataclasses import dataclass

from inplace.manifest import Program

DECODE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of captured decode steps; a step is padded to the next."""
SMALLEST_MIXED = 16
"""Tokens of the smallest captured mixed step."""


@dataclass(frozen=True)
class Size:
    """A step: ``rows`` rows with ``tokens`` tokens together: one each in a decode step, more than rows in a mixed one."""

    rows: int
    tokens: int

    @property
    def decode(self) -> bool:
        """Whether every row has exactly one token."""
        return self.rows == self.tokens


def decode_sizes(program: Program) -> list[Size]:
    """The decode steps to capture, smallest first; the largest has every row."""
    rows = [count for count in DECODE_ROWS if count < program.max_rows]
    return [Size(count, count) for count in (*rows, program.max_rows)]


def mixed_sizes(program: Program) -> list[Size]:
    """The mixed steps to capture, smallest first. Each has a row more than a step can have: it owns the tokens that pad it."""
    if program.chunk == 1:
        return []
    rows, tokens = program.max_rows + 1, SMALLEST_MIXED
    while tokens <= rows:
        tokens *= 2
    found = [tokens]
    while found[-1] < program.token_budget:
        found.append(min(2 * found[-1], max(program.token_budget, rows + 1)))
    return [Size(rows, count) for count in found]


def fitting(sizes: list[Size], rows: int, tokens: int) -> Size | None:
    """The smallest of these sizes that a step fits into; a decode step only into a decode size."""
    for size in sizes:
        if size.decode == (rows == tokens) and size.rows >= rows and size.tokens >= tokens:
            return size
    return None
