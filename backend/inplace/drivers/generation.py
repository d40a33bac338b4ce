"""A generation: what was asked for, and whether the token that was just said is its last."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from tokenizers import Tokenizer
from torch import Tensor

from inplace.drivers.text import Detokenizer, StopMatcher
from inplace.errors import Code, RequestError
from inplace.protocol import IGNORE_EOS, MAX_TOKENS, STOP, STREAM_INTERVAL, TEXT
from inplace.runtime.requests import Request
from inplace.runtime.sampling import Parameter, parse_integer

MOST_STOPS, LONGEST_STOP = 16, 256


BYTES_A_POSITION = 64
"""Text that is longer than so many bytes for each position a sequence may hold is not tokenized: it would not fit."""


MOST = 2**31 - 1


class FinishReason(StrEnum):
    """Why a generation finished, as clients read it."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"
    CAPACITY = "capacity"
    CANCELLED = "cancelled"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """What a generation may say.

    Attributes:
        max_tokens: how many tokens at most.
        ignore_eos: go on after an end token.
        interval: fewest tokens of a response.
        stops: texts that end it.
    """

    max_tokens: int
    ignore_eos: bool = False
    interval: int = 1
    stops: tuple[str, ...] = ()

    @classmethod
    def parse(cls, request: Request, texts: Mapping[str, tuple[bytes, ...]]) -> "GenerationLimits":
        """Read them from a request.

        Raises:
            RequestError: BAD_PARAMETER or BAD_SHAPE.
        """
        if request.flag("logits"):
            raise RequestError(
                Code.BAD_PARAMETER, "parameter 'logits' belongs to steps; a generation says tokens"
            )
        return cls(
            max_tokens=_count(request.parameters, MAX_TOKENS),
            ignore_eos=request.flag(IGNORE_EOS),
            interval=_count(request.parameters, STREAM_INTERVAL),
            stops=_stops(texts.get(STOP, ())),
        )


def _count(parameters: Mapping[str, Parameter], name: str) -> int:
    return parse_integer(parameters, name, 1, MOST, "a whole number of at least 1", default=1)


def _stops(given: tuple[bytes, ...]) -> tuple[str, ...]:
    if len(given) > MOST_STOPS:
        raise RequestError(
            Code.BAD_SHAPE,
            f"input {STOP!r} holds {len(given)} texts; expected at most {MOST_STOPS}",
        )
    texts = tuple(decoded(STOP, text) for text in given)
    for text in texts:
        if not 1 <= len(text) <= LONGEST_STOP:
            raise RequestError(
                Code.VALUE_RANGE,
                f"input {STOP!r} holds a text of {len(text)} characters; expected 1 to {LONGEST_STOP} of them",
            )
    return texts


def decoded(name: str, text: bytes) -> str:
    """UTF-8 text.

    Raises:
        RequestError: VALUE_RANGE, it is none.
    """
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise RequestError(Code.VALUE_RANGE, f"input {name!r} is no UTF-8 text: {error}") from None


def tokenized(
    tokenizer: Tokenizer | None, given: tuple[bytes, ...], capacity: int | None, *, start: bool
) -> Tensor:
    """The token ids of a request's text, ``[1, tokens]``; with the tokens that begin a text where it starts a sequence.

    Raises:
        RequestError: BAD_SHAPE, VALUE_RANGE, CAPACITY or EMPTY_INPUT; BAD_PARAMETER without a tokenizer.
    """
    if tokenizer is None:
        raise RequestError(
            Code.BAD_PARAMETER, "this model was built without a tokenizer: send 'input_ids'"
        )
    if len(given) != 1:
        raise RequestError(Code.BAD_SHAPE, f"input {TEXT!r} holds {len(given)} texts; expected 1")
    if capacity is not None and len(given[0]) > (most := BYTES_A_POSITION * capacity):
        raise RequestError(
            Code.CAPACITY,
            f"input {TEXT!r} has {len(given[0])} bytes, more than {most}: it does not fit {capacity} positions",
        )
    ids = tokenizer.encode(decoded(TEXT, given[0]), add_special_tokens=start).ids
    if not ids:
        raise RequestError(Code.EMPTY_INPUT, f"input {TEXT!r} has no tokens; send at least 1")
    return torch.tensor([ids])


class GenerationState:
    """The tokens that one request has said so far.

    Args:
        limits: what was asked for.
        eos: end tokens.
        stopper: turns tokens into text for `GenerationLimits.stops`; None where there are none.

    Attributes:
        said: how many tokens.
        token: the last of them; None before the first.
    """

    __slots__ = ("_eos", "_most", "_stopper", "_stops", "limits", "said", "token")

    def __init__(
        self, limits: GenerationLimits, eos: frozenset[int], stopper: Detokenizer | None
    ) -> None:
        self.limits = limits
        self._eos: frozenset[int] = frozenset() if limits.ignore_eos else eos
        self._stopper = stopper
        self._stops = StopMatcher(limits.stops)
        self._most = MOST
        self.said = 0
        self.token: int | None = None

    def begin(self, room: int | None) -> None:
        """The sequence has room for so many tokens beyond the prompt; None is no limit."""
        self._most = MOST if room is None else room

    @property
    def goes_on(self) -> bool:
        """Whether it says two more tokens at least, unless the next one ends it."""
        return self.said + 1 < min(self.limits.max_tokens, self._most)

    def add(self, token: int) -> tuple[str | None, FinishReason | None]:
        """The sequence said another token.

        Returns:
            The text that may be said now, None where it is what the token adds; and why this token is the last, None where it is not.
        """
        self.said += 1
        self.token = token
        reason = None
        if token in self._eos:
            reason = FinishReason.EOS
        elif self.said == self.limits.max_tokens:
            reason = FinishReason.LENGTH
        elif self.said == self._most:
            reason = FinishReason.CAPACITY
        if self._stopper is None:
            return "" if reason is FinishReason.EOS else None, reason
        piece = self._stops.add("" if reason is FinishReason.EOS else self._stopper.add([token]))
        if self._stops.hit:
            return piece, FinishReason.STOP
        return (piece + self.rest() if reason is not None else piece), reason

    def rest(self) -> str:
        """Text that was held back as the possible beginning of a stop text."""
        return self._stops.rest()
