"""What every engine can do."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

ALONE: AbstractContextManager[object] = nullcontext()
"""For steps beside which nobody else has anything to do."""


class Launched(Protocol):
    """A step on its way."""

    def wait(self, waiting: AbstractContextManager[object] = ALONE) -> dict[str, Tensor]:
        """Its outputs, once.

        Args:
            waiting: entered while there is nothing to do in Python: where the device computes by itself.

        Returns:
            The wanted outputs by name, ``[rows, ...]``, on the host, the caller's to keep. States are written in the arena, never
            returned.
        """


class Engine(Protocol):
    """A loaded program, bound to an arena."""

    @property
    def ahead(self) -> bool:
        """Whether steps compute by themselves once they are launched, in the order they were launched in."""

    def attached(self) -> AbstractContextManager[object]:
        """For a thread that steps again and again: what it does to states inside is in order with its steps."""

    def launch(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> Launched:
        """Begin a step. The one before must have been waited for.

        Args:
            inputs: the program's inputs by name, on the host, all of them.
            wanted: names of the outputs that somebody will read; the others need not leave the device.
        """


class Later:
    """A step that is computed when it is waited for.

    Args:
        step: computes it, given what `Launched.wait` is given.
    """

    def __init__(self, step: Callable[[AbstractContextManager[object]], dict[str, Tensor]]) -> None:
        self._step = step

    def wait(self, waiting: AbstractContextManager[object] = ALONE) -> dict[str, Tensor]:
        """See `Launched.wait`."""
        return self._step(waiting)
