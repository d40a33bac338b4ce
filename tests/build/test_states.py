"""States of a user's own module: found, lifted, put back, refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.schema.specs import Update
from inplace_builder import capture_exported, inline_lifted_buffers
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from inplace_builder.states.lift import export_module
from inplace_builder.states.state import Owner
from support.state_modules import compare, operators
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass


def frame(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


class Recurrent(nn.Module):
    """Buffers of every kind: an LSTM's cell, a window of frames, a counter, flags, a cache two layers share."""

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


def test_buffers_of_any_rank_and_type() -> None:
    capture = compare(Recurrent(), [], lambda step: (frame(step, 1, 4),))
    found = {state.tensor.source: state for state in capture.states}
    assert set(found) == {"hidden", "cellular", "window", "count", "total", "seen", "cache"}
    assert all(state.tensor.owner is Owner.MODULE for state in capture.states)
    assert {source for source, state in found.items() if state.pattern == "replace"} == set(
        found
    ) - {"cache", "window"}
    assert found["window"].pattern == "window"
    assert operators(capture)["update"] == 6 + 2, "the cache of two layers is written twice"
    specs = {state.tensor.source: state.spec() for state in capture.states}
    assert (specs["count"].fill, specs["count"].shape, specs["count"].update) == (
        2.0,
        (),
        Update.REPLACE,
    )
    assert specs["hidden"].shape == (4,), "a batch of one is the slot axis"
    assert specs["window"].shape == (3, 4)


def test_lifted_buffers_go_back() -> None:
    module, steps = Recurrent(), [frame(step, 1, 4) for step in range(4)]
    plain = inline_lifted_buffers(capture_exported(module, (steps[0],)))
    assert isinstance(plain, torch.fx.GraphModule)
    addresses = {name: buffer.data_ptr() for name, buffer in plain.named_buffers()}
    for step in steps:
        with torch.no_grad():
            torch.testing.assert_close(plain(step), module(step))
    for name in ("hidden", "cellular", "window", "count", "total", "seen", "cache"):
        held, own = plain.get_buffer(name), module.get_buffer(name)
        torch.testing.assert_close(held.reshape(own.shape), own)
    assert addresses == {name: buffer.data_ptr() for name, buffer in plain.named_buffers()}
    again = torch.export.export(plain, (steps[0],))
    assert sum(node.target is torch.ops.inplace.update.default for node in again.graph.nodes) == 8


class Exchange(nn.Module):
    """Each state becomes what another was, or is: the order of reads and writes shows."""

    def forward(self, a: Tensor, b: Tensor, c: Tensor, x: Tensor) -> Tensor:
        old = a.clone()
        a.copy_(b)
        b.copy_(old)
        b[:, 1] = x
        c.copy_(b)
        return a - b


def test_states_exchange_values() -> None:
    capture = compare(
        Exchange(),
        [torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1, 3)],
        lambda step: (frame(step, 1),),
    )
    assert [state.pattern for state in capture.states] == ["replace"] * 3


@dataclass
class Cache:
    keys: Tensor
    values: Tensor


torch.export.register_dataclass(Cache, serialized_type_name="tests.Cache")


class Nested(nn.Module):
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


@pytest.mark.parametrize("kind", ["dict", "tuple", "dataclass"])
def test_caches_in_containers(kind: str) -> None:
    keys, values = torch.zeros(1, 4, 2), torch.ones(1, 2)
    cache: Any = {
        "dict": {"keys": keys, "values": values},
        "tuple": (keys, values),
        "dataclass": Cache(keys, values),
    }[kind]
    capture = compare(Nested(), [cache, [torch.zeros(3)]], lambda step: (frame(step, 1, 2),))
    assert [state.tensor.owner for state in capture.states] == [Owner.CALLER] * 3
    assert [state.pattern for state in capture.states] == ["select_scatter", "replace", "replace"]


class Shared(nn.Module):
    """Two layers hold one cache under two names."""

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


