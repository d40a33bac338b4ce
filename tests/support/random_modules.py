"""Small random modules with random states, and modules that no engine can be built of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn

CAPACITY, STEPS = 24, 20

APPENDS = ("slice", "index_copy", "assign", "scatter", "where", "select", "two")
REPLACES = ("window", "add", "copy", "roll", "decay")
EXPLICIT = ("strided", "shuffled", "accumulated", "unaliased")
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool,
    torch.complex64,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One state: extents, type, axis of writes, the writes, its owner, whether returned."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int
    writes: tuple[str, ...]
    owned: bool
    returned: bool = False

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)


class Composed(nn.Module):
    """Writes each state in its own ways, one after another, and looks at every version."""

    def __init__(self, plans: Sequence[Plan], *, looks: bool) -> None:
        super().__init__()
        self.plans, self.looks = tuple(plans), looks
        self.scale = nn.Linear(1, 1)
        for index, plan in enumerate(plans):
            if plan.owned:
                self.register_buffer(f"state_{index}", plan.zeros())

    def forward(self, states: Any, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        given = iter(states.values() if isinstance(states, dict) else states)
        all_states = [
            self.get_buffer(f"state_{i}") if plan.owned else next(given)
            for i, plan in enumerate(self.plans)
        ]
        seen: list[Tensor] = [self.scale(x)]
        for state, plan in zip(all_states, self.plans, strict=True):
            for count, write in enumerate(plan.writes):
                if self.looks:
                    seen.append(seen_as(state).sum(plan.axis))
                write_state(state, plan.axis, write, x * (count + 1), pos + count)
        pairs = list(zip(all_states, self.plans, strict=True))
        returned = [state for state, plan in pairs if plan.returned]
        return (*seen, *(seen_as(state).amax(plan.axis) for state, plan in pairs), *returned)


def seen_as(state: Tensor) -> Tensor:
    """What is looked at of a state."""
    return (state.real + state.imag if state.is_complex() else state).to(torch.float32)


Way = Callable[[Tensor, int, Tensor, Tensor], object]
"""Writes a state along an axis: the new entry (extent 1 on that axis), and its position ``[1]``."""


def at(axis: int, index: Any) -> tuple[Any, ...]:
    """An index on one axis."""
    return (*(slice(None),) * axis, index)


def _masked(state: Tensor, axis: int, new: Tensor, pos: Tensor) -> None:
    column = [1] * state.dim()
    column[axis] = -1
    state.copy_(torch.where((torch.arange(state.shape[axis]) == pos).view(column), new, state))


def _decayed(state: Tensor, new: Tensor) -> Tensor:
    if state.dtype is torch.bool:
        return state | new
    return (
        state * 0.5 + new if state.is_floating_point() else state - new
    )  # TensorRT has no bits of integers


WAYS: dict[str, Way] = {
    "slice": lambda state, axis, new, pos: state.narrow(axis, 3, 1).copy_(new),
    "select": lambda state, axis, new, pos: state.select(axis, -2).copy_(new.squeeze(axis)),
    "index_copy": lambda state, axis, new, pos: state.index_copy_(axis, pos, new),
    "two": lambda state, axis, new, pos: state.index_copy_(
        axis, pos + torch.arange(2), torch.cat([new, new], axis)
    ),
    "assign": lambda state, axis, new, pos: state.__setitem__(at(axis, pos), new),
    "scatter": lambda state, axis, new, pos: state.scatter_(
        axis, pos.view([1] * state.dim()).expand(new.shape), new
    ),
    "where": _masked,
    "window": lambda state, axis, new, pos: state.copy_(
        torch.cat([state.narrow(axis, 1, state.shape[axis] - 1), new], axis)
    ),
    "add": lambda state, axis, new, pos: state.add_(1),
    "decay": lambda state, axis, new, pos: state.copy_(_decayed(state, new)),
    "copy": lambda state, axis, new, pos: state.copy_(new.expand(state.shape)),
    "roll": lambda state, axis, new, pos: state.copy_(state.roll(1, axis)),
    "strided": lambda state, axis, new, pos: state.__setitem__(at(axis, slice(None, None, 2)), new),
    "shuffled": lambda state, axis, new, pos: state.__setitem__(
        at(axis, torch.cat([pos, 2 * pos + 1]) % CAPACITY), new
    ),
    "accumulated": lambda state, axis, new, pos: state.index_put_(
        (*[torch.tensor([0])] * axis, pos), new.flatten()[:1], accumulate=True
    ),
    "unaliased": lambda state, axis, new, pos: state.copy_((state + 0).index_copy(axis, pos, new)),
}


def write_state(state: Tensor, axis: int, write: str, x: Tensor, pos: Tensor) -> None:
    """Write ``x [1]`` into a state along an axis, at position ``pos [1]``."""
    extents = list(state.shape)
    extents[axis] = 1
    new = torch.complex(x, 2 * x) if state.is_complex() else x
    WAYS[write](state, axis, new.expand(extents).to(state.dtype), pos)


@dataclass(frozen=True)
class Random:
    """A module and what it is called with."""

    module: Composed
    container: str

    @property
    def plans(self) -> tuple[Plan, ...]:
        return self.module.plans

    def states(self) -> Any:
        """The caller's states, as the module takes them."""
        own = [plan.zeros() for plan in self.plans if not plan.owned]
        return (
            {f"k{i}": state for i, state in enumerate(own)}
            if self.container == "dict"
            else tuple(own)
            if self.container == "tuple"
            else own
        )

    def inputs(self, step: int) -> tuple[Tensor, Tensor]:
        """The further arguments of a step."""
        return torch.randint(
            0, 18, (1,), generator=torch.Generator().manual_seed(step)
        ).float(), torch.tensor([step])


