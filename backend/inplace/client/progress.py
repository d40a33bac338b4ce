"""How far a generation has come, and how it goes on where a server is lost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from tritonclient.utils import InferenceServerException

from inplace.client.calls import Array
from inplace.client.errors import RefusedError
from inplace.client.want import Part, Want
from inplace.protocol import FINISH_REASON, INPUT_IDS, MAX_TOKENS, STOP, TEXT, TEXT_OUTPUT, TOKENS

REPLAY = "REPLAY"
"""Code of a replay that does not say what was said before."""


@dataclass(frozen=True)
class Piece:
    """One response of a generation.

    Attributes:
        tokens: the next tokens; may be empty in the last piece.
        text: the text they add, in whole characters; empty where the model has no tokenizer or ``text=False``.
        finish_reason: empty while the generation runs; in the last piece why it ended: ``length``, ``eos``, ``stop``, ``capacity``,
            ``cancelled`` or ``ended``.
    """

    tokens: list[int]
    text: str
    finish_reason: str


class Progress:
    """What a generation has said, and what is to be asked of another server so that it says the rest.

    What was said goes into the prompt there, and the sampler's numbers depend on seed and position alone, so the rest is the same. Where
    text is wanted the prompt ends where the text was last known to be complete (half a character, or the beginning of a stop text, may have
    been held back), and what is then said a second time is compared and dropped.

    Args:
        want: the generation as the user asked for it.

    Attributes:
        asked: that.
        tokens: all that were said.
        text: all that was said.
        finish_reason: empty while it runs.
    """

    def __init__(self, want: Want) -> None:
        self.asked = want
        self._limit = int(want.parameters[MAX_TOKENS])
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason = ""
        self._fed = 0  # of the tokens said, how many are in the prompt of the request under way
        self._again = 0  # of those after them, how many it has said again
        self._round = self._before = (
            ""  # the text of the request under way, and that of the tokens in its prompt
        )
        self._whole = self._last_whole = (
            0,
            "",
        )  # tokens and text where the text was complete, as far as can be told

    def begin(self) -> tuple[list[Part], Want]:
        """What to ask of a server now, and what must go before it: the generation, or the rest of it."""
        self._fed, self._before = self._whole
        self._again, self._round = 0, ""
        asked, said = self.asked, self.tokens[: self._fed]
        if not said:
            return [], asked
        rest = replace(
            asked, parameters=dict(asked.parameters) | {MAX_TOKENS: self._limit - len(said)}
        )
        if INPUT_IDS in asked.inputs:
            return [], rest.before(said)
        inputs = {name: array for name, array in asked.inputs.items() if name != TEXT} | {
            INPUT_IDS: np.array(said, dtype=np.int64)
        }
        return [asked.inputs[TEXT].item().decode()], replace(rest, inputs=inputs)

    @property
    def spoke(self) -> bool:
        """Whether the request under way has said anything."""
        return self._again > 0

    def take(self, outputs: Mapping[str, Array]) -> Piece:
        """A response of the request under way: what of it is new.

        Raises:
            RefusedError: it does not repeat what was said before; retryable where that may be due to where the prompt ended.
        """
        said, text = tokens_of(outputs), text_of(outputs, TEXT_OUTPUT)
        known = self.tokens[self._fed + self._again :]
        whole = self._before + self._round + text
        if said[: len(known)] != known[: len(said)] or (
            len(said) >= len(known) and not whole.startswith(self.text)
        ):
            raise self._differs(said, known[: len(said)])
        self._again, self._round = self._again + len(said), self._round + text
        fresh = said[len(known) :]
        self.tokens += fresh
        piece = Piece(fresh, whole[len(self.text) :], text_of(outputs, FINISH_REASON))
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        self._mark(len(said), text, has_text=TEXT_OUTPUT in outputs)
        return piece

    def _mark(self, count: int, text: str, *, has_text: bool) -> None:
        """Whether a prompt may end here: one token that says something ends a character, but may begin another one.

        So the prompt ends at the last but one such token: if that began a character, the text of the next one differs.
        """
        here = self._fed + self._again
        if here < len(self.tokens) or here == self._limit:
            return
        if not has_text:
            self._whole = here, ""
        elif count == 1 and text and STOP not in self.asked.inputs:
            self._whole, self._last_whole = self._last_whole, (here, self.text)

    def _differs(self, said: list[int], known: list[int]) -> RefusedError:
        again = self._fed > 0
        self._whole = self._last_whole = 0, ""
        text = f"the replay says {said} where {known} was said, or another text: the servers serve different models, or compute differently"
        error = InferenceServerException(text)
        return RefusedError(
            error,
            code=REPLAY,
            reason=text,
            retryable=again,
            sequence="-",
            request=self.asked.request,
        )


def tokens_of(outputs: Mapping[str, Array]) -> list[int]:
    """The tokens of a response."""
    return [int(token) for token in outputs[TOKENS].reshape(-1)]


def text_of(outputs: Mapping[str, Array], name: str) -> str:
    """The text of an output; empty where there is none."""
    if name not in outputs or not outputs[name].size:
        return ""
    value = outputs[name].reshape(-1)[0]
    return value.decode() if isinstance(value, bytes) else str(value)
