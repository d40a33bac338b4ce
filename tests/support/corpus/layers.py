"""One tensor that is a state for each of several layers, and tensors that cannot be divided so."""

import torch
from torch import Tensor, nn

from support.corpus.case import ModuleCase, noise, position

CAPACITY = 24


class Layers(nn.Module):
    """Two layers whose keys and values are one tensor ``[layers, 2, 1, heads, capacity, dim]``."""

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
            seen = torch.arange(keys.shape[2]) <= position
            out = nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=seen[None, None]
            )
            x = x + out.transpose(1, 2).flatten(2)
        return x


class Owning(nn.Module):
    """Layers of a recurrent network, and of a cache, in one buffer each.

    The cache is returned too, and looked at by `unbind`.
    """

    cells: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
        self.register_buffer("cells", torch.zeros(3, 1, 4))
        self.register_buffer(
            "cache", torch.arange(3.0)[None, :, None, None].repeat(1, 1, CAPACITY, 4)
        )

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        for layer, mix in enumerate(self.mix):
            self.cells[layer] = mix(torch.cat([x, self.cells[layer]], 1)).tanh()
            self.cache[:, layer].index_copy_(1, pos, self.cells[layer][None])
            x = x + self.cells[layer] + self.cache[:, layer].sum(1)
        first, _, last = self.cache.unbind(1)
        return x + first.amax(1) - last.amax(1), self.cache


class Whole(nn.Module):
    """A tensor of layers that cannot be divided, each for another reason."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[1].index_copy_(1, pos, x)
        if self.how == "looked at whole":
            return cache.sum(2)
        if self.how == "indexed by a number that varies":
            return cache.index_select(0, pos % 3)
        if self.how == "indexed on two axes":
            return cache[:, 0] + cache[0]
        cache[:, :, 3] = x[:, 0]
        return cache[0]


class Exchanging(nn.Module):
    """Layers take each other's values."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        old = cache[0].clone()
        cache[0] = cache[1]
        cache[1] = old * 0.5
        cache[1].index_copy_(1, pos, x)
        return cache[0].sum(1) - cache[-1].sum(1)


class Taken(nn.Module):
    """An input has the name that a part of the state would get."""

    def forward(self, cache: Tensor, cache_0: Tensor, pos: Tensor) -> Tensor:
        cache[0].index_copy_(1, pos, cache_0)
        return cache[1].sum(1)


class Views(nn.Module):
    """Layers own views of one buffer: registered, as plain attributes, and a view of a view."""

    cache: Tensor
    keys: Tensor

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("cache", torch.zeros(2, 3, 1, CAPACITY, 4))
        self.register_buffer("keys", self.cache[0])
        self.first = self.keys[0]
        self.values = self.cache[1, 2]

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        self.first.index_copy_(1, pos, x)
        self.values[:, pos] = x * 2
        self.keys[2, :, pos] = x + 1
        return (
            self.cache.sum((0, 1, 3))
            if self.whole
            else self.first.sum(1) + self.values.amax(1) - self.keys[2].sum(1)
        )


def one_token(step: int) -> tuple[Tensor, Tensor]:
    """What is new for one head, and its position."""
    return noise(step, 1, 1, 4), position(step)


def _whole(how: str) -> ModuleCase:
    return ModuleCase(
        f"layers {how}",
        lambda: Whole(how),
        lambda: [torch.zeros(3, 3, CAPACITY, 4)],
        lambda step: (noise(step, 3, 1, 4), position(step)),
        {"cache": "select_scatter"},
        steps=6,
    )


LAYERS = ModuleCase(
    "layers",
    Layers,
    lambda: [torch.zeros(2, 2, 1, 2, CAPACITY, 8)],
    lambda step: (noise(step, 1, 1, 16), position(step)),
    {
        f"cache_{layer}_{part}": pattern
        for layer in range(2)
        for part, pattern in enumerate(("index_copy", "index_put"))
    },
    {"attention": 2},
    reason="the attention over it is causal",
    fits_cache_layer=True,
    plans=True,
)
OWNING = ModuleCase(
    "layers in buffers",
    Owning,
    list,
    lambda step: (noise(step, 1, 4), position(step)),
    {"cells": "select_scatter"} | {f"cache_{layer}": "index_copy" for layer in range(3)},
)
DIVIDED = [
    LAYERS,
    OWNING,
    _whole("looked at whole"),
    _whole("indexed by a number that varies"),
    _whole("indexed on two axes"),
    _whole("written whole"),
    ModuleCase(
        "layers that exchange values",
        Exchanging,
        lambda: [torch.arange(2 * CAPACITY * 4.0).reshape(2, 1, CAPACITY, 4)],
        one_token,
        {"cache_0": "replace", "cache_1": "replace"},
    ),
    ModuleCase(
        "name of a part that is taken",
        Taken,
        lambda: [torch.zeros(2, 1, CAPACITY, 4)],
        one_token,
        {"cache_0_": "index_copy", "cache_1": "replace"},
    ),
    ModuleCase(
        "views of one buffer",
        lambda: Views(whole=False),
        list,
        one_token,
        {
            "cache_0_0": "index_copy",
            "cache_0_1": "replace",
            "cache_0_2": "index_put",
            "cache_1_0": "replace",
            "cache_1_1": "replace",
            "cache_1_2": "index_put",
        },
    ),
    ModuleCase(
        "views of a buffer seen whole",
        lambda: Views(whole=True),
        list,
        one_token,
        {"cache": "select_scatter"},
    ),
]
"""Tensors of several layers."""
