"""`lift_mutated_buffers` and its inverse: buffers become inputs, and a plain module again."""

import inspect
import io
from typing import Any

import pytest
import torch
from inplace.schema.specs import Update
from inplace_builder import capture_exported, inline_lifted_buffers
from inplace_builder.errors import BuildError
from inplace_builder.states.lift import lift_mutated_buffers
from support.corpus.case import noise
from support.corpus.states import Gated, Recurrent
from torch import Tensor, nn
from torch.fx import GraphModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The given buffer is not writable:UserWarning"
)  # torch.export.load's own


class Nested(nn.Module):
    """A buffer in a submodule, one not saved, one only read, and a state of the caller's."""

    scale: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.register_buffer("cache", torch.zeros(2, 4))
        self.register_buffer("count", torch.full((), 7, dtype=torch.int64), persistent=False)
        self.register_buffer("scale", torch.full((4,), 0.5))

    def forward(self, own: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        cache = self.layer.get_buffer("cache")
        cache[0] = x * self.scale
        self.count += 1
        own.add_(cache.sum(0))
        return own * 2, self.count.clone()


def arguments() -> tuple[Tensor, Tensor]:
    return torch.ones(4), torch.arange(4.0)


def test_what_is_written_is_lifted_and_nothing_else() -> None:
    lifted = lift_mutated_buffers(Nested(), arguments())
    assert {state.source: (state.owner, tuple(state.initial.shape)) for state in lifted.states} == {
        "layer.cache": ("module", (2, 4)),
        "count": ("module", ()),
        "own": ("caller", (4,)),
    }
    placeholders = [
        node.name for node in lifted.graph_module.graph.nodes if node.op == "placeholder"
    ]
    assert placeholders == [*lifted.inputs, *(state.name for state in lifted.states)]
    attributes = {
        str(node.target) for node in lifted.graph_module.graph.nodes if node.op == "get_attr"
    }
    assert attributes == {"scale"}, "a buffer that is only read stays an attribute"


def test_the_lifted_function_mutates_nothing_and_returns_the_new_values() -> None:
    module = Nested()
    lifted = lift_mutated_buffers(module, arguments())
    assert not any(
        node.target._schema.is_mutable
        for node in lifted.graph_module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )
    states = [state.initial.clone() for state in lifted.states]
    own, x = arguments()
    *outputs, cache, count, mine = lifted.graph_module(x, *states)
    assert all(
        torch.equal(tensor, state.initial)
        for tensor, state in zip(states, lifted.states, strict=True)
    )
    by_source = dict(
        zip((state.source for state in lifted.states), (cache, count, mine), strict=True)
    )
    expected = module(own, x)
    assert len(outputs) == lifted.num_outputs == 2
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert torch.equal(by_source["layer.cache"], module.layer.get_buffer("cache"))
    assert torch.equal(by_source["count"], module.count) and torch.equal(by_source["own"], own)


def test_lifting_leaves_the_module_and_its_values_alone() -> None:
    module = Nested()
    lifted = lift_mutated_buffers(module, arguments())
    lifted.states[0].initial.fill_(9)
    assert module.count.item() == 7 and not module.layer.get_buffer("cache").any()


@pytest.mark.parametrize("rewritten", [False, True], ids=["function", "capture"])
def test_inlined_again_it_is_a_plain_module_that_holds_its_buffers(rewritten: bool) -> None:
    module, (own, x) = Nested(), arguments()
    plain = inline_lifted_buffers(
        capture_exported(module, (own, x)) if rewritten else lift_mutated_buffers(module, (own, x))
    )
    assert type(plain).__mro__[1] is GraphModule
    assert list(inspect.signature(plain.forward).parameters) == ["x", "own"], (
        "inputs, then the caller's states"
    )
    addresses = {name: buffer.data_ptr() for name, buffer in plain.named_buffers()}
    mine, theirs = torch.ones(1, 4) if rewritten else torch.ones(4), torch.ones(4)
    for step in range(4):
        result, expected = plain(x + step, mine), module(theirs, x + step)
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
        assert torch.equal(mine.view(4), theirs)
        for name in ("layer.cache", "count"):
            assert torch.equal(
                plain.get_buffer(name).view_as(module.get_buffer(name)), module.get_buffer(name)
            )
    assert addresses == {name: buffer.data_ptr() for name, buffer in plain.named_buffers()}


@pytest.mark.parametrize("rewritten", [False, True], ids=["function", "capture"])
def test_inlined_again_it_is_exported_saved_and_loaded(rewritten: bool) -> None:
    torch.manual_seed(0)
    module, x = Gated().eval(), noise(0, 1, 4)
    plain = inline_lifted_buffers(
        capture_exported(module, (x,)) if rewritten else lift_mutated_buffers(module, (x,))
    )
    program, file = torch.export.export(plain, (x,)), io.BytesIO()
    assert set(program.graph_signature.inputs_to_buffers.values()) >= {
        "cell",
        "window",
        "count",
        "seen",
        "cache",
    }
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for step in range(5):
        with torch.no_grad():
            expected = module(noise(step, 1, 4))
            result = again(noise(step, 1, 4))
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other)
    for name in ("cell", "window", "count", "seen", "cache"):
        torch.testing.assert_close(
            again.get_buffer(name).view_as(module.get_buffer(name)), module.get_buffer(name)
        )


