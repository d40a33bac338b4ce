"""Each way PyTorch writes a part of a tensor, and writes that no pattern covers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.corpus.case import ModuleCase, noise, position

CAPACITY = 16
ONE, TWO = (1, 2, 1, 4), (1, 2, 2, 4)
"""Shapes of what is written at one and at two positions."""


class SliceStatic(nn.Module):
    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        cache[:, :, 3:5] = x
        return cache.sum(2)


class SliceItem(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        start = pos.item()
        torch._check(start >= 0)
        torch._check(start + 2 <= CAPACITY)
        cache[:, :, start : start + 2] = x
        return cache.sum(2)


class IndexCopy(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_copy_(2, pos, x)
        return cache.sum(2)


class IndexCopySeveral(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_copy_(2, pos + torch.arange(2), x)
        return cache.sum(2)


class Assign(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos] = x
        return cache.sum(2)


class SelectItem(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        place: Any = pos.item()
        torch._check(place >= 0)
        torch._check(place < CAPACITY)
        cache.select(2, place).copy_(x[:, :, 0])
        return cache.sum(2)


class PutScalar(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        torch.ops.aten.index_put_.default(cache, [None, None, pos.reshape(())], x.squeeze(2))
        return cache.sum(2)


class Scatter(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.scatter_(2, pos[None, None, :, None].expand(1, 2, 1, 4), x)
        return cache.sum(2)


class Where(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY) == pos)[None, None, :, None]
        cache.copy_(torch.where(mask, x, cache))
        return cache.sum(2)


class WhereNot(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY) != pos)[None, None, :, None]
        cache.copy_(torch.where(mask, cache, x))
        return cache.sum(2)


class Wraps(nn.Module):
    """Negative positions count from the end, as in eager PyTorch."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos - 3] = x
        return cache.sum(2)


class RingOfSlots(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos % 4] = x
        return cache.sum(2)


class Masked(nn.Module):
    """A position outside the cache writes nothing."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY) == pos * 2 - 2)[:, None]
        cache.copy_(torch.where(mask, x, cache))
        return cache.sum(2)


class TwoWrites(nn.Module):
    """The old version, the one between and the new one are all looked at."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        old = cache.sum()
        cache.index_copy_(2, pos, x)
        between = cache.amax(2)
        cache[:, :, 5] = cache[:, :, 0] + 1
        return old, between, cache.clone()


class PerRow(nn.Module):
    """Each row at a position of its own, in two states of different rank."""

    def forward(
        self, cache: Tensor, other: Tensor, x: Tensor, pos: Tensor
    ) -> tuple[Tensor, Tensor]:
        cache[torch.arange(3), :, pos] = x
        other.scatter_(1, pos[:, None, None].expand(3, 1, 4), x[:, :1])
        return cache.sum(2), other.amax(1)


class PerRowMask(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY)[None] == pos[:, None])[:, None, :, None]
        cache.copy_(torch.where(mask, x, cache))
        return cache.sum(2)


class Strided(nn.Module):
    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        cache[:, :, ::2] = x
        return cache.sum(2)


class Shuffled(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, torch.cat([pos, 2 * pos + 1])] = x
        return cache.sum(2)


class Accumulated(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_put_((torch.tensor([0]), torch.tensor([1]), pos), x[0, 0], accumulate=True)
        return cache.sum(2)


class Unaliased(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.copy_((cache + 0).index_copy(2, pos, x))
        return cache.sum(2)


class Block(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, 1:2, 3:4] = x[:, :1]
        return cache.sum(2)


class OtherRow(nn.Module):
    """The first axis is the batch of one: a slot has no such axis to append along."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[torch.tensor([1, 0])] = x
        return cache.sum(1)


class Numbered(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, start: int) -> Tensor:
        cache[:, :, start : start + 1] = x
        return cache.sum(2)


class Grid(nn.Module):
    """Every row at every position, which is not each row at its own."""

    def forward(self, cache: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        cache[torch.arange(3)[:, None], positions] = value
        return cache.sum(1)


class Tokens(nn.Module):
    """A number of tokens that varies."""

    def forward(self, cache: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        cache.index_copy_(2, positions, x)
        return cache.sum(2) + x.mean(2)


class Single(nn.Module):
    """One entry of a state with one axis."""

    def forward(self, cache: Tensor, value: Tensor, position: Tensor) -> Tensor:
        cache.index_copy_(0, position, value)
        return cache.sum()


class Function(nn.Module):
    """A module that calls a function on its state and another argument."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.write = write

    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        self.write(cache, x)
        return cache.sum()


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], list[Any]]:
    """Makes one state."""
    return lambda: [torch.zeros(shape, dtype=dtype)]


def _append(
    make: type[nn.Module],
    pattern: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    fixed: bool = False,
) -> ModuleCase:
    """A write that is one update: at a position that is passed, or at fixed ones."""

    def inputs(step: int) -> tuple[Any, ...]:
        new = noise(step, *shape, dtype=dtype)
        return (new,) if fixed else (new, position(step))

    return ModuleCase(
        f"{make.__name__} {str(dtype).removeprefix('torch.')}",
        make,
        zeros(1, 2, CAPACITY, 4, dtype=dtype),
        inputs,
        {"cache": pattern},
        {"update": 1, "read": 1},
        (1,),
        reason=rf"{pattern}.*writes\.py",
        steps=12,
    )


