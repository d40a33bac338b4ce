"""Modules in which something looks like a pattern and is not quite: what is built does what the module does, at every position.

Each was once built wrong, or ended in an error of somebody else's.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inplace.errors import CallError
from inplace.standalone import Engine
from inplace_builder.compare import same_bits
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from support.unusual import CAPACITY, STEPS, VISIBLE, attention, caches, numbers, token, written
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Of(nn.Module):
    """A module of a function: ``forward(*arguments)`` is ``function(module, *arguments)``."""

    def __init__(self, function: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, *arguments: Any) -> Any:
        return self.function(self, *arguments)


def grid(_: Of, cache: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    cache[torch.arange(3)[:, None], positions] = value  # every row at every position
    return cache.sum(1)


def far(_: Of, cache: Tensor, value: Tensor, position: Tensor) -> Tensor:
    cache.copy_(torch.where((position == VISIBLE)[None, :, None], value, cache))
    return cache.sum()


def two_numbers(_: Of, keys: Tensor, values: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    written(keys, values, x, meta[:1])
    return attention(x, keys, values, meta[1] > VISIBLE)


def two_places(_: Of, keys: Tensor, values: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    keys.index_copy_(2, meta[:1], x)
    values.index_copy_(2, meta[1:2] - 1, x * 2)
    return attention(x, keys, values, meta[0] >= VISIBLE)


def of_each(_: Of, keys: Tensor, values: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    written(keys, values, x, positions[0] + torch.arange(2))
    return F.scaled_dot_product_attention(
        x, keys, values, attn_mask=(VISIBLE[None] <= positions[:, None])[None, None]
    )


def gives_caches(
    _: Of, keys: Tensor, values: Tensor, x: Tensor, position: Tensor
) -> tuple[Tensor, ...]:
    written(keys, values, x, position)
    return attention(x, keys, values, position >= VISIBLE), keys, values


def gives_repeated(
    _: Of, keys: Tensor, values: Tensor, x: Tensor, position: Tensor
) -> tuple[Tensor, ...]:
    written(keys, values, x, position)
    repeated = keys.repeat_interleave(2, 1)
    return attention(
        x.repeat_interleave(2, 1), repeated, values.repeat_interleave(2, 1), position >= VISIBLE
    ), repeated


def gives_weights(
    _: Of, keys: Tensor, values: Tensor, x: Tensor, position: Tensor
) -> tuple[Tensor, ...]:
    written(keys, values, x, position)
    scores = x @ keys.transpose(2, 3)
    weights = (scores * 0.5).masked_fill(~(position >= VISIBLE), float("-inf")).softmax(-1)
    return weights @ values, weights, scores


def copied_transposed(_: Of, cache: Tensor, value: Tensor) -> Tensor:
    cache.copy_(value.t())
    return cache.as_strided((3,), (2,)) * 2


def copied_spread(_: Of, cache: Tensor, value: Tensor) -> Tensor:
    cache.copy_(value)
    return cache.view(-1) * 2


def chosen(_: Of, cache: Tensor, value: Tensor) -> Tensor:
    cache.copy_(
        torch.cond(
            value.sum() > 0,
            lambda old, new: old + new,
            lambda old, new: old * 2 - new,
            (cache, value),
        )
    )
    return cache * 1


def assigned(module: Any, value: Tensor) -> Tensor:
    module.total = module.total + value
    total: Tensor = module.total * 1
    return total


def at_number(_: Of, cache: Tensor, value: Tensor, position: Tensor) -> Tensor:
    cache.index_copy_(0, position, value)
    return cache.sum()


@dataclass(frozen=True)
class Case:
    """A module, its states, and the other arguments of each step; the first step's are the example."""

    module: Callable[[], nn.Module]
    states: Callable[[], list[Tensor]]
    inputs: Callable[[int], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)


class Names(nn.Module):
    """Arguments named as operators are."""

    def forward(
        self, add: Tensor, mul: Tensor, index: Tensor, read: Tensor, update: Tensor
    ) -> Tensor:
        add.index_copy_(1, index, mul * 2)
        return (add[:, index] + read) * update


def row_positions(step: int) -> Tensor:
    return (
        torch.zeros(3, dtype=torch.int64)
        if step == 0
        else torch.tensor([step, 2 * step % CAPACITY, (3 * step + 1) % CAPACITY])
    )


def pair(step: int) -> Tensor:
    return torch.tensor([0, 1]) if step == 0 else torch.tensor([step % 3, min(step + 1, CAPACITY)])


