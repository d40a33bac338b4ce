"""A generation: its limits, its tokens so far, and whether the last token finishes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from inplace.drivers.detokenizer import Detokenizer, StopMatcher
from inplace.errors import Code, RequestError
from inplace.parameters import BY_NAME, MAX_COUNT
from inplace.protocol import (
    IGNORE_EOS,
    MAX_TOKENS,
    MIN_TOKENS,
    STOP,
    STOP_TOKEN_IDS,
    STREAM_INTERVAL,
)
from inplace.runtime.requests import Request

MAX_STOP_TEXTS, MAX_STOP_LENGTH = 16, 256
"""Stop texts of a request, and characters of each."""


class FinishReason(StrEnum):
    """Why a generation or a schedule finished, as clients read it in ``finish_reason``."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"
    CAPACITY = "capacity"
    CANCELLED = "cancelled"
    ENDED = "ended"
    DONE = "done"
    """A schedule has ended, and what it runs until was done."""


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """The parameters of a generation.

    Attributes:
        max_tokens: most tokens to generate.
        min_tokens: fewest tokens before one that ends the generation, and before a stop text.
        ignore_eos: continue after an end token.
        stream_interval: fewest tokens of a response, except the last.
        stop: texts that end the generation.
        stop_token_ids: tokens that end the generation, also with ``ignore_eos``.
    """

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stream_interval: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()

    @classmethod
    def parse(
        cls,
        request: Request,
        texts: Mapping[str, tuple[bytes, ...]],
        special_tokens: Mapping[str, int],
    ) -> Self:
        """Read them from a request.

        Args:
            request: its parameters are read.
            texts: its inputs of BYTES by name.
            special_tokens: ids of the tokenizer's special tokens by their text. A stop text that is
                one becomes a stop token: special tokens add no text that could match.

        Raises:
            RequestError: BAD_PARAMETER, BAD_SHAPE or VALUE_RANGE.
        """
        names = (MAX_TOKENS, MIN_TOKENS, IGNORE_EOS, STOP_TOKEN_IDS, STREAM_INTERVAL)
        values: dict[str, Any] = {
            name: BY_NAME[name].parse(request.parameters[name])
            for name in names
            if name in request.parameters
        }
        if values.get(MIN_TOKENS, 0) > values[MAX_TOKENS]:
            limits = f"at most {values[MAX_TOKENS]}, which is {MAX_TOKENS!r}"
            raise BY_NAME[MIN_TOKENS].refusal(request.parameters[MIN_TOKENS], limits)
        stop = _parse_stop(texts.get(STOP, ()))
        for text in stop:
            _check_stop_text(text, special_tokens)
        ids = {special_tokens[text] for text in stop if text in special_tokens}
        return cls(
            max_tokens=values[MAX_TOKENS],
            min_tokens=values.get(MIN_TOKENS, 0),
            ignore_eos=values.get(IGNORE_EOS, False),
            stream_interval=values.get(STREAM_INTERVAL, 1),
            stop=tuple(text for text in stop if text not in special_tokens),
            stop_token_ids=frozenset(ids.union(values.get(STOP_TOKEN_IDS, ()))),
        )


def _check_stop_text(text: str, special_tokens: Mapping[str, int]) -> None:
    """Refuse a text that has a special token and something else: it would never match."""
    if text in special_tokens:
        return
    if inside := next((token for token in special_tokens if token in text), None):
        raise RequestError(
            Code.VALUE_RANGE,
            f"input {STOP!r} holds {text!r}, which has the special token {inside!r} beside other"
            f" text: special tokens add no text, so it would never match; send {inside!r} alone",
        )


def _parse_stop(encoded: tuple[bytes, ...]) -> tuple[str, ...]:
    if len(encoded) > MAX_STOP_TEXTS:
        raise RequestError(
            Code.BAD_SHAPE,
            f"input {STOP!r} holds {len(encoded)} texts; expected at most {MAX_STOP_TEXTS}",
        )
    stop = tuple(decode_utf8(STOP, text) for text in encoded)
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise RequestError(
                Code.VALUE_RANGE,
                f"input {STOP!r} holds a text of {len(text)} characters; expected 1 to"
                f" {MAX_STOP_LENGTH} of them",
            )
    return stop


