"""Kinds of states: buffers and arguments, in containers, aliased, exchanged, assigned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from support.corpus.case import ModuleCase, noise, position

CAPACITY = 24


class Recurrent(nn.Module):
    """Buffers of several types and ranks: an LSTM's cell, a window of frames, a counter, a sum,
    flags, and a cache that two layers share."""

    cellular: Tensor
    scale: Tensor
    window: Tensor
    count: Tensor
    seen: Tensor
    cache: Tensor
    hidden: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)
        self.register_buffer("hidden", torch.zeros(1, 4))
        self.register_buffer("cellular", torch.zeros(1, 4))
        self.register_buffer("window", torch.zeros(3, 4), persistent=False)
        self.register_buffer("count", torch.full((), 2, dtype=torch.int64))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(2, 1, 16, 4))
        self.register_buffer("scale", torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = self.cell(x, (self.hidden, self.cellular))
        self.hidden.copy_(hidden)
        self.cellular.copy_(cell)
        self.window.copy_(torch.cat([self.window[1:], x]))
        self.seen.logical_or_(torch.arange(5) == self.count % 5)
        self.cache[0, :, 3] = x
        self.cache[1, :, 4] = hidden
        self.count += 1
        self.total.add_(x.sum())
        return self.window.mean(0) * self.scale + self.cache.sum((0, 1, 2)), self.count.clone()


class Gated(nn.Module):
    """Buffers of types that TensorRT has: a cell, a window of frames, a counter, flags, a cache
    that two layers share."""

    cell: Tensor
    window: Tensor
    count: Tensor
    seen: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(8, 4), nn.Linear(8, 4)
        self.register_buffer("cell", torch.zeros(1, 4))
        self.register_buffer("window", torch.zeros(3, 4))
        self.register_buffer("count", torch.full((), 2, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(2, 1, CAPACITY, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        both = torch.cat([x, self.cell], 1)
        gate = self.gate(both).sigmoid()
        self.cell.copy_(gate * self.cell + (1 - gate) * self.new(both).tanh())
        self.window.copy_(torch.cat([self.window[1:], x]))
        self.seen.logical_or_(torch.arange(5) == self.count % 5)
        self.cache[0, :, 3] = x
        self.cache[1, :, 4] = self.cell
        self.count += 1
        return (
            self.window.mean(0) + self.cache.sum((0, 1, 2)) + self.seen.to(torch.float32).sum(),
            self.count.clone(),
            None,
        )


class Exchange(nn.Module):
    """Each state becomes what another was, or is: the order of reads and writes shows."""

    def forward(self, a: Tensor, b: Tensor, c: Tensor, x: Tensor) -> Tensor:
        old = a.clone()
        a.copy_(b)
        b.copy_(old)
        b[:, 1] = x
        c.copy_(b)
        return a - b


class Swap(nn.Module):
    """States take each other's old values; one is returned, and so is an input."""

    def forward(self, pair: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = pair
        old = first.clone()
        first.copy_(second)
        second.copy_(old * 0.5)
        second[:, 1] = x
        return first, x, old - second


@dataclass
class Cache:
    """A container of the user's own."""

    keys: Tensor
    values: Tensor


torch.export.register_dataclass(Cache, serialized_type_name="tests.Cache")


class Nested(nn.Module):
    """States in a container, and in a list."""

    def forward(self, cache: Any, other: Any, x: Tensor) -> Tensor:
        if isinstance(cache, dict):
            keys, values = cache["keys"], cache["values"]
        elif isinstance(cache, tuple):
            keys, values = cache
        else:
            keys, values = cache.keys, cache.values
        keys[:, 2] = x
        values.mul_(0.5).add_(x)
        other[0].add_(1)
        total: Tensor = (keys + values).sum() + other[0].sum()
        return total


class Shared(nn.Module):
    """Two layers own one cache under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Module(), nn.Module()
        cache = torch.zeros(1, 8, 4)
        self.first.register_buffer("cache", cache)
        self.second.register_buffer("cache", cache)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        first, second = self.first.get_buffer("cache"), self.second.get_buffer("cache")
        first.index_copy_(1, pos, x)
        second.index_copy_(1, pos + 1, x * 2)
        return first.sum(1) - second.amax(1)


class Names(nn.Module):
    """Arguments named as operators are."""

    def forward(
        self, add: Tensor, mul: Tensor, index: Tensor, read: Tensor, update: Tensor
    ) -> Tensor:
        add.index_copy_(1, index, mul * 2)
        return (add[:, index] + read) * update


class Assigned(nn.Module):
    """Its buffer is assigned anew, not written into."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, value: Tensor) -> Tensor:
        self.total = self.total + value
        return self.total * 1


class Stateful(nn.Module):
    """A function of a state and another argument."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, cache: Tensor, value: Tensor) -> Tensor:
        return self.function(cache, value)


def copy_transposed(cache: Tensor, value: Tensor) -> Tensor:
    cache.copy_(value.t())
    return cache.as_strided((3,), (2,)) * 2


def copy_spread(cache: Tensor, value: Tensor) -> Tensor:
    cache.copy_(value)
    return cache.view(-1) * 2


def copy_chosen(cache: Tensor, value: Tensor) -> Tensor:
    cache.copy_(
        torch.cond(
            value.sum() > 0,
            lambda old, new: old + new,
            lambda old, new: old * 2 - new,
            (cache, value),
        )
    )
    return cache * 1


def _nested(kind: str) -> ModuleCase:
    def states() -> list[Any]:
        keys, values = torch.zeros(1, 4, 2), torch.ones(1, 2)
        cache: Any = {
            "dict": {"keys": keys, "values": values},
            "tuple": (keys, values),
            "dataclass": Cache(keys, values),
        }[kind]
        return [cache, [torch.zeros(3)]]

    parts = (0, 1) if kind == "tuple" else ("keys", "values")
    names = (*(f"cache_{part}" for part in parts), "other_0")
    return ModuleCase(
        f"states in a {kind}",
        Nested,
        states,
        lambda step: (noise(step, 1, 2),),
        dict(zip(names, ("select_scatter", "replace", "replace"), strict=True)),
    )


def _stateful(
    name: str,
    function: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    inputs: Callable[[int], tuple[Tensor]],
) -> ModuleCase:
    states: Callable[[], list[Any]] = lambda: [torch.zeros(shape)]  # noqa: E731
    return ModuleCase(name, lambda: Stateful(function), states, inputs, {"cache": "replace"})


STATES = [
    ModuleCase(
        "buffers of any rank and type",
        Recurrent,
        list,
        lambda step: (noise(step, 1, 4),),
        {
            "hidden": "replace",
            "cellular": "replace",
            "window": "window",
            "count": "replace",
            "total": "replace",
            "seen": "replace",
            "cache": "select_scatter",
        },
        {"read": 9, "update": 8},
        steps=12,
    ),
    ModuleCase(
        "recurrent",
        Gated,
        list,
        lambda step: (noise(step, 1, 4),),
        {
            "cell": "replace",
            "window": "window",
            "count": "replace",
            "seen": "replace",
            "cache": "select_scatter",
        },
        plans=True,
    ),
    ModuleCase(
        "states that exchange values",
        Exchange,
        lambda: [torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1, 3)],
        lambda step: (noise(step, 1),),
        {"a": "replace", "b": "replace", "c": "replace"},
    ),
    ModuleCase(
        "exchange",
        Swap,
        lambda: [(torch.zeros(1, 3), torch.ones(1, 3))],
        lambda step: (noise(step, 1),),
        {"pair_0": "replace", "pair_1": "replace"},
        plans=True,
    ),
    *map(_nested, ("dict", "tuple", "dataclass")),
    ModuleCase(
        "cache that layers share",
        Shared,
        list,
        lambda step: (noise(step, 1, 1, 4), position(step)),
        {"first_cache": "index_copy"},
        {"update": 2, "read": 1},
        steps=7,
    ),
    ModuleCase(
        "names of operators",
        Names,
        lambda: [torch.zeros(1, 8, 2)],
        lambda step: (
            noise(step, 1, 1, 2),
            position(step),
            noise(step + 9, 2),
            noise(step + 19, 2),
        ),
        {"add": "index_copy"},
    ),
    ModuleCase(
        "buffer that is assigned",
        Assigned,
        list,
        lambda step: (noise(step, 4),),
        {"total": "replace"},
    ),
    _stateful(
        "transposed copy, symmetric at first",
        copy_transposed,
        (4, 4),
        lambda step: (noise(step, 4, 4) if step else torch.eye(4),),
    ),
    _stateful(
        "copy that is broadcast, seen as a row",
        copy_spread,
        (2, 4),
        lambda step: (noise(step, 4),),
    ),
    _stateful("torch.cond", copy_chosen, (1, 4), lambda step: (noise(step, 1, 4),)),
]
"""Kinds of states and of what owns them."""
