"""How far a request of several calls is: what its schedule calls next, and what it has produced."""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from inplace.schema.programs import Program
from inplace.schema.schedule import Call, Loop
from inplace.schema.specs import JOINED_ROLES, Role


class CallOutputs:
    """The outputs of a call of a schedule's program, those that the schedule reads as lists.

    Attributes:
        tokens: outputs of the roles ``tokens`` and ``accepted`` by name: a list for each row,
            without negative numbers.
        program: the name of the program.
        accepted: how many entries of the tokens count, for each row; None if all do.
        done: outputs of the role ``done`` by name: a value for each row.
        values: all outputs but the tokens by name, ``[rows, ...]``.
    """

    __slots__ = ("accepted", "done", "program", "tokens", "values")

    def __init__(self, program: Program, outputs: Mapping[str, Tensor]) -> None:
        """Read them.

        Raises:
            ValueError: a number of accepted tokens is below 0 or above that of all.
        """
        self.program = program.name
        self.accepted: list[int] | None = None
        self.tokens: dict[str, list[list[int]]] = {}
        self.done: dict[str, list[bool]] = {}
        self.values: dict[str, Tensor] = {}
        for spec in program.outputs:
            if spec.name not in outputs:
                continue
            tensor = outputs[spec.name]
            if spec.role in JOINED_ROLES:
                rows = tensor.tolist()
                self.tokens[spec.name] = [[token for token in row if token >= 0] for row in rows]
                if spec.role is Role.ACCEPTED:
                    self.accepted = tensor.flatten().tolist()
                continue
            self.values[spec.name] = tensor
            if spec.role is Role.DONE:
                self.done[spec.name] = tensor.flatten().tolist()
        if self.accepted is not None:
            self._drop_tokens(program, outputs)

    def _drop_tokens(self, program: Program, outputs: Mapping[str, Tensor]) -> None:
        """Keep the tokens that count."""
        assert self.accepted is not None
        most = program.entries_per_call
        if wrong := [count for count in self.accepted if not 0 <= count <= most]:
            raise ValueError(f"program {program.name} accepts {wrong[0]} of {most} tokens")
        for spec in program.outputs:
            if spec.role is Role.TOKENS and spec.name in self.tokens:
                rows = zip(outputs[spec.name].tolist(), self.accepted, strict=True)
                self.tokens[spec.name] = [
                    [token for token in row[:count] if token >= 0] for row, count in rows
                ]


@dataclass(slots=True, eq=False)
class ScheduleProgress:
    """The place of a request in its schedule, and what its calls have produced.

    Attributes:
        loops: the schedule.
        loop, call: the indices of the next call.
        rounds: finished rounds of this loop.
        count: finished calls at this place, in this round.
        tokens: by output of the roles ``tokens`` and ``accepted``, what was produced and not taken
            yet.
        num_tokens: how many tokens were taken, of all such outputs.
        values: by program the last call's other outputs for all its rows, and the row.
        limited: what ended last was not done, it had reached its limit (``at_most``).
        chunks: of a stream, the inputs of further runs of the schedule.
        start_positions: `SequenceState.positions` when the request was admitted.
        start_audio: `SequenceState.audio` then.
        saved: the values of its sequence's states then, as far as taking its calls back needs them;
            None if they cannot be taken back.
    """

    loops: tuple[Loop, ...]
    loop: int = 0
    call: int = 0
    rounds: int = 0
    count: int = 0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    num_tokens: int = 0
    values: dict[str, tuple[Mapping[str, Tensor], int]] = field(default_factory=dict)
    limited: bool = False
    chunks: deque[Mapping[str, Tensor]] = field(default_factory=deque)
    start_positions: Mapping[str, int] = field(default_factory=dict)
    start_audio: Tensor | None = None
    saved: Mapping[str, Tensor] | None = None

    @property
    def next_call(self) -> Call:
        """What is called next; not after the end."""
        return self.loops[self.loop].calls[self.call]

    @property
    def finished(self) -> bool:
        """Whether the schedule has ended."""
        return self.loop == len(self.loops)

    def add(self, outputs: CallOutputs, row: int) -> bool:
        """Keep what a call produced in this row, and go to the next place.

        Returns:
            Whether that is another place than that of the call: it was the last one there.
        """
        for name, rows in outputs.tokens.items():
            if name in self.tokens:
                self.tokens[name] += rows[row]
            else:
                self.tokens[name] = list(rows[row])
        self.values[outputs.program] = outputs.values, row
        loop, call = self.loops[self.loop], self.next_call
        self.count += 1
        if not self._ends(call, self.count, outputs, row):
            return False
        self.count, self.call = 0, self.call + 1
        if self.call < len(loop.calls):
            return True
        self.call, self.rounds = 0, self.rounds + 1
        if self._ends(loop, self.rounds, outputs, row):
            self.rounds, self.loop = 0, self.loop + 1
        return True

    def _ends(self, each: Call | Loop, count: int, outputs: CallOutputs, row: int) -> bool:
        """Whether so many calls, or rounds, were the last ones."""
        if each.until is None:
            return count >= (each.at_most or 1)
        done = outputs.done[each.until][row]
        self.limited = not done
        return done or count >= (each.at_most or 1)

    def take_tokens(self) -> dict[str, list[int]]:
        """The tokens since the last time, by output; empty if there are none."""
        count = sum(map(len, self.tokens.values()))
        if not count:
            return {}
        self.num_tokens += count
        tokens, self.tokens = self.tokens, {name: [] for name in self.tokens}
        return tokens

    def answer(self, requested: Collection[str] | None = None) -> dict[str, Tensor]:
        """What the schedule produced: tokens ``[1, tokens]``, other outputs ``[1, ...]``.

        Without the tokens that were taken.

        Args:
            requested: names of outputs; None for all.
        """
        answer = {
            name: torch.from_numpy(np.array([tokens], dtype=np.int64))
            for name, tokens in self.tokens.items()
            if requested is None or name in requested
        }
        for outputs, row in self.values.values():
            for name, tensor in outputs.items():
                if requested is None or name in requested:
                    answer[name] = tensor[row : row + 1]
        return answer
