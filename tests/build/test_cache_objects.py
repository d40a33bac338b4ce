"""Objects that hold tensors, as arguments of a standalone engine; `support.corpus.objects` has
what is written in them."""

import re
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import inplace
import numpy as np
import pytest
import torch
from inplace.errors import CallError
from inplace.schema.standalone import with_attributes
from inplace_builder import BuildError, RowOptions, capture_exported_rows
from inplace_builder.standalone.build import build
from inplace_builder.states.objects import ObjectArguments
from support.corpus.objects import Plain, static_cache
from torch import Tensor, nn
from torch.utils import _pytree as pytree
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


class Mode(IntEnum):
    DOUBLE = 2


def _varied() -> dict[str, Any]:
    """Objects in a dictionary: lists with other things than tensors, numbers of other classes."""
    first, second = torch.zeros(3), torch.ones(3)
    layers = [SimpleNamespace(keys=torch.zeros(2, 3)), SimpleNamespace(), torch.float32]
    values = {"mode": Mode.DOUBLE, "scale": np.float64(0.5), "type": torch.float32}
    held = {"hidden": torch.zeros(3), 0: torch.zeros(3)}
    main = SimpleNamespace(layers=layers, held=held, first=first, second=second, **values)
    return {"main": main}


class Vary(nn.Module):
    """Puts tensors in the place of others, in lists and dictionaries too."""

    def forward(self, caches: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cache = caches["main"]
        old, view = cache.held["hidden"], cache.first[:2]
        cache.held["hidden"] = old + x.sum(0) * cache.mode
        cache.held[0].add_(1)
        cache.first, cache.second = cache.second * 2, cache.first + float(cache.scale)
        cache.layers[0].keys = cache.layers[0].keys.roll(1, 0) + cache.held["hidden"]
        return old, view, cache.layers[0].keys.sum(0) + cache.held[0]


def test_what_a_step_puts_in_objects_is_their_state(tmp_path: Path) -> None:
    """And what it returns is the old tensor, not what has replaced it."""
    rows = torch.export.Dim("rows", min=1, max=8)
    shapes = {"caches": None, "x": {0: rows}}
    args = (_varied(), torch.ones(2, 3))
    engine = build(Vary(), args, path=tmp_path / "engine", dynamic_shapes=shapes)
    given, expected = _varied(), _varied()
    before = [given["main"].held["hidden"], given["main"].first]
    for step in range(3):
        x = torch.full((1 + step, 3), 1.0 + step)
        for output, other in zip(engine(given, x), Vary()(expected, x), strict=True):
            assert torch.equal(output, other)
    one, other = given["main"], expected["main"]
    assert before[0] is one.held["hidden"], "it is written in its own memory"
    assert before[1] is one.first
    for name in ("first", "second"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    for key in ("hidden", 0):
        assert torch.equal(one.held[key], other.held[key])
    assert torch.equal(one.layers[0].keys, other.layers[0].keys)
    one.mode = 3
    with pytest.raises(CallError, match="mode is 3, the engine was built for 2"):
        engine(given, x)


@pytest.mark.parametrize("kind", [OrderedDict, lambda parts: deque(parts.values()), dict])
def test_containers_of_objects_are_taken_apart(kind: Callable[..., Any]) -> None:
    """By the engine as by the build."""
    build_arguments = ObjectArguments((kind({"a": _plain()}), X), {}).args
    spec, given = pytree.tree_structure(build_arguments), (kind({"a": _plain()}), X)
    leaves = spec.flatten_up_to(with_attributes(spec, given))
    assert [list(leaf.shape) for leaf in leaves] == [[1, 2, 8, 4], [1, 2, 8, 4], [1, 2, 1, 4]]


def test_dynamic_shapes_are_given_by_the_attributes_of_objects() -> None:
    given = ObjectArguments((_plain(), [_plain()], X), {"more": {"cache": _plain()}}, ["a", "b"])
    assert given.shapes(None) is None
    assert given.shapes({"a": {"values": {2: 5}}, "b": None, "argument_2": {0: 1}}) == {
        "a": [None, {2: 5}],
        "b": [[None, None]],
        "argument_2": {0: 1},
    }
    last = {"cache": {"keys": (6,)}}
    assert given.shapes((None, [None], None, last))[1:] == (
        [[None] * 2],
        None,
        {"cache": [(6,), None]},
    )
    with pytest.raises(BuildError, match=r"of a names \['size'\]; its attributes are \['keys'"):
        given.shapes({"a": {"size": None}})
    with pytest.raises(BuildError, match="of a, which is an object, is 3: give None, or a dict"):
        given.shapes({"a": 3})


class WriteAt(nn.Module):
    def forward(self, cache: Any, x: Tensor, place: int) -> Tensor:
        cache.keys.narrow(2, place, 1).copy_(x)
        total: Tensor = cache.keys.sum(2)
        return total


def test_a_number_beside_an_object_may_vary(tmp_path: Path) -> None:
    shapes = {"cache": None, "x": None, "place": torch.export.Dim.DYNAMIC}
    args = (_plain(), X, 3)
    engine = build(WriteAt(), args, path=tmp_path / "engine", dynamic_shapes=shapes)
    cache = _plain()
    for place in (2, 5):
        engine(cache, X, place)
    assert cache.keys[0, 0, :, 0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]


class Shared(nn.Module):
    """Attributes that are one tensor or a part of one, and two that are exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = torch.zeros(2, 3)
        self.part = self.whole[0]
        self.cache = SimpleNamespace(keys=self.whole, one=torch.zeros(3), two=torch.ones(3))
        self.deep = {0: [SimpleNamespace(inner=SimpleNamespace(count=torch.zeros(3)))]}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.whole.add_(x)
        self.cache.one, self.cache.two = self.cache.two, self.cache.one + 1
        old = self.deep[0][0].inner.count
        self.deep[0][0].inner.count = old + x
        return self.part + self.cache.keys[1], self.cache.one * 2 - self.cache.two, old


def test_attributes_that_share_memory_still_do(tmp_path: Path) -> None:
    module, x = Shared(), torch.full((3,), 2.0)
    engine = build(module, (x,), path=tmp_path / "engine")
    assert not module.whole.any(), "the module is as it was"
    assert not module.deep[0][0].inner.count.any()
    for _ in range(3):
        for output, other in zip(engine(x), module(x), strict=True):
            assert torch.equal(output, other)


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


class Items(list[Any]):
    """A list whose items no attribute leads to."""


def _step(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """A module that writes in its cache and changes something else."""

    class Changing(nn.Module):
        def forward(self, cache: Any, x: Tensor) -> Tensor:
            cache.keys.add_(x.sum())
            change(cache)
            total: Tensor = cache.keys.sum(2)
            return total

    return Changing


def _with(**attributes: Any) -> Callable[[], Any]:
    return lambda: SimpleNamespace(keys=torch.zeros(1, 2, 8, 4), **attributes)


def _flag(cache: Any) -> None:
    cache.info.first = False


def _twice() -> Any:
    layer = SimpleNamespace(keys=torch.zeros(3))
    return _with(layers=[layer, layer])()


class Parted(nn.Module):
    """Its attributes are one tensor in the first step only."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.two = torch.zeros(1)

    def forward(self, cache: Any, x: Tensor) -> Tensor:
        self.one.add_(1)
        self.two = self.two + x.sum()
        return self.one + self.two


class Replacing(nn.Module):
    def forward(self, cache: dict[str, Tensor], x: Tensor) -> Tensor:
        cache["keys"] = cache["keys"] + x
        return x


@pytest.mark.parametrize(
    ("module", "cache", "reason"),
    [
        (CountUp, Counted, r"length of the argument's class Counted .*changes, from 0 to 1"),
        (Grow, Counted, r"keys of .*Counted of \[1, 2, 8, 4\] .*becomes \[1, 2, 9, 4\]"),
        (Update, _lazy, r"keys of .*StaticLayer is .* before the first step .*early_initiali"),
        (Grow, WithModule, r"class WithModule holds a module, layer: keep it in the module"),
        (
            _step(_flag),
            _with(info=SimpleNamespace(first=True)),
            r"^first of cache\.info of .* is a Python value that a step changes, from True to",
        ),
        (
            _step(lambda cache: cache.counts.append(1)),
            _with(counts=[1, torch.float32]),
            r"^cache\.counts of .* that a step changes, from a list of 2 to a list of 3",
        ),
        (
            _step(lambda cache: setattr(cache, "last", None)),
            _with(last=torch.ones(3)),
            r"^cache\.last of .* is \[3\] torch\.float32 before a step and None after it",
        ),
        (
            _step(lambda cache: delattr(cache, "last")),
            _with(last=torch.ones(3)),
            r"^cache\.last of .* is not there any more after a step",
        ),
        (
            _step(lambda cache: setattr(cache, "started", True)),
            _with(),
            r"^cache\.started of .* is not there before the first step and True after it",
        ),
        (
            _step(lambda cache: cache.layers.append(SimpleNamespace(keys=cache.keys))),
            _with(layers=[SimpleNamespace(keys=torch.zeros(3))]),
            r"^cache\.layers of .* has other entries after a step.* adds to its arguments",
        ),
        (_step(id), _with(layers=Items([torch.zeros(3)])), r"holds a tensor, \[3\] .* it would be"),
        (_step(id), _with(layers=[nn.Linear(3, 3)]), r"^cache\.layers\[0\] is a module in an arg"),
        (_step(id), _twice, r"^cache\.layers\[1\] is an object .* that the arguments hold already"),
        (Parted, _with(), r"^attribute two and one share memory before the first step"),
        (
            Replacing,
            lambda: {"keys": torch.zeros(1, 2, 8, 4)},
            r"^a step puts another tensor in the place of cache_keys, in a list or dictionary",
        ),
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