APPENDS = [
    _append(SliceStatic, "slice_scatter", TWO, fixed=True),
    _append(SliceItem, "slice_scatter", TWO),
    _append(IndexCopy, "index_copy", ONE),
    _append(IndexCopySeveral, "index_copy", TWO),
    _append(Assign, "index_put", ONE),
    _append(SelectItem, "select_scatter", ONE),
    _append(PutScalar, "index_put", ONE),
    _append(Scatter, "scatter", ONE),
    _append(Where, "where", ONE),
    _append(WhereNot, "where", ONE),
    _append(SliceItem, "slice_scatter", TWO, torch.bfloat16),
    _append(Assign, "index_put", ONE, torch.bfloat16),
    _append(Where, "where", ONE, torch.bfloat16),
]
"""Writes that are one update of the state."""


def _moving(make: type[nn.Module], pattern: str) -> ModuleCase:
    """Positions beyond the ends count, or do not, as in eager PyTorch: all of them are tried."""
    return ModuleCase(
        make.__name__,
        make,
        zeros(1, 2, CAPACITY, 4),
        lambda step: (noise(step, *ONE), position(step)),
        {"cache": pattern},
        {"update": 1, "read": 1},
        steps=CAPACITY,
    )


def _fourth(step: int) -> Tensor:
    return position(step % 4)


def _far(step: int) -> Tensor:
    """Beyond 32 bits after some steps, which is outside of any cache."""
    return torch.tensor([step if step < 3 else 2**32 + 3])


def _row_positions(step: int) -> Tensor:
    later = [step, 2 * step % CAPACITY, (3 * step + 1) % CAPACITY]
    return torch.tensor(later if step else [0, 0, 0])


def _counts(step: int) -> tuple[Tensor, Tensor]:
    count = 1 + (step + 1) % 3
    return noise(step, 1, 2, count, 4), torch.arange(step, step + count)


