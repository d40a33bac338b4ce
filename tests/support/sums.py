"""A stream that is summed: programs that requests with different flags and inputs run."""

from typing import Any

import torch
from inplace_builder import Call, ProgramsCapture, Role, RowOptions, Schedule, capture_programs
from torch import Tensor, nn

CHUNK = 4


class Total(nn.Module):
    """The sum of a stream."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1))


class Add(nn.Module):
    """Adds the valid entries of a chunk."""

    def __init__(self, shared: Total) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, entries: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        valid = torch.arange(CHUNK) < length
        self.shared.total.add_(torch.where(valid, entries, 0.0).sum(1))
        return self.shared.total.round().to(torch.int64).abs(), length * 1


class Set(nn.Module):
    """Sets the sum."""

    def __init__(self, shared: Total) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, value: Tensor) -> Tensor:
        self.shared.total.copy_(value)
        return value * 1


class Flush(nn.Module):
    """The sum, from 1000, and clears it."""

    def __init__(self, shared: Total) -> None:
        super().__init__()
        self.shared = shared

    def forward(self) -> Tensor:
        last = 1000 + self.shared.total.round().to(torch.int64).abs()
        self.shared.total.zero_()
        return last


SCHEDULES = [
    Schedule(name="chunk", calls=(Call(program="add"),), requests=("start", "next")),
    Schedule(name="set", calls=(Call(program="set"), Call(program="add")), requests=("next",)),
    Schedule(name="last", calls=(Call(program="add"), Call(program="flush")), requests=("end",)),
    Schedule(name="flush", calls=(Call(program="flush"),), requests=("end",)),
]


def capture_sums(schedules: list[Schedule], **options: Any) -> ProgramsCapture:
    shared = Total()
    add = RowOptions(
        max_rows=4,
        outputs=("tokens", "counted"),
        valid_lengths={"length": "entries"},
        roles={"tokens": Role.TOKENS},
        **options,
    )
    flush = RowOptions(max_rows=4, outputs=("last",), roles={"last": Role.TOKENS})
    programs = {
        "add": (Add(shared), add, (torch.ones(1, CHUNK), torch.full((1,), CHUNK))),
        "set": (Set(shared), RowOptions(max_rows=4, outputs=("was_set",)), (torch.zeros(1),)),
        "flush": (Flush(shared), flush, ()),
    }
    called = frozenset[str]().union(*(each.programs for each in schedules))
    return capture_programs(
        {name: program for name, program in programs.items() if name in called}, schedules
    )
