"""What every engine can do."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

ALONE: AbstractContextManager[object] = nullcontext()
"""For steps beside which nobody else has anything to do."""


class Engine(Protocol):
    """A loaded program, bound to an arena."""

    def attached(self) -> AbstractContextManager[object]:
        """For a thread that steps again and again: what it does to states inside is in order with its steps."""
        ...

    def step(
        self, inputs: Mapping[str, Tensor], wanted: Collection[str], waiting: AbstractContextManager[object] = ALONE
    ) -> dict[str, Tensor]:
        """Run one step.

        Args:
            inputs: the program's inputs by name, on the host, all of them.
            wanted: names of the outputs that somebody will read; the others need not leave the device.
            waiting: entered while there is nothing to do in Python, or everything: where the device computes by itself, or the whole step.

        Returns:
            The wanted outputs by name, ``[rows, ...]``, on the host, the caller's to keep. States are written in the arena, never
            returned.
        """
        ...
