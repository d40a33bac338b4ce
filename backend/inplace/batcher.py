"""The batcher: from admitted requests to the tensors of one step."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inplace.errors import RequestError
from inplace.manifest import Program
from inplace.requests import Request
from inplace.sampling import GREEDY, Sampling
from inplace.sequences import Sequence
from inplace.specs import Role, TensorSpec

NOTHING: tuple[Mapping[str, Tensor], int] = ({}, 0)


@dataclass(slots=True, eq=False)
class Work:
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
    """

    request: Request
    sequence: Sequence
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

    @property
    def finished(self) -> bool:
        """It can be answered: every token was consumed, or the engine failed."""
        return self.done == self.tokens or self.error is not None

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What it wanted to know, by output name, ``[1, ...]``; empty until its tokens are consumed."""
        tensors, row = self.found
        return {name: tensor[row : row + 1] for name, tensor in tensors.items() if name in self.wanted}

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

    rows: list[Work]
    counts: list[int]
    inputs: dict[str, Tensor]


def form(program: Program, rows: list[Work], budget: int | None = None) -> Batch:
    """The next step of these rows, packed behind one another: at most ``program.chunk`` tokens of each.

    Args:
        program: what runs.
        rows: at most as many as it takes.
        budget: most tokens of all of them, at least their number; None is ``program.token_budget``.
    """
    waiting = [work.tokens - work.done for work in rows]
    counts = _counts(waiting, program.chunk, program.token_budget if budget is None else budget)
    lengths = np.array([work.sequence.length for work in rows], dtype=np.int64)
    each = np.array(counts, dtype=np.int64)
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(each, out=offsets[1:])
    positions: NDArray[np.int64] = lengths
    if len(rows) < offsets[-1]:
        positions = np.repeat(lengths - offsets[:-1], each) + np.arange(offsets[-1])
    # what a row that still has tokens waiting says is dropped: it need not pay for choosing at random
    sampling = [work.sampling if left == count else GREEDY for work, left, count in zip(rows, waiting, counts, strict=True)]
    inputs: dict[str, Tensor] = {}
    for spec in program.inputs:
        match spec.role:
            case Role.TOKENS:
                inputs[spec.name] = _tokens(spec.name, rows, counts)
            case Role.ROW:
                inputs[spec.name] = torch.stack([work.inputs[spec.name] for work in rows])
            case Role.POSITIONS:
                inputs[spec.name] = _tensor(positions, spec)
            case Role.ROW_OFFSETS:
                inputs[spec.name] = _tensor(offsets, spec)
            case Role.LAST_TOKENS:
                inputs[spec.name] = _tensor(offsets[1:] - 1, spec)
            case Role.SLOTS:
                inputs[spec.name] = torch.tensor([work.sequence.slot for work in rows], dtype=spec.dtype.as_torch)
            case Role.WRITE_INDICES:
                inputs[spec.name] = _tensor(lengths, spec)
            case Role.NEXT_POSITIONS:
                inputs[spec.name] = _tensor(lengths + each, spec)
            case Role.TEMPERATURE | Role.TOP_K | Role.TOP_P | Role.SEED:  # named as the attributes of `Sampling`
                inputs[spec.name] = torch.tensor([getattr(each_row, spec.role) for each_row in sampling], dtype=spec.dtype.as_torch)
    return Batch(rows, counts, inputs)


def _tokens(name: str, rows: list[Work], counts: list[int]) -> Tensor:
    """The next tokens of all rows; what sequences said themselves is put together by the run, not by the row."""
    parts: list[Tensor] = []
    said: list[int] = []
    for work, count in zip(rows, counts, strict=True):
        if work.token is not None:
            said.append(work.token)
            continue
        if said:
            parts.append(torch.tensor(said))
            said = []
        tensor = work.inputs[name]
        parts.append(tensor if count == len(tensor) else tensor[work.done : work.done + count])
    if said:
        parts.append(torch.tensor(said))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tensor(values: NDArray[np.int64], spec: TensorSpec) -> Tensor:
    return torch.from_numpy(values).to(spec.dtype.as_torch)


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
