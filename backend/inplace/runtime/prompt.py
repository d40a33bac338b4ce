"""Log-probabilities of the tokens that a request feeds: how they are computed and put together.

A program of its own computes them, in the place of the step. A step with rows that ask for them is
launched in two parts, so that the other rows are computed as always.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from inplace.engines import Finish, StepEngine
from inplace.protocol import (
    PROMPT_RANKS,
    PROMPT_TOKEN_LOGPROBS,
    PROMPT_TOKENS,
    PROMPT_TOP_LOGPROBS,
    PROMPT_TOP_TOKENS,
)
from inplace.schema.specs import PROMPT_LOGPROB_ROLES

TOKEN_OUTPUTS = frozenset(role.value for role in PROMPT_LOGPROB_ROLES)
"""Names of the outputs that have an entry for each token."""


TOP_OUTPUTS = frozenset({PROMPT_TOP_LOGPROBS, PROMPT_TOP_TOKENS})
"""The outputs that only a parameter above 0 asks for."""


UNKNOWN = {
    PROMPT_TOKEN_LOGPROBS: float("nan"),
    PROMPT_RANKS: 0,
    PROMPT_TOP_LOGPROBS: float("nan"),
    PROMPT_TOP_TOKENS: -1,
}
"""The entry of a token of which no log-probability is known: the first one of a request."""


class PromptLogprobs:
    """What a request with the parameter ``prompt_logprobs`` is answered with.

    A step has the log-probabilities of the tokens behind those that it feeds, so the first token of
    a request has none; but if the sequence has a pending token, that is fed before it.

    Args:
        tokens: the token ids of the request, ``[tokens]``.
        number: how many of the most likely tokens it asks for.
        pending: a pending token is fed before them.
    """

    def __init__(self, tokens: Tensor, number: int, *, pending: bool) -> None:
        self._tokens, self._number = tokens, number
        self._missing = 0 if pending else min(1, len(tokens))
        self._left = len(tokens) - self._missing
        self._chunks: dict[str, list[Tensor]] = {name: [] for name in UNKNOWN}

    def add(self, outputs: Mapping[str, Tensor], begin: int, count: int) -> None:
        """Add what a step has for the tokens of one row.

        Args:
            outputs: of all tokens of the step, ``[tokens, ...]``.
            begin: the row's first token in it.
            count: how many tokens of the row it has fed.
        """
        count = min(count, self._left)  # nothing follows the last token
        self._left -= count
        for name, chunks in self._chunks.items():
            part = outputs[name][begin : begin + count]
            if part.dim() == 2:
                part = part[:, : self._number]
            chunks.append(part.clone())  # not a view, which would keep the whole step's

    def outputs(self) -> dict[str, Tensor]:
        """The outputs, ``[1, tokens]`` and ``[1, tokens, number]``, in the order of the tokens."""
        answer = {PROMPT_TOKENS: self._tokens[None]}
        for name, chunks in self._chunks.items():
            whole_numbers = isinstance(UNKNOWN[name], int)
            dtype = torch.int64 if whole_numbers else torch.float32
            is_top = name in TOP_OUTPUTS
            if is_top and not self._number:
                continue
            shape = (self._missing, self._number) if is_top else (self._missing,)
            first = torch.full(shape, UNKNOWN[name], dtype=dtype)
            answer[name] = torch.cat([first, *chunks])[None]
        return answer


@dataclass(frozen=True)
class StepPart:
    """The rows of a step that one program runs.

    Attributes:
        engine: runs the program.
        inputs: its inputs.
        rows: which rows of the step they are.
    """

    engine: StepEngine
    inputs: Mapping[str, Tensor]
    rows: list[int]


def launch_parts(
    parts: Sequence[StepPart], _: Mapping[str, Tensor], requested: Collection[str]
) -> Finish:
    """Launch all parts of a step, see `inplace.engines.base.StepEngine.launch`.

    Args:
        parts: the first one's outputs for each token are returned too.
        requested: names of the outputs for each row.
    """
    finishes: list[Finish] = []
    for index, part in enumerate(parts):
        names = {*requested, *TOKEN_OUTPUTS} if index == 0 else requested
        try:
            finishes.append(part.engine.launch(part.inputs, names))
        except Exception as error:  # raised when the parts before have been waited for
            finishes.append(partial(_fail, error))
    return partial(_finish_parts, parts, finishes)


def _fail(error: Exception, _: AbstractContextManager[object]) -> dict[str, Tensor]:
    raise error


def _finish_parts(
    parts: Sequence[StepPart],
    finishes: Sequence[Finish],
    while_waiting: AbstractContextManager[object],
) -> dict[str, Tensor]:
    """Wait for all parts; their outputs together, in the order of the step's rows."""
    results: list[dict[str, Tensor]] = []
    failure: Exception | None = None
    for finish in finishes:
        try:
            results.append(finish(while_waiting))
        except Exception as error:  # the other parts are waited for all the same
            failure = failure or error
    if failure is not None:
        raise failure
    order = torch.tensor([row for part in parts for row in part.rows]).argsort()
    tokens = {name: tensor for name, tensor in results[0].items() if name in TOKEN_OUTPUTS}
    rows = {
        name: torch.cat([result[name] for result in results])[order]
        for name in results[0]
        if name not in TOKEN_OUTPUTS
    }
    return rows | tokens