COUNT = torch.export.Dim("count", min=1, max=4)
CONSECUTIVE = {"assume_consecutive": ["positions"]}
PLACED = [
    _moving(Wraps, "index_put"),
    _moving(RingOfSlots, "index_put"),
    _moving(Masked, "where"),
    ModuleCase(
        "position beyond 32 bits",
        Where,
        zeros(1, 2, CAPACITY, 4),
        lambda step: (noise(step, *ONE), _far(step)),
        {"cache": "where"},
    ),
    ModuleCase(
        "two writes of one state",
        TwoWrites,
        zeros(1, 2, CAPACITY, 4),
        lambda step: (noise(step, *ONE), position(step)),
        {"cache": "index_copy + select_scatter"},
        {"update": 2, "read": 3},
    ),
    ModuleCase(
        "rows at their own positions",
        PerRow,
        lambda: [torch.zeros(3, 2, CAPACITY, 4), torch.zeros(3, CAPACITY, 4)],
        lambda step: (noise(step, 3, 2, 4), torch.tensor([step, step + 3, step // 2])),
        {"cache": "index_put", "other": "scatter"},
        {"update": 2, "read": 2},
        (1, 0),
        3,
        fits_cache_layer=True,
        plans=True,
    ),
    ModuleCase(
        "a batch at one position",
        IndexCopy,
        zeros(2, 4, CAPACITY, 8),
        lambda step: (noise(step, 2, 4, 1, 8), position(step)),
        {"cache": "index_copy"},
        {"update": 1, "read": 1},
        (2,),
        fits_cache_layer=True,
        plans=True,
    ),
    ModuleCase(
        "a mask for each row",
        PerRowMask,
        zeros(3, 2, CAPACITY, 4),
        lambda step: (noise(step, 3, 2, 1, 4), torch.tensor([step, 99, -1])),
        {"cache": "where"},
        {"update": 1, "read": 1},
        rows=3,
    ),
    ModuleCase(
        "part of a part",
        Block,
        zeros(1, 2, CAPACITY, 4),
        lambda step: (noise(step, *ONE), position(step)),
        {"cache": "slice_scatter"},
        axes=(0,),
        reason="the outermost part",
    ),
    ModuleCase(
        "two positions assumed consecutive",
        Tokens,
        zeros(1, 2, CAPACITY, 4),
        lambda step: (noise(step, *TWO), torch.tensor([step, step + 1])),
        {"cache": "index_copy"},
        options=CONSECUTIVE,
    ),
    ModuleCase(
        "number of tokens that varies",
        Tokens,
        zeros(1, 2, CAPACITY, 4),
        _counts,
        {"cache": "index_copy"},
        options=CONSECUTIVE | {"dynamic_shapes": ({}, {2: COUNT}, {0: COUNT})},
        plans=True,
    ),
    ModuleCase(
        "start that is a Python number",
        Numbered,
        zeros(1, 2, CAPACITY, 4),
        lambda step: (noise(step, *ONE), step + 2),
        {"cache": "slice_scatter"},
        {"update": 1, "read": 1},
        options={"dynamic_shapes": ({}, {}, torch.export.Dim.DYNAMIC)},
    ),
    ModuleCase(
        "entry of one axis",
        Single,
        zeros(CAPACITY),
        lambda step: (torch.tensor(float(step)), torch.tensor(step)),
        {"cache": "index_copy"},
    ),
]
"""Where a write goes: at positions of all kinds, in rows, in parts of parts."""


def _explicit(
    name: str,
    make: Callable[[], nn.Module],
    state: tuple[int, ...],
    inputs: Callable[[int], tuple[Any, ...]],
    reason: str,
    **others: Any,
) -> ModuleCase:
    operators = {"update": 1, "read": 1}
    return ModuleCase(
        name,
        make,
        zeros(*state),
        inputs,
        {"cache": "explicit"},
        operators,
        reason=reason,
        steps=6,
        **others,
    )


WHOLE = (1, 2, CAPACITY, 4)
PLACE = torch.tensor([2])


def _write(
    name: str,
    write: Callable[[Tensor, Tensor], object],
    state: tuple[int, ...],
    shape: tuple[int, ...],
    reason: str = "",
) -> ModuleCase:
    return _explicit(
        name,
        lambda: Function(write),
        state,
        lambda step: (noise(step, *shape),),
        reason or f"{name.strip('_')} writes a part of it",
    )


EXPLICIT = [
    _explicit(
        "slice with a step",
        Strided,
        WHOLE,
        lambda step: (noise(step, 1, 2, CAPACITY // 2, 4),),
        "a slice of step 2",
    ),
    _explicit(
        "positions in any order",
        Shuffled,
        WHOLE,
        lambda step: (noise(step, *TWO), _fourth(step)),
        "not provably consecutive",
    ),
    _explicit(
        "two positions",
        Tokens,
        WHOLE,
        lambda step: (noise(step, *TWO), torch.tensor([step, step + 1])),
        "not provably consecutive",
    ),
    _explicit(
        "accumulated entries",
        Accumulated,
        WHOLE,
        lambda step: (noise(step, *ONE), _fourth(step)),
        "accumulates",
    ),
    _explicit(
        "computed from the state",
        Unaliased,
        WHOLE,
        lambda step: (noise(step, *ONE), _fourth(step)),
        "a tensor computed from it, not into the state",
        plans=True,
    ),
    _explicit(
        "rows in another order",
        OtherRow,
        (2, 4, CAPACITY),
        lambda step: (noise(step, 2, 4, CAPACITY), _fourth(step)),
        "not provably consecutive",
    ),
    _explicit(
        "rows by positions",
        Grid,
        (3, CAPACITY, 4),
        lambda step: (noise(step, 4), _row_positions(step)),
        "",
    ),
    _write("index_add_", lambda cache, x: cache.index_add_(1, PLACE, x), (1, 8), (1, 1)),
    _write("index_fill_", lambda cache, x: cache.index_fill_(1, PLACE, 3.0), (1, 8), (1, 1)),
    _write("scatter_add_", lambda cache, x: cache.scatter_add_(1, PLACE[None], x), (1, 8), (1, 1)),
    _write(
        "scatter_reduce_",
        lambda cache, x: cache.scatter_reduce_(1, PLACE[None], x, "amax"),
        (1, 8),
        (1, 1),
    ),
    _write("masked_scatter_", lambda cache, x: cache.masked_scatter_(x > 0, x), (1, 8), (1, 8)),
    _write("put_", lambda cache, x: cache.put_(PLACE, x), (2, 4), (1,)),
    _write(
        "part of a transposed view",
        lambda cache, x: cache.transpose(1, 2).index_copy_(2, PLACE, x),
        (1, 8, 2, 4),
        (1, 2, 1, 4),
        "a transposed view",
    ),
    _write(
        "part of a permuted view",
        lambda cache, x: cache.permute(0, 2, 1).index_copy_(1, PLACE, x),
        (1, 4, 6),
        (1, 1, 4),
        "a transposed view",
    ),
    _write(
        "part of a view of another shape",
        lambda cache, x: cache.view(4, 2, 3).index_copy_(0, PLACE, x),
        (8, 3),
        (1, 2, 3),
        "index_copy writes a part of it through a view",
    ),
    _write(
        "part of a part of a view",
        lambda cache, x: cache.reshape(4, 2, 3)[:, 1].index_copy_(0, PLACE, x),
        (8, 3),
        (1, 3),
        "writes a part of it through a view",
    ),
    _write(
        "part of memory",
        lambda cache, x: cache.as_strided((4, 3), (6, 1)).index_copy_(0, PLACE, x),
        (8, 3),
        (1, 3),
        "as_strided_scatter writes a part of it through a view",
    ),
]
"""Writes that no pattern covers: correct, but the state is written back whole."""
