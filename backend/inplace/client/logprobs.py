"""Log-probabilities in the answers of a model: of tokens that it chose, and of a request's own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inplace.protocol import (
    PROMPT_OUTPUTS,
    PROMPT_TOKENS,
    PROMPT_TOP_TOKENS,
    TOKEN_LOGPROBS,
    TOP_LOGPROBS,
    TOP_TOKENS,
)

Array = NDArray[np.generic]


def keep_own_tokens(outputs: Mapping[str, Array], count: int | None) -> dict[str, Array]:
    """Leave out of `PROMPT_OUTPUTS` what was fed before the last ``count`` tokens; None: nothing.

    A replay feeds the tokens of a sequence and those of a request at once.
    """
    return {
        name: array
        if count is None or name not in PROMPT_OUTPUTS
        else array[len(array) - min(count, len(array)) :]
        for name, array in outputs.items()
    }


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, before temperature, penalties, biases and masks.

    Attributes:
        token: the token.
        logprob: its natural logarithm of the probability.
        top: the most likely tokens with theirs, in order; as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def decode_logprobs(outputs: Mapping[str, Array], tokens: Sequence[int]) -> list[TokenLogprob]:
    """The log-probabilities of these tokens of a response; empty where there are none."""
    if TOKEN_LOGPROBS not in outputs:
        return []
    values = outputs[TOKEN_LOGPROBS].reshape(-1)
    top: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if TOP_TOKENS in outputs and len(tokens):
        shape = (len(tokens), -1)
        ids, numbers = (outputs[name].reshape(shape) for name in (TOP_TOKENS, TOP_LOGPROBS))
        top = [
            tuple((int(token), float(number)) for token, number in zip(*pair, strict=True))
            for pair in zip(ids, numbers, strict=True)
        ]
    return [
        TokenLogprob(token, float(value), likely)
        for token, value, likely in zip(tokens, values, top, strict=True)
    ]


@dataclass(frozen=True)
class PromptLogprob:
    """The log-probability of a token that a request fed, given all tokens before it.

    Attributes:
        token: the token.
        logprob: the natural logarithm of its probability; None where the server does not know it:
            of the first token of a request.
        rank: 1 for the most likely token in its place; None as ``logprob``.
        top: the most likely tokens with their log-probabilities, in order; as many as were asked
            for.
    """

    token: int
    logprob: float | None
    rank: int | None
    top: tuple[tuple[int, float], ...] = ()


def decode_prompt_logprobs(outputs: Mapping[str, Array]) -> list[PromptLogprob]:
    """The log-probabilities of a request's own tokens, in order.

    Args:
        outputs: the outputs of a request with the parameter ``prompt_logprobs``, as
            `AsyncSequence.step` returns them; of a request without, the list is empty.
    """
    if PROMPT_TOKENS not in outputs:
        return []
    tokens, logprobs, ranks = (outputs[name].reshape(-1).tolist() for name in PROMPT_OUTPUTS[:3])
    top: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if PROMPT_TOP_TOKENS in outputs and tokens:
        shape = (len(tokens), -1)
        values, ids = (outputs[name].reshape(shape).tolist() for name in PROMPT_OUTPUTS[3:])
        top = [tuple(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return [
        PromptLogprob(token, None, None)
        if math.isnan(logprob)
        else PromptLogprob(token, logprob, rank, likely)
        for token, logprob, rank, likely in zip(tokens, logprobs, ranks, top, strict=True)
    ]