CASES = {
    "rows by positions is a grid": Case(
        lambda: Of(grid),
        lambda: [torch.zeros(3, CAPACITY, 4)],
        lambda step: (numbers(step, 4), row_positions(step)),
    ),
    "a position beyond 32 bits is outside": Case(
        lambda: Of(far),
        lambda: [torch.zeros(1, CAPACITY, 2)],
        lambda step: (numbers(step, 1, 1, 2), torch.tensor([step if step < 3 else 2**32 + 3])),
    ),
    "a mask by another number": Case(
        lambda: Of(two_numbers), caches, lambda step: (token(step)[0], pair(step))
    ),
    "values by another number": Case(
        lambda: Of(two_places), caches, lambda step: (token(step)[0], pair(step))
    ),
    "a mask by each number": Case(
        lambda: Of(of_each),
        caches,
        lambda step: (
            numbers(step, 1, 2, 2, 4),
            torch.tensor([0, 1] if step == 0 else [step, step]),
        ),
    ),
    "the caches are returned": Case(lambda: Of(gives_caches), caches, token),
    "repeated keys are returned": Case(lambda: Of(gives_repeated), caches, token),
    "weights and scores are returned": Case(lambda: Of(gives_weights), caches, token),
    "a transposed copy, symmetric at first": Case(
        lambda: Of(copied_transposed),
        lambda: [torch.zeros(4, 4)],
        lambda step: (torch.eye(4) if step == 0 else numbers(step, 4, 4),),
    ),
    "a spread copy seen as a row": Case(
        lambda: Of(copied_spread), lambda: [torch.zeros(2, 4)], lambda step: (numbers(step, 4),)
    ),
    "names of operators": Case(
        Names,
        lambda: [torch.zeros(1, CAPACITY, 2)],
        lambda step: (
            numbers(step, 1, 1, 2),
            torch.tensor([step]),
            numbers(step + 9, 2),
            numbers(step + 19, 2),
        ),
    ),
    "torch.cond": Case(
        lambda: Of(chosen), lambda: [torch.zeros(1, 4)], lambda step: (numbers(step, 1, 4),)
    ),
    "a buffer assigned anew": Case(
        lambda: Of(assigned, total=torch.zeros(4)), list, lambda step: (numbers(step, 4),)
    ),
    "one entry of one axis": Case(
        lambda: Of(at_number),
        lambda: [torch.zeros(CAPACITY)],
        lambda step: (torch.tensor(float(step)), torch.tensor(step)),
    ),
}


def close(found: Any, wanted: Any) -> None:
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_does_what_the_module_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module = case.module()
    eager, theirs, mine = deepcopy(module), case.states(), case.states()
    engine = build(
        module, (*case.states(), *case.inputs(0)), path=tmp_path / "engine", **case.options
    )
    addresses = [tensor.data_ptr() for tensor in (*mine, *engine.states.values())]
    for step in range(STEPS):
        with torch.no_grad():
            close(engine(*mine, *case.inputs(step)), eager(*theirs, *case.inputs(step)))
        close(mine, theirs)
        close(list(engine.states.values()), [getattr(eager, source) for source in engine.states])
    assert [tensor.data_ptr() for tensor in (*mine, *engine.states.values())] == addresses


def copies(module: Of, cache: Tensor, value: Tensor) -> Tensor:
    cache.copy_(value)
    return cache


def takes_constant(module: Any, cache: Tensor, value: Tensor) -> Tensor:
    cache.copy_(module.constant)
    return cache


def test_a_returned_state_is_memory_of_its_own_and_neither_the_input_nor_the_engine_s_constant(
    tmp_path: Path,
) -> None:
    engine = build(Of(copies), (torch.zeros(2, 4), numbers(0, 2, 4)), path=tmp_path / "copies")
    cache, value = torch.zeros(2, 4), numbers(1, 2, 4)
    snapshot = engine(cache, value)
    expected = value.clone()
    value.zero_()
    assert same_bits(snapshot.reshape(-1), expected.reshape(-1))
    engine = build(
        Of(takes_constant, constant=torch.ones(2, 4)),
        (torch.zeros(2, 4), numbers(0, 2, 4)),
        path=tmp_path / "constant",
    )
    engine(torch.zeros(2, 4), numbers(0, 2, 4)).fill_(7.0)
    cache = torch.zeros(2, 4)
    engine(cache, numbers(0, 2, 4))
    assert cache.eq(1.0).all()


