"""Random small modules with random states and updates: eager PyTorch against the rewritten graph."""

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from state_modules import compare, operators
from torch import Tensor, nn

CAPACITY, STEPS = 24, 10

APPENDS = ("slice", "index_copy", "assign", "scatter", "where", "select")
REPLACES = ("window", "add", "copy", "roll")


class Composed(nn.Module):
    """Writes each state in its own ways, one after another, and looks at every version."""

    def __init__(self, plan: list[tuple[int, tuple[str, ...]]], looks: bool) -> None:
        super().__init__()
        self.plan, self.looks = plan, looks

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        *states, x, pos = arguments
        seen: list[Tensor] = []
        for state, (axis, writes) in zip(states, self.plan, strict=True):
            for count, write in enumerate(writes):
                if self.looks:
                    seen.append(state.to(torch.float32).sum(axis))
                _write(state, axis, write, x * (count + 1), pos + count)
        return (*seen, *(state.to(torch.float32).amax(axis) for state, (axis, _) in zip(states, self.plan, strict=True)))


def _write(state: Tensor, axis: int, write: str, x: Tensor, pos: Tensor) -> None:
    extents = list(state.shape)
    extents[axis] = 1
    new = x.expand(extents).to(state.dtype)
    column = [1] * state.dim()
    column[axis] = -1
    if write == "slice":
        state.narrow(axis, 3, 1).copy_(new)
    elif write == "select":
        state.select(axis, -2).copy_(new.squeeze(axis))
    elif write == "index_copy":
        state.index_copy_(axis, pos, new)
    elif write == "assign":
        state[(slice(None),) * axis + (pos,)] = new
    elif write == "scatter":
        state.scatter_(axis, pos.view([1] * state.dim()).expand(extents), new)
    elif write == "where":
        state.copy_(torch.where((torch.arange(state.shape[axis]) == pos).view(column), new, state))
    elif write == "window":
        state.copy_(torch.cat([state.narrow(axis, 1, state.shape[axis] - 1), new], axis))
    elif write == "add":
        state.add_(1)
    elif write == "copy":
        state.copy_(new.expand(state.shape))
    else:
        state.copy_(state.roll(1, axis))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], Composed]:
    states, plan = [], []
    for _ in range(draw(st.integers(1, 3))):
        rank = draw(st.integers(1, 4))
        leading = rank > 1 and draw(st.booleans())
        axis = draw(st.integers(int(leading), rank - 1))
        extents = [draw(st.integers(2, 3)) for _ in range(rank)]
        if leading:
            extents[0] = 1
        extents[axis] = CAPACITY
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.float64]))
        states.append(torch.zeros(extents, dtype=dtype))
        kinds = draw(st.sampled_from([APPENDS, REPLACES]))
        plan.append((axis, tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3)))))
    return states, Composed(plan, draw(st.booleans()))


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_random_modules_do_as_in_eager(case: tuple[list[Tensor], Composed]) -> None:
    states, module = case

    def inputs(step: int) -> tuple[Any, ...]:
        return torch.randint(-9, 9, (1,), generator=torch.Generator().manual_seed(step)).float(), torch.tensor([step])

    capture = compare(module, states, inputs, steps=STEPS)
    for state, (axis, writes) in zip(capture.states, module.plan, strict=True):
        if set(writes) <= set(APPENDS):
            assert state.pattern not in ("explicit", "replace"), (axis, writes, state.because)
            assert state.axis == axis - state.leading
    appended = sum(len(writes) for _, writes in module.plan if set(writes) <= set(APPENDS))
    replaced = sum(set(writes) <= set(REPLACES) for _, writes in module.plan)
    assert operators(capture)["update"] == appended + replaced
