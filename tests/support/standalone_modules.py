"""Modules that mutate their inputs and buffers, with their arguments: for standalone engines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

CAPACITY = 24


def noise(step: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, different for each step."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step)).to(dtype)


class Attention(nn.Module):
    """Attention over the caller's caches ``[1, heads, capacity, dim]``, in a dict."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(2 * dim, 6 * dim), nn.Linear(2 * dim, 2 * dim)

    def forward(self, cache: dict[str, Tensor], x: Tensor, position: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1)
        )
        cache["keys"].index_copy_(2, position, key)
        cache["values"].index_copy_(2, position, value)
        visible = torch.arange(cache["keys"].shape[2]) <= position
        scores = (query @ cache["keys"].transpose(2, 3) / 8**0.5).masked_fill(
            ~visible, float("-inf")
        )
        out: Tensor = self.out((scores.softmax(-1) @ cache["values"]).transpose(1, 2).flatten(2))
        return out


class Rows(nn.Module):
    """Three rows, each at a position of its own, in two caches of different shape."""

    def forward(self, cache: Tensor, flat: Tensor, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        cache[torch.arange(3), :, pos] = x
        flat.scatter_(1, pos[:, None, None].expand(3, 1, 4), x[:, :1])
        return cache.sum(2), flat.amax(1)


class Recurrent(nn.Module):
    """Buffers of several types and ranks.

    A cell, a window of frames, a counter, flags, and a cache that two layers share.
    """

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
    """Two states swap their values; one of them is returned, and so is an input."""

    def forward(self, pair: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = pair
        old = first.clone()
        first.copy_(second)
        second.copy_(old * 0.5)
        second[:, 1] = x
        return first, x, old - second


class Layers(nn.Module):
    """Two layers with keys and values in one tensor ``[layers, 2, 1, heads, capacity, dim]``."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.projects = nn.ModuleList(nn.Linear(2 * dim, 6 * dim) for _ in range(2))

    def forward(self, cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
        for layer, project in enumerate(self.projects):
            query, key, value = (
                part.unflatten(-1, (2, -1)).transpose(1, 2) for part in project(x).chunk(3, -1)
            )
            keys, values = cache[layer]
            keys.index_copy_(2, position, key)
            cache[layer, 1, :, :, position] = value
            visible = torch.arange(keys.shape[2]) <= position
            out = nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=visible[None, None]
            )
            x = x + out.transpose(1, 2).flatten(2)
        return x


class Tokens(nn.Module):
    """A dynamic number of tokens."""

    def forward(self, cache: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        cache.index_copy_(2, positions, x)
        return cache.sum(2) + x.mean(2)


class Unaliased(nn.Module):
    """Writes into a tensor computed from the state, along an axis that no cache layer has."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.copy_((cache + 0).index_copy(1, pos, x))
        return cache.sum(1)


@dataclass(frozen=True)
class Case:
    """A module, the states that its caller owns, and its other arguments in each step."""

    name: str
    module: Callable[[], nn.Module]
    states: Callable[[], list[Any]]
    inputs: Callable[[int], Sequence[Any]]
    fits_cache_layer: bool = False
    """Whether TensorRT's own cache layer can update all of its states."""
    options: dict[str, Any] = field(default_factory=dict)


def _kv() -> dict[str, Tensor]:
    return {"keys": torch.zeros(1, 2, CAPACITY, 8), "values": torch.zeros(1, 2, CAPACITY, 8)}


def _tokens(step: int) -> tuple[Tensor, Tensor]:
    count = 1 + step % 3
    return noise(step, 1, 2, count, 4), torch.arange(step, step + count)


COUNT = Dim("count", min=1, max=4)
CASES = [
    Case(
        "attention",
        Attention,
        lambda: [_kv()],
        lambda step: (noise(step, 1, 1, 16), torch.tensor([step])),
        fits_cache_layer=True,
    ),
    Case(
        "rows",
        Rows,
        lambda: [torch.zeros(3, 2, CAPACITY, 4), torch.zeros(3, CAPACITY, 4)],
        lambda step: (noise(step, 3, 2, 4), torch.tensor([step, step + 3, step // 2])),
    ),
    Case(
        "layers",
        Layers,
        lambda: [torch.zeros(2, 2, 1, 2, CAPACITY, 8)],
        lambda step: (noise(step, 1, 1, 16), torch.tensor([step])),
        fits_cache_layer=True,
    ),
    Case("recurrent", Recurrent, list, lambda step: (noise(step, 1, 4),)),
    Case(
        "exchange",
        Exchange,
        lambda: [(torch.zeros(1, 3), torch.ones(1, 3))],
        lambda step: (noise(step, 1),),
    ),
    Case(
        "tokens",
        Tokens,
        lambda: [torch.zeros(1, 2, CAPACITY, 4)],
        _tokens,
        options={
            "dynamic_shapes": ({}, {2: COUNT}, {0: COUNT}),
            "assume_consecutive": ["positions"],
        },
    ),
    Case(
        "unaliased",
        Unaliased,
        lambda: [torch.zeros(2, CAPACITY, 3)],
        lambda step: (noise(step, 2, 1, 3), torch.tensor([step])),
    ),
]
