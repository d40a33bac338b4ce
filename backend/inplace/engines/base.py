"""What every engine can do."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Engine(Protocol):
    """A loaded program, bound to an arena."""

    def step(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one step.

        Args:
            inputs: the program's inputs by name, on the host, all of them.

        Returns:
            The program's outputs by name, ``[rows, ...]``, on the host. States are written in the arena and never returned.
        """
        ...
