"""Random modules: rows with positions of their own, any number of tokens, attention."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from support.random_modules import CAPACITY, STEPS, at, seen_as

DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool)
MOST_TOKENS = 4


@dataclass(frozen=True)
class Steps:
    """A module, its caller's states, its further arguments, and what it is built with."""

    module: nn.Module
    states: Callable[[], Any]
    inputs: Callable[[int], tuple[Tensor, ...]]
    attentions: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A state and how it is written: extents, type, the axis that positions count, and the ways."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int
    ways: tuple[str, ...]


def _entry(state: Tensor, axis: int, x: Tensor) -> Tensor:
    """New entries for a state from ``x``, whose extents are 1 where the state's others are."""
    extents = list(state.shape)
    extents[axis] = x.shape[axis]
    return x.to(state.dtype).expand(extents)


def _column(state: Tensor, axis: int, pos: Tensor) -> Tensor:
    """``[rows]`` as ``[rows, 1, …]``."""
    return pos.view(-1, *[1] * (state.dim() - 1))


def _put_in_rows(state: Tensor, axis: int, x: Tensor, pos: Tensor) -> None:
    state[torch.arange(state.shape[0]), *at(axis - 1, pos)] = _entry(state, axis, x).squeeze(axis)


def _mask_rows(state: Tensor, axis: int, x: Tensor, pos: Tensor) -> None:
    columns = torch.arange(state.shape[axis]).view(-1, *[1] * (state.dim() - 1 - axis))
    state.copy_(torch.where(columns == _column(state, axis, pos), _entry(state, axis, x), state))


def _scatter_rows(state: Tensor, axis: int, x: Tensor, pos: Tensor) -> None:
    new = _entry(state, axis, x)
    state.scatter_(axis, _column(state, axis, pos).expand(new.shape), new)


ROW_WAYS: dict[str, Callable[[Tensor, int, Tensor, Tensor], object]] = {
    "put": _put_in_rows,
    "scatter": _scatter_rows,
    "where": _mask_rows,
    "whole": lambda state, axis, x, pos: state.copy_(state.roll(1, axis)),
}
TOKEN_WAYS: dict[str, Callable[[Tensor, int, Tensor, Tensor], object]] = {
    "index_copy": lambda state, axis, x, pos: state.index_copy_(axis, pos, _entry(state, axis, x)),
    "assign": lambda state, axis, x, pos: state.__setitem__(at(axis, pos), _entry(state, axis, x)),
    "slice": lambda state, axis, x, pos: state.narrow(axis, 2, 1).copy_(
        _entry(state, axis, x.narrow(axis, 0, 1))
    ),
}


