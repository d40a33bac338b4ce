"""The batcher: from admitted requests to the tensors of one step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from inplace.errors import RequestError
from inplace.manifest import Program
from inplace.requests import Request
from inplace.sampling import GREEDY, Sampling
from inplace.sequences import Sequence
from inplace.specs import Role


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
        done: tokens that steps have consumed.
        outputs: what the last of its steps returned, by output name, ``[1, ...]``; empty until then.
        error: why the engine could not finish it.
    """

    request: Request
    sequence: Sequence
    inputs: dict[str, Tensor]
    tokens: int
    before: int
    sampling: Sampling = GREEDY
    done: int = 0
    outputs: dict[str, Tensor] = field(default_factory=dict)
    error: RequestError | None = None

    @property
    def finished(self) -> bool:
        """It can be answered: every token was consumed, or the engine failed."""
        return self.done == self.tokens or self.error is not None


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


def form(program: Program, rows: list[Work]) -> Batch:
    """The next step of these rows, packed behind one another: at most ``program.chunk`` tokens of each, ``program.token_budget`` of all."""
    counts = _counts([work.tokens - work.done for work in rows], program.chunk, program.token_budget)
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    lengths = [work.sequence.length for work in rows]
    # what a row that still has tokens waiting says is dropped: it need not pay for choosing at random
    sampling = [work.sampling if work.done + count == work.tokens else GREEDY for work, count in zip(rows, counts, strict=True)]
    inputs: dict[str, Tensor] = {}
    for spec in program.inputs:
        dtype = spec.dtype.as_torch
        match spec.role:
            case Role.TOKENS:
                parts = [work.inputs[spec.name][work.done : work.done + count] for work, count in zip(rows, counts, strict=True)]
                tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            case Role.ROW:
                tensor = torch.stack([work.inputs[spec.name] for work in rows])
            case Role.POSITIONS:
                tensor = torch.tensor(
                    [position for length, count in zip(lengths, counts, strict=True) for position in range(length, length + count)],
                    dtype=dtype,
                )
            case Role.ROW_OFFSETS:
                tensor = torch.tensor(offsets, dtype=dtype)
            case Role.LAST_TOKENS:
                tensor = torch.tensor([offset - 1 for offset in offsets[1:]], dtype=dtype)
            case Role.SLOTS:
                tensor = torch.tensor([work.sequence.slot for work in rows], dtype=dtype)
            case Role.WRITE_INDICES:
                tensor = torch.tensor(lengths, dtype=dtype)
            case Role.NEXT_POSITIONS:
                tensor = torch.tensor([length + count for length, count in zip(lengths, counts, strict=True)], dtype=dtype)
            case Role.TEMPERATURE | Role.TOP_K | Role.TOP_P | Role.SEED:  # named as the attributes of `Sampling`
                tensor = torch.tensor([getattr(each, spec.role) for each in sampling], dtype=dtype)
        inputs[spec.name] = tensor
    return Batch(rows, counts, inputs)


def _counts(waiting: list[int], chunk: int, budget: int) -> list[int]:
    """How many of its waiting tokens each row brings: at least one each, then as many as the budget allows, in order."""
    counts, left = [], budget - len(waiting)
    for tokens in waiting:
        more = min(tokens, chunk, 1 + left) - 1
        left -= more
        counts.append(1 + more)
    return counts
