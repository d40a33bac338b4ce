"""What every engine can do."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

NO_OTHER_THREADS: AbstractContextManager[object] = nullcontext()
"""For steps beside which nobody else has anything to do."""


Finish = Callable[[AbstractContextManager[object]], dict[str, Tensor]]
"""Waits for a step that was launched; to be called once.

It is given what to enter while there is nothing to do in Python, or everything: where the device computes by itself, or the whole step. It
returns the wanted outputs by name, ``[rows, ...]``, on the host, the caller's to keep. States are written in the arena, never returned.
"""


class StepEngine(Protocol):
    """A loaded program, bound to an arena."""

    @property
    def overlaps(self) -> bool:
        """Whether steps compute by themselves once they are launched, in the order they were launched in."""

    def on_stream(self) -> AbstractContextManager[object]:
        """For a thread that steps again and again: what it does to states inside is in order with its steps."""

    def launch(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> Finish:
        """Begin a step. The one before must have been waited for.

        Args:
            inputs: the program's inputs by name, on the host, all of them.
            wanted: names of the outputs that somebody will read; the others need not leave the device.
        """
