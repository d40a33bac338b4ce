"""Attention behind caches: what becomes `inplace::attention`, and what looks like it and is not."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.corpus.case import ModuleCase, noise, position

HEADS, KV_HEADS, CAPACITY, DIM = 4, 2, 12, 8
VISIBLE = torch.arange(CAPACITY)
ATTENTION = {"attention": 1}
EXPLICIT = {"update": 2, "read": 2}
APPENDED = {"keys": "index_copy", "values": "index_copy"}


class Block(nn.Module):
    """Projections, caches and attention as models write them.

    Args:
        write: how the caches are written: ``index_copy``, ``assign`` or ``slice``.
        mask: how the mask is computed.
        repeat: how heads are repeated: ``expand``, ``interleave``, ``gqa`` or ``tile``.
        window: of a sliding window; 0 is none.
    """

    def __init__(
        self,
        *,
        write: str = "index_copy",
        mask: str = "compare",
        repeat: str = "expand",
        window: int = 0,
    ) -> None:
        super().__init__()
        self.write, self.mask, self.repeat, self.window = write, mask, repeat, window
        self.query = nn.Linear(16, HEADS * DIM)
        self.key = nn.Linear(16, KV_HEADS * DIM)
        self.value = nn.Linear(16, KV_HEADS * DIM)
        self.register_buffer("causal", torch.ones(CAPACITY, CAPACITY, dtype=torch.bool).tril())

    def forward(self, keys: Tensor, values: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        tokens = x.shape[1]
        query = self.query(x).view(1, tokens, HEADS, DIM).transpose(1, 2)
        places = pos if tokens == 1 else pos + torch.arange(tokens)
        for cache, layer in ((keys, self.key), (values, self.value)):
            self.put(cache, places, layer(x).view(1, tokens, KV_HEADS, DIM).transpose(1, 2))
        key, value = self.heads(keys), self.heads(values)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.visible(places), enable_gqa=self.repeat == "gqa"
        )
        return out.transpose(1, 2).reshape(1, tokens, -1)

    def put(self, cache: Tensor, places: Tensor, new: Tensor) -> None:
        if self.write == "index_copy":
            cache.index_copy_(2, places, new)
        elif self.write == "assign":
            cache[:, :, places] = new
        else:
            start: Any = places[0].item()
            torch._check(start >= 0)
            torch._check(start + new.shape[2] <= CAPACITY)
            cache[:, :, start : start + new.shape[2]] = new

    def heads(self, cache: Tensor) -> Tensor:
        if self.repeat == "gqa":
            return cache
        if self.repeat == "interleave":
            return cache.repeat_interleave(HEADS // KV_HEADS, 1)
        if self.repeat == "tile":
            return cache.repeat(1, HEADS // KV_HEADS, 1, 1)
        return (
            cache[:, :, None]
            .expand(1, KV_HEADS, HEADS // KV_HEADS, CAPACITY, DIM)
            .reshape(1, HEADS, CAPACITY, DIM)
        )

    def visible(self, places: Tensor) -> Tensor:
        columns = torch.arange(CAPACITY)
        if self.mask == "buffer":
            causal: Tensor = self.get_buffer("causal")
            return causal[None, None, places]
        if self.mask == "off by one":
            return (columns <= places[:, None] + 1)[None, None]
        mask = columns <= places[:, None]
        if self.window:
            mask &= columns > places[:, None] - self.window
        if self.mask == "additive":
            return torch.where(mask, 0.0, -math.inf)[None, None]
        if self.mask == "bias":
            return torch.where(mask, 0.1, -math.inf)[None, None] * 1.0 + columns * 0.01
        return mask[None, None]


class Projected(nn.Module):
    """One layer over caches in a dict of the caller's; its attention is written out.

    With ``sinks`` each head has a score beside those of positions, and drops its weight.
    """

    def __init__(self, dim: int = 8, *, sinks: bool = False) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.tensor([-0.5, 1.5])) if sinks else None
        self.project, self.out = nn.Linear(2 * dim, 6 * dim), nn.Linear(2 * dim, 2 * dim)

    def forward(self, cache: dict[str, Tensor], x: Tensor, position: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1)
        )
        cache["keys"].index_copy_(2, position, key)
        cache["values"].index_copy_(2, position, value)
        seen = torch.arange(cache["keys"].shape[2]) <= position
        scores = (query @ cache["keys"].transpose(2, 3) / 8**0.5).masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1)
        if self.sinks is not None:
            beside = self.sinks.view(1, 2, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, beside], -1)
            weights = (scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1]
        out: Tensor = self.out((weights @ cache["values"]).transpose(1, 2).flatten(2))
        return out


class Counted(nn.Module):
    """The module counts its own positions, and what it returns is the attention itself."""

    keys: Tensor
    values: Tensor
    count: Tensor

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.register_buffer("keys", torch.zeros(1, KV_HEADS, CAPACITY, DIM))
        self.register_buffer("values", torch.zeros(1, KV_HEADS, CAPACITY, DIM))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.keys.index_copy_(2, self.count, x)
        self.values[:, :, self.count] = x * 2
        mask = (torch.arange(CAPACITY) <= self.count)[None, None]
        self.count.add_(1)
        return F.scaled_dot_product_attention(
            x, self.keys, self.keys if self.shared else self.values, attn_mask=mask
        )


class Steps(nn.Module):
    """One layer of attention as a function of its caches, what is new, and positions."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, keys: Tensor, values: Tensor, x: Tensor, positions: Tensor) -> Any:
        return self.function(keys, values, x, positions)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query head a cached head; ``mask`` is true at each visible position."""
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask[None, None, None])


def append(keys: Tensor, values: Tensor, x: Tensor, position: Tensor) -> None:
    """Write what is new into both caches."""
    keys.index_copy_(2, position, x)
    values.index_copy_(2, position, x * 2)


def mask_by_another(keys: Tensor, values: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    append(keys, values, x, meta[:1])
    return attend(x, keys, values, meta[1] > VISIBLE)


def values_by_another(keys: Tensor, values: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    keys.index_copy_(2, meta[:1], x)
    values.index_copy_(2, meta[1:2] - 1, x * 2)
    return attend(x, keys, values, meta[0] >= VISIBLE)


def mask_by_each(keys: Tensor, values: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    append(keys, values, x, positions[0] + torch.arange(2))
    mask = (VISIBLE[None] <= positions[:, None])[None, None]
    return F.scaled_dot_product_attention(x, keys, values, attn_mask=mask)


def return_caches(keys: Tensor, values: Tensor, x: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    append(keys, values, x, position)
    return attend(x, keys, values, position >= VISIBLE), keys, values


def return_repeated(
    keys: Tensor, values: Tensor, x: Tensor, position: Tensor
) -> tuple[Tensor, ...]:
    append(keys, values, x, position)
    query, repeated, others = (part.repeat_interleave(2, 1) for part in (x, keys, values))
    return attend(query, repeated, others, position >= VISIBLE), repeated


def return_weights(keys: Tensor, values: Tensor, x: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    append(keys, values, x, position)
    scores = x @ keys.transpose(2, 3)
    weights = (scores * 0.5).masked_fill(~(position >= VISIBLE), float("-inf")).softmax(-1)
    return weights @ values, weights, scores


def caches() -> list[Tensor]:
    """Keys and values of one sequence."""
    return [torch.zeros(1, KV_HEADS, CAPACITY, DIM) for _ in range(2)]


def token(step: int) -> tuple[Tensor, Tensor]:
    """What is new for both heads, and its position."""
    return noise(step, 1, KV_HEADS, 1, DIM), position(step)


def _pair(step: int) -> Tensor:
    return torch.tensor([step % 3, min(step + 1, CAPACITY)] if step else [0, 1])


def _as_block(write: str, tokens: int, **options: Any) -> ModuleCase:
    pattern = {"index_copy": "index_copy", "assign": "index_put", "slice": "slice_scatter"}[write]
    known = " ".join(f"{name}={value}" for name, value in options.items())
    return ModuleCase(
        f"attention {write} {tokens} {known}".rstrip(),
        lambda: Block(write=write, **options),
        caches,
        lambda step: (noise(step, 1, tokens, 16), position(step)),
        {"keys": pattern, "values": pattern},
        ATTENTION,
        reason="the attention over it is",
        steps=CAPACITY - tokens + 1,
    )


WRITES = ("index_copy", "assign", "slice")
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"mask": "buffer", "repeat": "gqa"},
    {"mask": "additive", "repeat": "interleave", "window": 4},
)
EVERY_BLOCK = [
    _as_block(write, tokens, **options)
    for write in WRITES
    for tokens in (1, 3)
    for options in MASKS
]
"""Every way to write caches with every way to mask; `BLOCKS` is a part of it."""
BLOCKS = [
    _as_block(write, 1 + 2 * ((first + second) % 2), **options)
    for first, write in enumerate(WRITES)
    for second, options in enumerate(MASKS)
]
"""Each way to write caches with each way to mask once, by one token or three."""


def _not_ours(name: str, reason: str = "", **options: Any) -> ModuleCase:
    return ModuleCase(
        name,
        lambda: Block(**options),
        caches,
        lambda step: (noise(step, 1, 1, 16), position(step)),
        APPENDED,
        EXPLICIT,
        reason=reason,
        steps=CAPACITY,
    )


def _counted(name: str, shared: bool, operators: dict[str, int] | None, reason: str) -> ModuleCase:
    return ModuleCase(
        name,
        lambda: Counted(shared=shared),
        list,
        lambda step: (noise(step, 1, KV_HEADS, 1, DIM),),
        {"keys": "index_copy", "values": "index_put", "count": "replace"},
        operators,
        reason=reason,
        steps=CAPACITY,
    )


def _lookalike(
    name: str,
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Any],
    inputs: Callable[[int], tuple[Tensor, Tensor]] = token,
) -> ModuleCase:
    return ModuleCase(name, lambda: Steps(function), caches, inputs, APPENDED)


def _dict_of_caches() -> list[Any]:
    return [dict(zip(("keys", "values"), caches(), strict=True))]


ATTENTIONS = [
    *BLOCKS,
    ModuleCase(
        "attention written out",
        Projected,
        _dict_of_caches,
        lambda step: (noise(step, 1, 1, 16), position(step)),
        {"cache_keys": "index_copy", "cache_values": "index_copy"},
        ATTENTION,
        fits_cache_layer=True,
        plans=True,
    ),
    ModuleCase(
        "attention with sinks written out",
        lambda: Projected(sinks=True),
        _dict_of_caches,
        lambda step: (noise(step, 1, 1, 16), position(step)),
        {"cache_keys": "index_copy", "cache_values": "index_copy"},
        ATTENTION,
        fits_cache_layer=True,
        plans=True,
    ),
    _not_ours("mask off by one", "neither causal nor a sliding window", mask="off by one"),
    _not_ours("mask that is a bias", "its mask is a bias", mask="bias"),
    # head h is put onto h modulo the cached heads, which grouped heads are not
    _not_ours("tiled heads", repeat="tile"),
    _counted("positions counted", False, {"attention": 1, "read": 1, "update": 1}, ""),
    _counted("keys that are values", True, None, "keys and values are one cache"),
    _lookalike("mask by another number", mask_by_another, lambda s: (token(s)[0], _pair(s))),
    _lookalike("values by another number", values_by_another, lambda s: (token(s)[0], _pair(s))),
    _lookalike(
        "mask by each number",
        mask_by_each,
        lambda s: (noise(s, 1, 2, 2, DIM), torch.tensor([s, s] if s else [0, 1])),
    ),
    _lookalike("caches that are returned", return_caches),
    _lookalike("repeated keys that are returned", return_repeated),
    _lookalike("weights that are returned", return_weights),
]
"""Attention, and what is not provably attention."""
