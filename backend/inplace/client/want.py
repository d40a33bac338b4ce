"""What the user asks of a sequence, however and however often it is sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from inplace.client.calls import Array, ModelMetadata, Parameter
from inplace.protocol import INPUT_IDS, STOP, TEXT

Part = list[int] | str
"""Of a sequence's history: tokens that follow each other, or a text."""


@dataclass(frozen=True)
class Want:
    """A step or a generation.

    Attributes:
        inputs: by name, without a batch axis.
        end: the sequence ends with it.
        parameters: custom parameters.
        outputs: names of the outputs wanted; all if empty.
        request: the request id; a random one if empty.
    """

    inputs: Mapping[str, Array]
    end: bool = False
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    request: str = ""

    @property
    def part(self) -> Part | None:
        """What it adds to the history; None where a client that keeps it could not bring another server to the same state."""
        names = set(self.inputs) - {STOP}
        if names == {INPUT_IDS}:
            return [int(token) for token in self.inputs[INPUT_IDS]]
        return str(self.inputs[TEXT].item().decode()) if names == {TEXT} else None

    def after(self, tokens: Sequence[int]) -> "Want":
        """The same with tokens before its own."""
        return self._of([*tokens, *self.inputs[INPUT_IDS]])

    def before(self, tokens: Sequence[int]) -> "Want":
        """The same with tokens after its own."""
        return self._of([*self.inputs[INPUT_IDS], *tokens])

    def _of(self, tokens: Sequence[int]) -> "Want":
        return replace(
            self, inputs=dict(self.inputs) | {INPUT_IDS: np.array(tokens, dtype=np.int64)}
        )


def step_of(part: Part) -> Want:
    """A step that brings tokens or a text."""
    inputs = (
        {TEXT: np.array([part.encode()], dtype=np.object_)}
        if isinstance(part, str)
        else {INPUT_IDS: np.array(part, dtype=np.int64)}
    )
    return Want(inputs, outputs=("next_token",))


def joined(history: Sequence[Part], want: Want) -> list[Want]:
    """What to send to a fresh sequence: the history and what is wanted, which takes the tokens before its own as one prompt with them."""
    if not history:
        return [want]
    *before, last = history
    steps = [step_of(part) for part in before]
    if isinstance(last, list) and INPUT_IDS in want.inputs:
        return [*steps, want.after(last)]
    return [*steps, step_of(last), want]


def extended(history: list[Part], part: Part) -> list[Part]:
    """The history with one part more."""
    if history and isinstance(history[-1], list) and isinstance(part, list):
        history[-1] += part
        return history
    return [*history, part] if part else history


def advance(position: int | None, want: Want, model: ModelMetadata) -> int | None:
    """Where a sequence stands after a request; None where that is not known, as after a text."""
    return (
        None if position is None or TEXT in want.inputs else position + model.positions(want.inputs)
    )