PLACE = torch.tensor([2])
PARTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[int, ...], tuple[int, ...], str]] = {
    "index_add_": (
        lambda cache, x: cache.index_add_(1, PLACE, x),
        (1, 8),
        (1, 1),
        "index_add writes a part of it",
    ),
    "index_fill_": (
        lambda cache, x: cache.index_fill_(1, PLACE, 3.0),
        (1, 8),
        (1, 1),
        "index_fill writes a part of it",
    ),
    "scatter_add_": (
        lambda cache, x: cache.scatter_add_(1, PLACE[None], x),
        (1, 8),
        (1, 1),
        "scatter_add writes a part of it",
    ),
    "scatter_reduce_": (
        lambda cache, x: cache.scatter_reduce_(1, PLACE[None], x, "amax"),
        (1, 8),
        (1, 1),
        "scatter_reduce writes a part of it",
    ),
    "masked_scatter_": (
        lambda cache, x: cache.masked_scatter_(x > 0, x),
        (1, 8),
        (1, 8),
        "masked_scatter writes a part of it",
    ),
    "put_": (lambda cache, x: cache.put_(PLACE, x), (2, 4), (1,), "put writes a part of it"),
    "transpose": (
        lambda cache, x: cache.transpose(1, 2).index_copy_(2, PLACE, x),
        (1, 8, 2, 4),
        (1, 2, 1, 4),
        "a transposed view",
    ),
    "permute": (
        lambda cache, x: cache.permute(0, 2, 1).index_copy_(1, PLACE, x),
        (1, 4, 6),
        (1, 1, 4),
        "a transposed view",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_no_pattern_follows_is_said_to_be_copied_and_refused_where_copies_are(
    name: str, tmp_path: Path
) -> None:
    write, state, given, says = PARTS[name]

    def step(_: Of, cache: Tensor, x: Tensor) -> Tensor:
        write(cache, x)
        return cache.sum()

    with pytest.raises(
        BuildError,
        match=rf"state arguments_0 is read, computed and written back whole: .*{says}.*test_faithful\.py",
    ):
        build(
            Of(step),
            (torch.zeros(state), numbers(0, *given)),
            path=tmp_path / "engine",
            strict=True,
        )
    engine = build(Of(step), (torch.zeros(state), numbers(0, *given)), path=tmp_path / "engine")
    assert says in engine.manifest.lowering[0].reason
    mine, theirs = torch.zeros(state), torch.zeros(state)
    for index in range(4):
        engine(mine, numbers(index, *given))
        write(theirs, numbers(index, *given))
        torch.testing.assert_close(mine, theirs)


class Growing(nn.Module):
    def forward(self, cache: Tensor, rest: dict[str, Tensor]) -> Tensor:
        cache.add_(1.0)
        rest["more"] = cache * 2
        return cache * 1


class Resized(nn.Module):
    def forward(self, cache: Tensor) -> Tensor:
        cache.add_(1.0)
        cache.t_()
        return cache * 1


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(4)

    def forward(self, value: Tensor) -> Tensor:
        self.total.add_(value)
        return self.total * 1


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        (Growing(), (torch.zeros(4), {"x": torch.zeros(4)}), "adds to its arguments"),
        (
            Resized(),
            (torch.zeros(2, 4),),
            r"state cache of \(2, 4\) becomes \(4, 2\).*test_faithful\.py",
        ),
    ],
)
def test_what_is_no_update_is_refused_in_words(
    module: nn.Module, arguments: tuple[Any, ...], says: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=says):
        build(module, arguments, path=tmp_path / "engine")


def test_a_plain_attribute_that_is_written_is_a_state_too(tmp_path: Path) -> None:
    engine = build(Unregistered(), (numbers(0, 4),), path=tmp_path / "engine")
    total = torch.zeros(4)
    for step in range(4):
        total += numbers(step, 4)
        torch.testing.assert_close(engine(numbers(step, 4)), total)


def test_an_engine_that_was_converted_is_refused(tmp_path: Path) -> None:
    engine: Engine = build(
        Of(assigned, total=torch.zeros(4)), (numbers(0, 4),), path=tmp_path / "engine"
    )
    engine.double()
    with pytest.raises(
        CallError,
        match=r"state total has become \[4\] torch\.float64, the engine was built for \[4\] float32",
    ):
        engine(numbers(0, 4))