def decode_utf8(name: str, text: bytes) -> str:
    """The text of an input.

    Raises:
        RequestError: VALUE_RANGE, it is not UTF-8.
    """
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise RequestError(Code.VALUE_RANGE, f"input {name!r} is not UTF-8 text: {error}") from None


class GenerationState:
    """The tokens of a generation so far.

    Args:
        limits: its parameters.
        eos_token_ids: end tokens of the model.
        stop_detokenizer: makes the text that is searched for `GenerationLimits.stop`; None without
            stop texts.

    Attributes:
        limits: its parameters.
        num_tokens: how many tokens were generated.
        last_token: the last of them; None before the first.
        end_token_ids: the tokens that end it.
    """

    __slots__ = (
        "_eos_token_ids",
        "_max_new_tokens",
        "_stop_detokenizer",
        "_stop_matcher",
        "end_token_ids",
        "last_token",
        "limits",
        "num_tokens",
    )

    def __init__(
        self,
        limits: GenerationLimits,
        eos_token_ids: frozenset[int],
        stop_detokenizer: Detokenizer | None,
    ) -> None:
        self.limits = limits
        self._eos_token_ids: frozenset[int] = frozenset() if limits.ignore_eos else eos_token_ids
        self.end_token_ids = self._eos_token_ids | limits.stop_token_ids
        self._stop_detokenizer = stop_detokenizer
        self._stop_matcher = StopMatcher(limits.stop)
        self._max_new_tokens = MAX_COUNT
        self.num_tokens = 0
        self.last_token: int | None = None

    def continue_text(self, prompt: list[int]) -> None:
        """Let the text that is searched for stop texts go on behind these tokens."""
        if self._stop_detokenizer is not None:
            self._stop_detokenizer = self._stop_detokenizer.after(prompt)

    def set_room(self, room: int | None) -> None:
        """Set how many positions the sequence has left after the prompt; None if unlimited."""
        self._max_new_tokens = MAX_COUNT if room is None else room

    @property
    def expects_two_more(self) -> bool:
        """Whether the limits of length allow two more tokens.

        The step after the next one can then be launched before the next token is known. That token
        may still end the generation: an end or stop token, or one that completes a stop text.
        """
        return self.num_tokens + 1 < min(self.limits.max_tokens, self._max_new_tokens)

    def append(self, token: int) -> tuple[str | None, FinishReason | None]:
        """Add a generated token.

        Returns:
            The text that can be sent now, or None if the reply's detokenizer makes it; and why this
            token is the last, or None if it is not.
        """
        self.num_tokens += 1
        self.last_token = token
        reason = None
        if token in self.limits.stop_token_ids:
            reason = FinishReason.STOP
        elif token in self._eos_token_ids:
            reason = FinishReason.EOS
        elif self.num_tokens == self.limits.max_tokens:
            reason = FinishReason.LENGTH
        elif self.num_tokens == self._max_new_tokens:
            reason = FinishReason.CAPACITY
        adds_no_text = reason in (FinishReason.STOP, FinishReason.EOS)
        if self._stop_detokenizer is None:
            return "" if adds_no_text else None, reason
        piece = "" if adds_no_text else self._stop_detokenizer.append([token])
        early = self.num_tokens <= self.limits.min_tokens  # no stop text is looked for in it
        text = piece if early else self._stop_matcher.append(piece)
        if self._stop_matcher.matched:
            return text, FinishReason.STOP
        return (text + self.flush_text() if reason is not None else text), reason

    def flush_text(self) -> str:
        """Return the text that was held back: an incomplete character, a possible stop text."""
        if self._stop_detokenizer is None or self._stop_matcher.matched:
            return self._stop_matcher.flush()
        return (
            self._stop_matcher.append(self._stop_detokenizer.flush()) + self._stop_matcher.flush()
        )
