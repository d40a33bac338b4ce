"""Objects that hold tensors, as arguments of a standalone engine; `support.corpus.objects` has
what is written in them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import inplace
import pytest
import torch
from inplace.errors import CallError
from inplace_builder import BuildError, RowOptions, capture_exported_rows
from inplace_builder.standalone.build import build
from support.corpus.objects import Plain, static_cache
from torch import Tensor, nn
from transformers import LlamaConfig, StaticCache

X, POSITION = torch.ones(1, 2, 1, 4), torch.tensor([3])


class Append(nn.Module):
    """Writes into a cache of any class."""

    def forward(self, cache: Any, x: Tensor, pos: Tensor) -> Tensor:
        cache.keys.index_copy_(2, pos, x)
        cache.values.index_copy_(2, pos, x * 2)
        total: Tensor = (cache.keys * cache.values).sum(2)
        return total


def _plain() -> Plain:
    return Plain(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4))


def test_an_engine_writes_in_the_object_that_it_is_given(tmp_path: Path) -> None:
    example = _plain()
    build(Append(), (example, X, POSITION), path=tmp_path / "engine")
    assert not example.keys.any(), "the example is not written"
    engine = inplace.load(tmp_path / "engine")
    cache = _plain()
    addresses = cache.keys.data_ptr(), cache.values.data_ptr()
    assert engine(cache, X, POSITION).tolist() == [[[2.0] * 4] * 2]
    assert engine(cache=cache, x=X, pos=POSITION + 1).tolist() == [[[4.0] * 4] * 2]
    assert cache.keys[0, 0, :, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == addresses
    other = SimpleNamespace(keys=cache.keys, values=cache.values, more=1)  # any class will do
    assert engine(other, X, POSITION + 2).tolist() == [[[6.0] * 4] * 2]
    with pytest.raises(CallError, match=r"SimpleNamespace has no values; pass cache\.keys, cache"):
        engine(SimpleNamespace(keys=cache.keys), X, POSITION)
    with pytest.raises(CallError, match=r"argument cache\.values .* must be contiguous"):
        engine(Plain(cache.keys, cache.values.mT.contiguous().mT), X, POSITION)


@dataclass
class Counted:
    """A cache that counts in Python."""

    keys: Tensor = field(default_factory=lambda: torch.zeros(1, 2, 8, 4))
    length: int = 0


class CountUp(nn.Module):
    def forward(self, cache: Counted, x: Tensor) -> Tensor:
        cache.keys[:, :, cache.length : cache.length + 1] = x
        cache.length += 1
        return cache.keys.sum(2)


class Grow(nn.Module):
    def forward(self, cache: Counted, x: Tensor) -> Tensor:
        cache.keys = torch.cat([cache.keys, x], 2)
        return cache.keys.sum(2)


class Update(nn.Module):
    def forward(self, cache: StaticCache, x: Tensor) -> Tensor:
        keys, values = cache.update(x, x, 0)
        total: Tensor = keys + values
        return total


class WithModule(Counted):
    """A cache with a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def _lazy() -> StaticCache:
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1
    )
    return StaticCache(config=config, max_cache_len=8)


@pytest.mark.parametrize(
    ("module", "cache", "reason"),
    [
        (CountUp, Counted, r"length of the argument's class Counted .*changes, from 0 to 1"),
        (Grow, Counted, r"keys of .*Counted of \[1, 2, 8, 4\] .*becomes \[1, 2, 9, 4\]"),
        (Update, _lazy, r"keys of .*StaticLayer is .* before the first step .*early_initiali"),
        (Grow, WithModule, r"class WithModule holds a module, layer: keep it in the module"),
    ],
)
def test_an_object_that_is_no_state_is_refused_with_its_attribute(
    module: Callable[[], nn.Module], cache: Callable[[], Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError) as refused:
        build(module(), (cache(), X), path=tmp_path / "engine")
    assert re.search(reason, str(refused.value)), str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_object_is_a_state_of_rows() -> None:
    options = RowOptions(max_rows=3, max_requests=8)
    capture = capture_exported_rows(Update(), options, (static_cache(), X))
    names = [state.name for state in capture.states]
    assert names == [f"cache_layers_0_{each}" for each in ("keys", "values", "cumulative_length")]
    served = capture.reference([{"x": torch.ones(2, 1, 4)}] * 3)
    [output] = served.values()
    assert output[0, :, 0].tolist() == [2.0] * 3 + [0.0] * 13