def test_layers_share_a_cache() -> None:
    capture = compare(
        Shared(), [], lambda step: (frame(step, 1, 1, 4), torch.tensor([step])), steps=7
    )
    (state,) = capture.states
    assert state.pattern == "index_copy"
    assert operators(capture)["update"] == 2


class Overlapping(nn.Module):
    """Neither is a part of the other that constant indices on first axes make."""

    early: Tensor
    late: Tensor

    def __init__(self) -> None:
        super().__init__()
        memory = torch.zeros(3, 4)
        self.register_buffer("early", memory[:2])
        self.register_buffer("late", memory[1:])

    def forward(self, x: Tensor) -> Tensor:
        self.late.add_(x)
        return self.early.sum(0)


def test_memory_shared_by_halves_is_refused() -> None:
    with pytest.raises(
        BuildError, match=r"buffer \w+ and buffer \w+ share memory.*test_states.py.*self.late.add_"
    ):
        capture_exported(Overlapping(), (frame(0, 4),))


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        a.add_(x)
        return a + b


def test_two_inputs_that_share_memory_are_refused() -> None:
    memory = torch.zeros(4)
    with pytest.raises(BuildError, match=r"input a and input b share memory.*a\.add_"):
        capture_exported(Two(), (memory, memory, frame(0, 4)))


def test_a_state_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(BuildError, match=r"state a of \(2, 3\) has strides \(1, 2\)"):
        capture_exported(Two(), (torch.zeros(3, 2).T, torch.zeros(2, 3), frame(0, 3)))


def test_declared_states_are_checked() -> None:
    arguments = (torch.zeros(4), torch.zeros(4), frame(0, 4))
    assert capture_exported(Two(), arguments, states=["a"]).states[0].name == "a"
    with pytest.raises(BuildError, match=r"never writes \['b'\]"):
        capture_exported(Two(), arguments, states=["a", "b"])
    with pytest.raises(BuildError, match=r"also writes \['a'\]"):
        capture_exported(Two(), arguments, states=[])


def test_a_module_without_state_is_refused() -> None:
    with pytest.raises(BuildError, match="no state"):
        capture_exported(nn.Linear(4, 4), (frame(0, 4),))


def test_what_cannot_be_exported_is_refused_by_name() -> None:
    class Branch(nn.Module):
        def forward(self, cache: Tensor, x: Tensor) -> Tensor:
            if x.sum() > 0:
                cache.add_(x)
            return cache

    with pytest.raises(BuildError, match=r"torch\.export cannot capture Branch"):
        capture_exported(Branch(), (torch.zeros(4), frame(0, 4)))


def test_an_exported_program_serves_as_well() -> None:
    program = torch.export.export(Two(), (torch.zeros(4), torch.zeros(4), frame(0, 4)))
    assert capture_exported(program).states[0].pattern == "replace"


def test_an_exported_program_stays_where_it_is_when_the_builder_moves_its_copy() -> None:
    """Without a copy of everything, which Python's copying of torch's trees warns about."""
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),))
    moved = move_to_device_pass(export_module(program, (), None, None), "meta")
    assert all(tensor.is_meta for tensor in moved.state_dict.values())
    assert not any(tensor.is_meta for tensor in program.state_dict.values())


class Kept(nn.Module):
    """Holds its state where torch.export takes it for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [torch.full((2,), 3, dtype=torch.int64)]

    def forward(self, x: Tensor) -> Tensor:
        self.kept[0].add_(x)
        return self.kept[0] - 2


def test_a_program_that_is_built_stays_as_it_was(tmp_path: Path) -> None:
    x = torch.ones(2, dtype=torch.int64)
    exported = torch.export.export(Kept(), (x,))
    before = str(exported), str(exported.graph_signature)
    for number in range(2):
        engine = build(exported, (x,), path=tmp_path / str(number))
        assert engine(x).tolist() == [2, 2]
        assert (str(exported), str(exported.graph_signature)) == before
