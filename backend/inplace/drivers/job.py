"""One request on its way through a stream driver."""

from dataclasses import dataclass

from inplace.batcher import Work
from inplace.drivers.generation import Generation
from inplace.drivers.reply import Reply
from inplace.requests import Checked
from inplace.sequences import SequenceId


@dataclass(slots=True, eq=False)
class Job:
    """A request of a stream model.

    Attributes:
        checked: what was asked.
        reply: its way back.
        generation: what it says; None for a step.
        work: its tokens on their way through the engine; None until it was given its sequence.
        fetches: it wants what a generation of its sequence has said since, and nothing else.
    """

    checked: Checked
    reply: Reply
    generation: Generation | None = None
    work: Work | None = None
    fetches: bool = False

    @property
    def sequence(self) -> SequenceId:
        """The correlation id."""
        return self.checked.request.sequence

    @property
    def only_ends(self) -> bool:
        """It is an END that brings nothing to compute."""
        return self.checked.tokens == 0 and self.checked.refusal is None