@st.composite
def plans(draw: st.DrawFn, kinds: Sequence[tuple[str, ...]], dtypes: Sequence[torch.dtype]) -> Plan:
    rank = draw(st.integers(1, 4))
    leading = rank > 1 and draw(st.booleans())
    axis = draw(st.integers(int(leading), rank - 1))
    extents = [draw(st.integers(2, 3)) for _ in range(rank)]
    if leading:
        extents[0] = 1
    extents[axis] = CAPACITY
    dtype = draw(st.sampled_from(list(dtypes)))
    ways = [
        way
        for way in draw(st.sampled_from(list(kinds)))
        if not (dtype is torch.bool and way in ("add", "accumulated", "unaliased"))
    ]
    writes = draw(st.lists(st.sampled_from(ways), min_size=1, max_size=3))
    return Plan(
        tuple(extents),
        dtype,
        axis,
        tuple(writes),
        draw(st.booleans()),
        returned=draw(st.booleans()),
    )


@st.composite
def supported(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES) -> Random:
    """Modules whose every write is one that a state takes in place, or as a whole."""
    made = draw(st.lists(plans((APPENDS, REPLACES), dtypes), min_size=1, max_size=3))
    return Random(
        Composed(made, looks=draw(st.booleans())), draw(st.sampled_from(["tuple", "dict", "list"]))
    )


@st.composite
def copied(draw: st.DrawFn) -> Random:
    """Modules with a write that no state takes in place: correct, but ``strict`` refuses it."""
    made = draw(st.lists(plans((APPENDS, REPLACES), DTYPES), max_size=2))
    made.append(draw(plans((EXPLICIT,), (torch.float32, torch.int32, torch.float64))))
    return Random(
        Composed(draw(st.permutations(made)), looks=draw(st.booleans())),
        draw(st.sampled_from(["tuple", "dict"])),
    )


class Broken(nn.Module):
    """A module that works, and then does one thing that no engine can."""

    def __init__(self, inner: Composed, defect: Callable[..., object]) -> None:
        super().__init__()
        self.inner, self.defect = inner, defect
        self.weight = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, states: Any, x: Tensor, pos: Tensor, *more: Any) -> Any:
        return self.inner(states, x, pos), self.defect(self, x, *more)


@dataclass(frozen=True)
class Defect:
    """What no engine can be built of."""

    name: str
    does: Callable[..., object]
    more: Callable[[], tuple[Any, ...]] = tuple
    """Further arguments."""
    reason: str = ""
    """A regular expression that matches in the error."""
    options: dict[str, Any] = field(default_factory=dict)


def _branch(module: Broken, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x + 1
    return x


def _parts() -> tuple[Tensor, Tensor]:
    memory = torch.zeros(6)
    return memory[:4], memory[2:]


def _add(module: Broken, x: Tensor, first: Tensor, *_: Tensor) -> Tensor:
    return first.add_(x).sum()


DEFECTS = [
    Defect("branch on a value", _branch, reason="torch.export cannot capture Broken"),
    Defect(
        "inputs that overlap",
        _add,
        _parts,
        r"input \w+ and input \w+ share memory, and the module writes it at .*random_modules.py",
    ),
    Defect(
        "one tensor as two inputs",
        _add,
        lambda: (torch.zeros(4),) * 2,
        r"input \w+ and input \w+ share memory",
    ),
    Defect(
        "not contiguous",
        _add,
        lambda: (torch.zeros(4, 3).T,),
        r"has strides \(1, 3\), and the module writes it at .*contiguous",
    ),
    Defect(
        "expanded",
        _add,
        lambda: (torch.zeros(1).expand(3),),
        "strides|share memory|single memory location",
    ),
    Defect(
        "no such type",
        lambda m, x, s: s.copy_(x.to(s.dtype)).to(torch.float32).sum(),
        lambda: (torch.zeros(3).to(torch.float8_e4m3fnuz),),
        "float8_e4m3fnuz, which no engine takes",
    ),
    Defect("writes a parameter", lambda module, x: module.weight.add_(x).sum(), reason="parameter"),
    Defect(
        "changes its shape",
        lambda m, x, s: s.unsqueeze_(0).add_(x).sum(),
        lambda: (torch.zeros(3),),
        "cannot capture|shape|strides|metadata",
    ),
    Defect(
        "is not repeatable",
        lambda m, x, s: s.copy_(s + torch.rand_like(s)).sum(),
        lambda: (torch.zeros(3),),
        "is random: an engine computes the same",
    ),
    Defect(
        "takes an object",
        lambda m, x, o: x + 1,
        lambda: (object(),),
        "cannot capture|takes tensors",
    ),
    Defect(
        "returns such a type",
        lambda m, x: x.to(torch.float8_e8m0fnu),
        reason=r"output .*float8_e8m0fnu, which no engine returns",
    ),
]


@st.composite
def unsupported(draw: st.DrawFn) -> tuple[Random, Defect]:
    """A module that would be supported, and a defect."""
    return draw(supported()), draw(st.sampled_from(DEFECTS))
