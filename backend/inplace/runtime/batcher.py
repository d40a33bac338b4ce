"""The batcher: from admitted requests to the tensors of one step."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inplace.errors import RequestError
from inplace.runtime.requests import Request
from inplace.runtime.sampling import GREEDY, Sampling
from inplace.runtime.slots import SequenceState
from inplace.schema.served import Program
from inplace.schema.specs import Role, TensorSpec

NOTHING: tuple[Mapping[str, Tensor], int] = ({}, 0)


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """An admitted request on its way through one or more steps.

    Attributes:
        request: what was asked.
        sequence: whose slot it works on.
        inputs: the checked tensors, without a batch axis.
        tokens: how many tokens they bring.
        before: the sequence's length when it was admitted.
        sampling: how its next token is chosen.
        wanted: the outputs to compute when its tokens are consumed.
        done: tokens that steps have consumed.
        pending: the token of an earlier generation that goes in front of ``inputs``, as part of them.
        token: the one token to feed instead of ``inputs``: what the sequence itself has said. Only where a program is a language model.
        found: what the last of its steps returned for all rows, by output name, ``[rows, ...]``; and which of them it was.
        error: why the engine could not finish it.
        over: nobody waits for it any more: what a step that is under way still brings is dropped.
    """

    request: Request
    sequence: SequenceState
    inputs: Mapping[str, Tensor]
    tokens: int
    before: int
    sampling: Sampling = GREEDY
    wanted: frozenset[str] = frozenset()
    done: int = 0
    pending: int | None = None
    token: int | None = None
    found: tuple[Mapping[str, Tensor], int] = NOTHING
    error: RequestError | None = None
    over: bool = False

    @property
    def finished(self) -> bool:
        """It can be answered: every token was consumed, or the engine failed."""
        return self.done == self.tokens or self.error is not None

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What it wanted to know, by output name, ``[1, ...]``; empty until its tokens are consumed."""
        tensors, row = self.found
        return {
            name: tensor[row : row + 1] for name, tensor in tensors.items() if name in self.wanted
        }

    def feed(self, token: int) -> None:
        """Go on with the token that was said."""
        self.token, self.tokens, self.done = token, 1, 0


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: some rows, each with its next tokens.

    Attributes:
        rows: the work of each row.
        counts: how many tokens each row brings.
        inputs: the program's inputs by name, in the program's order, on the host.
    """

    rows: list[ActiveRequest]
    counts: list[int]
    inputs: dict[str, Tensor]


def form(program: Program, rows: list[ActiveRequest], budget: int | None = None) -> Batch:
    """The next step of these rows, packed behind one another: at most ``program.chunk`` tokens of each.

    Args:
        program: what runs.
        rows: at most as many as it takes.
        budget: most tokens of all of them, at least their number; None is ``program.token_budget``.
    """
    waiting = [work.tokens - work.done for work in rows]
    counts = _counts(waiting, program.chunk, program.token_budget if budget is None else budget)
    lengths = np.array([work.sequence.length for work in rows], dtype=np.int64)
    if counts is waiting:
        offsets, positions, next_positions = _counted(len(rows) + 1), lengths, lengths + 1
    else:
        each = np.array(counts, dtype=np.int64)
        offsets = np.concatenate(([0], np.cumsum(each)))
        positions = np.repeat(lengths - offsets[:-1], each) + _counted(int(offsets[-1]))
        next_positions = lengths + each
    # what a row that still has tokens waiting says is dropped: it need not pay for choosing at random
    sampling = [
        work.sampling if left == count else GREEDY
        for work, left, count in zip(rows, waiting, counts, strict=True)
    ]
    greedy = all(each is GREEDY for each in sampling)
    inputs: dict[str, Tensor] = {}
    values: NDArray[Any]
    for spec in program.inputs:
        match spec.role:
            case Role.TOKENS:
                inputs[spec.name] = _tokens(spec, rows, counts)
                continue
            case Role.ROW:
                inputs[spec.name] = torch.stack([work.inputs[spec.name] for work in rows])
                continue
            case Role.POSITIONS:
                values = positions
            case Role.ROW_OFFSETS:
                values = offsets
            case Role.LAST_TOKENS:
                values = offsets[1:] - 1
            case Role.SLOTS:
                values = np.array([work.sequence.slot for work in rows])
            case Role.WRITE_INDICES:
                values = lengths
            case Role.NEXT_POSITIONS:
                values = next_positions
            case _:  # named as the attributes of `Sampling`
                chosen = (
                    [getattr(GREEDY, spec.role)] * len(rows)
                    if greedy
                    else [getattr(each, spec.role) for each in sampling]
                )
                values = np.array(chosen, dtype=spec.dtype.value)
        inputs[spec.name] = torch.from_numpy(values.astype(spec.dtype.value, copy=False))
    return Batch(rows, counts, inputs)


ADVANCING = (Role.POSITIONS, Role.WRITE_INDICES, Role.NEXT_POSITIONS)


def follow(program: Program, batch: Batch, said: Tensor) -> Batch:
    """The step after one of single tokens: the same rows, each with the token that it has said.

    Args:
        program: what runs; a language model.
        batch: the step before.
        said: the token of each row, ``[rows, 1]``.
    """
    found = dict(batch.inputs)
    for spec in program.inputs:
        if spec.role is Role.TOKENS:
            found[spec.name] = said.flatten().to(spec.dtype.as_torch)
        elif spec.role in ADVANCING:
            found[spec.name] = torch.from_numpy(found[spec.name].numpy() + 1)
    return Batch(batch.rows, batch.counts, found)


@cache
def _counted(end: int) -> NDArray[np.int64]:
    """0, 1, …; to be read only. Kept, for `numpy.arange` hands the interpreter over to threads that wait for it."""
    return np.arange(end)


def _tokens(spec: TensorSpec, rows: list[ActiveRequest], counts: list[int]) -> Tensor:
    """The next tokens of all rows; what sequences said themselves is put together by the run, not by the row."""
    said: list[int] = []
    parts: list[Tensor] = []
    for work, count in zip(rows, counts, strict=True):
        if work.token is not None:
            said.append(work.token)
            continue
        if said:
            parts.append(torch.from_numpy(np.array(said)))
            said = []
        tensor = work.inputs[spec.name]
        parts.append(tensor if count == tensor.shape[0] else tensor[work.done : work.done + count])
    if said:
        parts.append(torch.from_numpy(np.array(said)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _counts(waiting: list[int], chunk: int, budget: int) -> list[int]:
    """How many of its waiting tokens each row brings: at least one each, then as many as the budget allows, in order."""
    if max(waiting) == 1:
        return waiting
    counts, left = [], budget - len(waiting)
    for tokens in waiting:
        more = min(tokens, chunk, 1 + left) - 1
        left -= more
        counts.append(1 + more)
    return counts