def test_lifted_and_inlined_and_lifted_again_the_states_are_the_same() -> None:
    once = lift_mutated_buffers(Nested(), arguments())
    own, x = arguments()
    twice = lift_mutated_buffers(inline_lifted_buffers(once), (x, own))
    assert {(s.source, s.owner) for s in once.states} == {(s.source, s.owner) for s in twice.states}


class Turn(nn.Module):
    """Buffers that take each other's values, and one that is returned."""

    a: Tensor
    b: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(3))
        self.register_buffer("b", torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        old = self.a.clone()
        self.a.copy_(self.b)
        self.b.copy_(old + x)
        return self.a, old


def test_states_that_take_each_others_values_are_written_when_all_are_known() -> None:
    module, x = Turn(), torch.ones(3)
    plain = inline_lifted_buffers(lift_mutated_buffers(module, (x,)))
    for _ in range(3):
        result, expected = plain(x), module(x)
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
        assert all(torch.equal(plain.get_buffer(name), module.get_buffer(name)) for name in "ab")
    assert result[0].data_ptr() != plain.get_buffer("a").data_ptr(), (
        "what is returned is not a state's own memory"
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Module(), nn.Module()
        cache = torch.zeros(4)
        self.first.register_buffer("cache", cache)
        self.second.register_buffer("cache", cache)

    def forward(self, x: Tensor) -> Tensor:
        self.first.get_buffer("cache").add_(x)
        out: Tensor = self.second.get_buffer("cache") * 2
        return out


def test_one_buffer_under_two_names_is_lifted_once() -> None:
    lifted = lift_mutated_buffers(Tied(), (torch.ones(4),))
    assert [state.source for state in lifted.states] == ["first.cache"]
    assert inline_lifted_buffers(lifted)(torch.ones(4))[0].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("module", "reason"),
    [(nn.Linear(4, 4), "it has no state to keep"), (nn.Identity(), "it has no state to keep")],
)
def test_a_module_without_mutation_has_nothing_to_lift(module: nn.Module, reason: Any) -> None:
    with pytest.raises(BuildError, match=reason):
        lift_mutated_buffers(module, (torch.ones(4),))


def test_a_buffer_becomes_a_state_with_its_shape_in_a_slot_and_what_it_begins_with() -> None:
    states = capture_exported(Recurrent(), (noise(0, 1, 4),)).states
    specs = {state.tensor.source: state.spec() for state in states}
    count = specs["count"]
    assert (count.fill, count.shape, count.update) == (2.0, (), Update.REPLACE)
    assert specs["hidden"].shape == (4,), "a batch of one is the slot axis"
    assert specs["window"].shape == (3, 4)


def test_lifted_buffers_go_back() -> None:
    module, steps = Recurrent(), [noise(step, 1, 4) for step in range(4)]
    plain = inline_lifted_buffers(capture_exported(module, (steps[0],)))
    assert isinstance(plain, torch.fx.GraphModule)
    addresses = {name: buffer.data_ptr() for name, buffer in plain.named_buffers()}
    for step in steps:
        with torch.no_grad():
            torch.testing.assert_close(plain(step), module(step))
    for name in ("hidden", "cellular", "window", "count", "total", "seen", "cache"):
        owned, own = plain.get_buffer(name), module.get_buffer(name)
        torch.testing.assert_close(owned.reshape(own.shape), own)
    assert addresses == {name: buffer.data_ptr() for name, buffer in plain.named_buffers()}
    again = torch.export.export(plain, (steps[0],))
    assert sum(node.target is torch.ops.inplace.update.default for node in again.graph.nodes) == 8
