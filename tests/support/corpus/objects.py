"""Caches in objects of any class, as arguments and as attributes, written in place."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, StaticCache

from support.corpus.case import ModuleCase, noise, position

CAPACITY = 16


def _cache() -> Tensor:
    return torch.zeros(1, 2, CAPACITY, 4)


@dataclass
class Plain:
    """A dataclass that is not registered with PyTorch."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Slotted:
    """The same without a dictionary of attributes."""

    keys: Tensor
    values: Tensor


class Fields(NamedTuple):
    """A namedtuple."""

    keys: Tensor
    values: Tensor


class Written:
    """A class with methods, numbers and a reference to itself."""

    def __init__(self) -> None:
        self.keys, self.values, self.scale = _cache(), _cache(), 0.5
        self.dtype, self.me = torch.float32, self
        self.seen = torch.zeros((), dtype=torch.int64)

    def update(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, pos, x)
        self.values[:, :, pos] = x * self.scale
        self.seen = self.seen + 1  # another tensor in its place
        return self.keys, self.values


def _kinds() -> list[Any]:
    return [
        {"plain": Plain(_cache(), _cache()), "fields": Fields(_cache(), _cache())},
        [Slotted(_cache(), _cache()), {"written": Written()}],
    ]


def _update(one: Any, two: Any, x: Tensor, pos: Tensor) -> Tensor:
    total: Tensor = torch.zeros(1, 2, 4)
    for cache in (one["plain"], one["fields"], two[0]):
        cache.keys.index_copy_(2, pos, x)
        cache.values[:, :, pos] = x * 2
        total = total + (cache.keys * cache.values).sum(2)
    keys, values = two[1]["written"].update(x, pos)
    counted: Tensor = total + keys.sum(2) - values.amax(2) + two[1]["written"].seen
    return counted


class Taken(nn.Module):
    """Its caller passes the objects."""

    def forward(self, one: Any, two: Any, x: Tensor, pos: Tensor) -> Tensor:
        return _update(one, two, x, pos)


class Held(nn.Module):
    """The objects are attributes of the module and of a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Module()
        self.one, self.part.two = _kinds()
        counts = {"steps": torch.zeros(1, 2, 4)}
        self.counts: Any = counts
        self.part.counts = counts  # type: ignore[assignment]

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        self.counts["steps"].add_(1)  # a dictionary that two parts share
        shared: Any = self.part.counts
        steps: Tensor = shared["steps"]
        return _update(self.one, self.part.two, x, pos) + steps


def static_cache() -> StaticCache:
    """transformers' cache of one layer, with memory."""
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1
    )
    cache = StaticCache(config=config, max_cache_len=CAPACITY)
    cache.early_initialization(1, 2, 4, torch.float32, torch.device("cpu"))
    return cache


class TakenStatic(nn.Module):
    """Takes transformers' cache, which counts its tokens in a tensor."""

    def forward(self, cache: StaticCache, x: Tensor) -> Tensor:
        keys, values = cache.update(x, x * 2, 0)
        total: Tensor = (keys * values).sum(2)
        return total


class HeldStatic(nn.Module):
    """Keeps transformers' cache."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = static_cache()

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.cache.update(x, x * 2, 0)
        total: Tensor = (keys * values).sum(2)
        return total


def _inputs(step: int) -> tuple[Any, ...]:
    return noise(step, 1, 2, 1, 4), position(step)


def _patterns(*caches: str) -> dict[str, str]:
    """The outcome for keys and values with these names."""
    kinds = ("index_copy", "index_put")
    names = [tuple(f"{cache}_{part}" for part in ("keys", "values")) for cache in caches]
    return {name: kind for pair in names for name, kind in zip(pair, kinds, strict=True)}


TAKEN = _patterns("one_plain", "one_fields", "two_0", "two_1_written") | {
    "two_1_written_seen": "replace"
}
HELD = _patterns("one_plain", "part_two_0", "part_two_1_written")
STATIC = {
    "cache_layers_0_keys": "index_copy",
    "cache_layers_0_values": "index_copy",
    "cache_layers_0_cumulative_length": "replace",
}

OBJECTS = [
    ModuleCase("caches in objects", Taken, _kinds, _inputs, TAKEN),
    ModuleCase(
        "caches in objects that are attributes",
        Held,
        list,
        _inputs,
        HELD
        | {
            "one_fields_0": "index_copy",
            "one_fields_1": "index_put",
            "part_two_1_written_seen": "replace",
            "counts_0": "replace",
        },
    ),
    ModuleCase(
        "StaticCache as an argument",
        TakenStatic,
        lambda: [static_cache()],
        lambda step: (noise(step, 1, 2, 1, 4),),
        STATIC,
    ),
    ModuleCase(
        "StaticCache as an attribute",
        HeldStatic,
        list,
        lambda step: (noise(step, 1, 2, 1, 4),),
        STATIC,
    ),
]
"""Objects that hold tensors, which a step writes."""
