"""A captured model, and the captured program that drafts its tokens."""

from dataclasses import dataclass

from inplace.schema.schedule import DEFAULT_SCHEDULE, STEP, Call, Schedule

from inplace_builder.capture.capture import Capture

DRAFT = "draft"
"""The name of the program that drafts."""


@dataclass(frozen=True)
class SpeculativeCapture:
    """A captured model, and what drafts its tokens.

    Attributes:
        model: the model; the program ``step``.
        draft: the program that drafts. Where it is the model's own first layers, its states are
            states of the model.
        draft_tokens: how many tokens are drafted in a round.
    """

    model: Capture
    draft: Capture
    draft_tokens: int

    @property
    def captures(self) -> tuple[Capture, ...]:
        """Both programs."""
        return self.model, self.draft

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """What requests run, and what the tokens of a generation run."""
        calls = (Call(program=DRAFT, at_most=self.draft_tokens), Call(program=STEP))
        return DEFAULT_SCHEDULE, Schedule(name="speculative", calls=calls, requests=("decode",))
