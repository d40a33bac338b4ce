"""Scaled dot-product attention behind caches: which becomes `inplace::attention`, which stays explicit, both equal to eager."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from state_modules import compare, operators
from torch import Tensor, nn

HEADS, KV_HEADS, CAPACITY, DIM = 4, 2, 12, 8


class Block(nn.Module):
    """Projections, caches and attention as models write them."""

    def __init__(self, *, write: str = "index_copy", mask: str = "compare", repeat: str = "expand", window: int = 0) -> None:
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
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.visible(places), enable_gqa=self.repeat == "gqa")
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
        return cache[:, :, None].expand(1, KV_HEADS, HEADS // KV_HEADS, CAPACITY, DIM).reshape(1, HEADS, CAPACITY, DIM)

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


def steps(tokens: int) -> Any:
    def inputs(step: int) -> tuple[Tensor, Tensor]:
        return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(step)), torch.tensor([step])

    return inputs


def caches() -> list[Tensor]:
    return [torch.zeros(1, KV_HEADS, CAPACITY, DIM) for _ in range(2)]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("write", ["index_copy", "assign", "slice"])
@pytest.mark.parametrize("options", [{}, {"mask": "buffer", "repeat": "gqa"}, {"mask": "additive", "repeat": "interleave", "window": 4}])
def test_attention_behind_caches_is_one_operator(write: str, tokens: int, options: dict[str, Any]) -> None:
    capture = compare(Block(write=write, **options), caches(), steps(tokens), steps=CAPACITY - tokens + 1)
    assert operators(capture) == {"attention": 1}
    assert all(state.operators == ("attention",) for state in capture.states)
    (call,) = [node for node in capture.exported.graph.nodes if node.target is torch.ops.inplace.attention.default]
    assert call.kwargs.get("window", 0) == options.get("window", 0)


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"mask": "off by one"}, "neither causal nor a sliding window"),
        ({"mask": "bias"}, "its mask is a bias"),
    ],
)
def test_attention_that_is_not_provably_ours_stays_explicit(options: dict[str, Any], because: str) -> None:
    capture = compare(Block(**options), caches(), steps(1), steps=CAPACITY)
    assert operators(capture) == {"update": 2, "read": 2}
    assert all(state.recognised and because in state.because for state in capture.states)


def test_tiled_heads_are_no_grouped_heads() -> None:
    """``repeat`` puts head h onto h modulo the cached heads: another attention."""
    capture = compare(Block(repeat="tile"), caches(), steps(1), steps=CAPACITY)
    assert operators(capture) == {"update": 2, "read": 2}