class Writes(nn.Module):
    """Writes each state in its ways and reads every version; ``x`` has entries or rows first."""

    def __init__(self, states: tuple[Written, ...], *, rows: bool) -> None:
        super().__init__()
        self.states, self.rows = states, rows

    def forward(self, states: list[Tensor], x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        seen = []
        for state, plan in zip(states, self.states, strict=True):
            for count, way in enumerate(plan.ways):
                extents = [1] * len(plan.shape)
                extents[0 if self.rows else plan.axis] = x.shape[0]
                (ROW_WAYS if self.rows else TOKEN_WAYS)[way](
                    state, plan.axis, (x * (count + 1)).view(extents), pos
                )
                seen.append(seen_as(state).sum(plan.axis))
        return tuple(seen)


@st.composite
def _written(draw: st.DrawFn, rows: int, ways: tuple[str, ...]) -> Written:
    rank = draw(st.integers(2, 4))
    axis = draw(st.integers(1, rank - 1))
    extents = [draw(st.integers(2, 3)) for _ in range(rank)]
    extents[0], extents[axis] = rows, CAPACITY
    chosen = draw(
        st.one_of(
            st.lists(st.sampled_from(ways), min_size=1, max_size=3),
            *([st.just(["whole"])] if rows > 1 else []),
        )
    )
    return Written(tuple(extents), draw(st.sampled_from(DTYPES)), axis, tuple(chosen))


def _zeros(plans: tuple[Written, ...]) -> list[Tensor]:
    return [torch.zeros(plan.shape, dtype=plan.dtype) for plan in plans]


@st.composite
def rows_of_their_own(draw: st.DrawFn) -> Steps:
    """Every state has an entry for each row, and each row its own position."""
    rows = draw(st.integers(2, 3))
    made = tuple(
        draw(st.lists(_written(rows, ("put", "scatter", "where")), min_size=1, max_size=3))
    )
    if all(set(plan.ways) == {"whole"} for plan in made):
        made = (*made, Written((rows, CAPACITY), torch.float32, 1, ("put",)))

    def inputs(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return torch.randint(0, 18, (rows,), generator=generator).float(), torch.randint(
            0, CAPACITY, (rows,), generator=generator
        )

    return Steps(Writes(made, rows=True), lambda: _zeros(made), inputs)


@st.composite
def varying_tokens(draw: st.DrawFn) -> Steps:
    """Each step has another number of entries, at positions assumed to be consecutive."""
    made = tuple(draw(st.lists(_written(1, tuple(TOKEN_WAYS)), min_size=1, max_size=3)))
    if all(set(plan.ways) == {"slice"} for plan in made):
        made = (*made, Written((1, CAPACITY), torch.float32, 1, ("index_copy",)))

    def inputs(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        count = 1 + (step + 1) % MOST_TOKENS
        start = int(torch.randint(0, CAPACITY - count, (), generator=generator))
        return torch.randint(0, 18, (count,), generator=generator).float(), torch.arange(
            start, start + count
        )

    tokens = Dim("tokens", min=1, max=MOST_TOKENS)
    options: dict[str, Any] = {
        "dynamic_shapes": ([{} for _ in made], {0: tokens}, {0: tokens}),
        "assume_consecutive": ["pos"],
    }
    return Steps(Writes(made, rows=False), lambda: _zeros(made), inputs, options=options)


@dataclass(frozen=True)
class Heads:
    """How layers attend: sizes, and how it is written down."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    window: int
    scale: float | None
    written: str
    mask: str
    repeat: str
    write: str
    stacked: bool


class Attends(nn.Module):
    """Layers of attention behind caches, each its own or parts of one tensor."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.how, width = heads, heads.heads * heads.dim
        torch.manual_seed(0)
        self.queries = nn.ModuleList(nn.Linear(width, width) for _ in range(heads.layers))
        self.others = nn.ModuleList(
            nn.Linear(width, 2 * heads.kv_heads * heads.dim) for _ in range(heads.layers)
        )

    def forward(self, caches: Any, x: Tensor, pos: Tensor) -> Tensor:
        how = self.how
        for layer, (query, other) in enumerate(zip(self.queries, self.others, strict=True)):
            q = query(x).unflatten(-1, (how.heads, how.dim)).transpose(1, 2)
            k, v = other(x).unflatten(-1, (2, how.kv_heads, how.dim)).permute(2, 0, 3, 1, 4)
            keys, values = caches[layer]
            for cache, new in ((keys, k), (values, v)):
                if how.write == "index_copy":
                    cache.index_copy_(2, pos, new)
                else:
                    cache[:, :, pos] = new
            out = self._attend(q, self._repeated(keys), self._repeated(values), pos)
            x = x + out.transpose(1, 2).flatten(2)
        return x

    def _repeated(self, cache: Tensor) -> Tensor:
        times = self.how.heads // self.how.kv_heads
        if self.how.repeat == "interleave":
            return cache.repeat_interleave(times, 1)
        return cache[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, pos: Tensor) -> Tensor:
        columns = torch.arange(CAPACITY)
        seen = columns <= pos[:, None]
        if self.how.window:
            seen = seen & (columns > pos[:, None] - self.how.window)
        if self.how.written == "sdpa":
            mask = seen if self.how.mask == "bool" else torch.where(seen, 0.0, -math.inf)
            return F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask[None, None], scale=self.how.scale
            )
        scores = q @ keys.transpose(2, 3) * (self.how.scale or self.how.dim**-0.5)
        if self.how.written == "capped":
            scores = torch.tanh(scores / 3.0) * 3.0
        scores = (
            scores.masked_fill(~seen, -math.inf)
            if self.how.mask == "bool"
            else scores + torch.where(seen, 0.0, -math.inf)
        )
        return scores.softmax(-1) @ values


@st.composite
def attending(draw: st.DrawFn) -> Steps:
    """Causal or windowed attention; every layer of it must be found."""
    kv_heads = draw(st.integers(1, 2))
    how = Heads(
        layers=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        dim=draw(st.sampled_from([2, 4, 8])),
        window=draw(st.sampled_from([0, 3])),
        scale=draw(st.sampled_from([None, 0.7])),
        written=draw(st.sampled_from(["sdpa", "spelled", "capped"])),
        mask=draw(st.sampled_from(["bool", "additive"])),
        repeat=draw(st.sampled_from(["interleave", "expand"])),
        write=draw(st.sampled_from(["index_copy", "assign"])),
        stacked=draw(st.booleans()),
    )
    tokens = draw(st.integers(1, 3))
    varies = tokens > 1 and draw(
        st.booleans()
    )  # torch.export takes a number of tokens that is 1 in the example for a constant

    def states() -> Any:
        one = (1, kv_heads, CAPACITY, how.dim)
        return (
            torch.zeros(how.layers, 2, *one)
            if how.stacked
            else [(torch.zeros(one), torch.zeros(one)) for _ in range(how.layers)]
        )

    def inputs(step: int) -> tuple[Tensor, Tensor]:
        count = 1 + (step + 1) % tokens if varies else tokens
        start = step * (CAPACITY - tokens) // STEPS
        return torch.randn(
            1, count, how.heads * how.dim, generator=torch.Generator().manual_seed(step)
        ), torch.arange(start, start + count)

    count = Dim("count", min=1, max=MOST_TOKENS)
    caches: Any = {} if how.stacked else [({}, {}) for _ in range(how.layers)]
    shapes = {"dynamic_shapes": (caches, {1: count}, {0: count})} if varies else {}
    return Steps(
        Attends(how),
        states,
        inputs,
        attentions=how.layers,
        options={"assume_consecutive": ["pos"], **shapes},
    )
