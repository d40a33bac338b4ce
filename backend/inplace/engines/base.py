"""What every engine can do."""

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor


class Engine(Protocol):
    """A loaded program, bound to an arena."""

    def step(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        """Run one step.

        Args:
            inputs: the program's inputs by name, on the host, all of them.
            wanted: names of the outputs that somebody will read; the others need not leave the device.

        Returns:
            The wanted outputs by name, ``[rows, ...]``, on the host, the caller's to keep. States are written in the arena, never
            returned.
        """
        ...
