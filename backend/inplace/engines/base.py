"""The protocol of engines: what runs one step of a program."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

NO_OTHER_THREADS: AbstractContextManager[object] = nullcontext()
"""Passed to a `Finish` where no other thread waits for the GIL."""


Finish = Callable[[AbstractContextManager[object]], dict[str, Tensor]]
"""Waits for a launched step. Called once.

Its argument is entered while the engine waits for the device, or during the whole step where the
CPU computes: the caller gives up its priority for the GIL in it. Returns the requested outputs by
name, ``[rows, ...]``, on the host, in memory that the caller may keep. States are written in the
arena and never returned.
"""


class StepEngine(Protocol):
    """A loaded program that is bound to an arena."""

    @property
    def overlaps(self) -> bool:
        """Whether launched steps run without the caller's thread, in the order of their launches.

        Only then can the caller prepare the next step while one runs.
        """

    def on_stream(self) -> AbstractContextManager[object]:
        """Make the engine's CUDA stream the thread's stream inside the block.

        What the thread does to states inside is ordered with its steps. Does nothing on the CPU.
        """

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        """Begin a step. The step before must have been waited for.

        Args:
            inputs: all inputs of the program by name, on the host.
            requested: names of the outputs to return; the others may stay on the device.
        """


class RepeatingEngine(StepEngine, Protocol):
    """A loaded program that can be stepped several times in succession."""

    def launch_repeated(
        self, inputs: Mapping[str, Tensor], requested: Collection[str], count: int
    ) -> Finish:
        """Begin several steps of the same inputs, one after the other.

        Nothing waits between them: each sees the states that the one before has written.

        Args:
            inputs: as for `launch`.
            requested: as for `launch`.
            count: how many steps.

        Returns:
            As `launch`; the outputs have one more axis in front, ``[count, rows, ...]``.
        """
