"""Operators of the user's own: several states written in place where that was declared."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inplace
import pytest
import torch
from inplace.errors import LoadError
from inplace.plugins import Operation, register
from inplace.schema.specs import Alias
from inplace.schema.standalone import StandaloneManifest
from inplace.trt import load_tensorrt
from inplace_builder.capture.exported import capture_exported
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from inplace_builder.states import user_operators as aliases
from inplace_builder.states.user_operators import declare_alias, make_plugin
from support.engine_graph import load_graph
from support.user_operators import Leak, Leaky, Swapped, leak, make_leak, tick
from torch import Tensor, nn


@pytest.fixture
def declared() -> Iterator[None]:
    kept = dict(aliases._declared)
    declare_alias(leak, plugin=make_leak)
    declare_alias(tick)
    yield
    aliases._declared.clear()
    aliases._declared.update(kept)


def calls(graph: torch.fx.Graph, *targets: object) -> int:
    return sum(node.target in targets for node in graph.nodes)


def step(index: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(index))


def run_beside_eager(engine: Any, module: Leaky) -> None:
    mine, theirs = torch.zeros(3, 4), torch.zeros(3, 4)
    addresses = [mine.data_ptr(), *(tensor.data_ptr() for tensor in engine.states.values())]
    for index in range(6):
        result, expected = engine(mine, step(index)), module(theirs, step(index))
        torch.testing.assert_close(result, expected)
        assert torch.equal(mine, theirs)
        assert all(
            torch.equal(engine.states[name], module.get_buffer(name)) for name in ("total", "steps")
        )
    assert addresses == [mine.data_ptr(), *(tensor.data_ptr() for tensor in engine.states.values())]


@pytest.mark.usefixtures("declared")
def test_one_operator_writes_several_states_where_they_lie(tmp_path: Path) -> None:
    engine = build(Leaky(), (torch.zeros(3, 4), step(0)), path=tmp_path / "leaky")
    graph = load_graph(tmp_path / "leaky" / "engine.safetensors").module.graph
    assert calls(graph, leak) == 1
    assert calls(graph, torch.ops.aten.clone.default, torch.ops.aten.as_strided.default) == 0
    assert calls(graph, torch.ops.inplace.read.default) == 2, "the new total, and the old steps"
    assert sorted(engine.manifest.aliases) == [
        "level_updated@level@user",
        "steps_updated@steps@operator",
        "total_updated@total@user",
    ]
    why = {record.state: record.reason for record in engine.manifest.lowering}
    assert (
        "testing::leak writes it in its own memory, as declared at " in why["level"]
        and "self.total)" in why["level"]
    )
    run_beside_eager(engine, Leaky())


def test_an_operator_that_is_not_declared_works_on_copies(tmp_path: Path) -> None:
    engine = build(Leaky(), (torch.zeros(3, 4), step(0)), path=tmp_path / "leaky")
    assert {Alias.parse(alias).kind for alias in engine.manifest.aliases} == {"operator"}
    assert (
        "aliases are not declared (inplace_builder.declare_alias)"
        in engine.manifest.lowering[0].reason
    )
    run_beside_eager(engine, Leaky())
    with pytest.raises(
        BuildError,
        match=(
            r"state (level|total) is read, computed and written back whole: testing::leak "
            r"works on a copy"
        ),
    ):
        build(Leaky(), (torch.zeros(3, 4), step(0)), path=tmp_path / "strict", strict=True)


class Twice(nn.Module):
    """Two calls on the same states, and one without a result."""

    def forward(self, level: Tensor, total: Tensor, count: Tensor, x: Tensor) -> Tensor:
        old = level.sum()
        first = torch.ops.testing.leak(x, 0.5, level, total)
        torch.ops.testing.tick(count)
        between = level.amax()
        second = torch.ops.testing.leak(first, 0.25, level, total)
        out: Tensor = second + between + old + count.sum()
        return out


@pytest.mark.usefixtures("declared")
def test_versions_are_read_between_the_calls_that_make_them() -> None:
    states = [torch.ones(1, 4), torch.zeros(2, 4)[:1].clone(), torch.zeros(2, 3)]
    module, x = Twice(), torch.arange(4.0).view(1, 4)
    capture = capture_exported(module, (*(state.clone() for state in states), x))
    assert [state.pattern for state in capture.states] == ["user"] * 3
    assert calls(capture.exported.graph, leak) == 2 and calls(capture.exported.graph, tick) == 1
    mine = [
        state.bound(initial.clone()) for state, initial in zip(capture.states, states, strict=True)
    ]
    graph = capture.exported.module()
    for _ in range(4):
        torch.testing.assert_close(graph(x, capture.slots(), *mine), (module(*states, x),))
        for state, bound, own in zip(capture.states, mine, states, strict=True):
            assert torch.equal(bound, state.bound(own))


class Part(nn.Module):
    def forward(self, level: Tensor, total: Tensor, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.testing.leak(x, 0.5, level[0], total[0])
        return out


class Mixed(nn.Module):
    def forward(self, level: Tensor, total: Tensor, x: Tensor) -> Tensor:
        level.index_copy_(0, torch.tensor([1]), x[:1])
        out: Tensor = torch.ops.testing.leak(x, 0.5, level, total)
        return out


class Foreign(nn.Module):
    def forward(self, level: Tensor, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.testing.leak(x, 0.5, level, x * 2)
        return out


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Part(), "it gets a part of a state"),
        (Mixed(), "what it writes is not a state, or something else writes it too"),
        (Foreign(), "what it writes is not a state"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_an_operator_cannot_write_in_place_is_said_and_stays_correct(
    module: nn.Module, why: str, tmp_path: Path
) -> None:
    x = step(1)[0] if isinstance(module, Part) else step(1)
    states = [torch.ones(3, 4), torch.ones(3, 4)][: 1 if isinstance(module, Foreign) else 2]
    mine, theirs = [[state.clone() for state in states] for _ in range(2)]
    engine = build(module, (*states, x), path=tmp_path / "engine")
    assert any(why in record.reason for record in engine.manifest.lowering)
    for _ in range(3):
        torch.testing.assert_close(engine(*mine, x), module(*theirs, x))
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_what_cannot_be_declared() -> None:
    with pytest.raises(BuildError, match=r"testing\.nothing\.default writes none of its arguments"):
        declare_alias(torch.ops.testing.nothing.default)
    with pytest.raises(BuildError, match=r"writes \['states'\], which are not single tensors"):
        declare_alias(torch.ops.testing.several.default)
    with pytest.raises(BuildError, match="returns memory of an argument"):
        declare_alias(torch.ops.aten.add_.Tensor)


@pytest.mark.usefixtures("declared")
def test_a_declaration_stands() -> None:
    with pytest.raises(BuildError, match="declared already, with another plugin"):
        declare_alias(leak)


def test_a_plugin_must_alias_what_its_operator_writes() -> None:
    rtx = load_tensorrt("tensorrt_rtx")  # its networks take no plugins; the objects are the same
    register(Leak)
    register(Swapped)
    result = aliases.DeclaredOperator(leak, ("level", "total"), make_leak)
    plugin = make_plugin(result, rtx, {"decay": 0.5}, ["x", "level", "total"])
    assert plugin.num_outputs == 3 and [
        plugin.get_aliased_input(output) for output in range(3)
    ] == [-1, 1, 2]
    wrong = aliases.DeclaredOperator(
        leak, ("level", "total"), lambda tensorrt, constants: Swapped(decay=0.5)
    )
    with pytest.raises(
        BuildError,
        match=(
            r"has the aliases \{1: 2, 2: 1\} \(output: input\), the operator writes \['level', "
            r"'total'\]"
        ),
    ):
        make_plugin(wrong, rtx, {"decay": 0.5}, ["x", "level", "total"])
    with pytest.raises(BuildError, match="was declared without a TensorRT plugin"):
        make_plugin(aliases.DeclaredOperator(tick, ("count",), None), rtx, {}, ["count"])
    with pytest.raises(ValueError, match="another plugin has the name 'TestingLeak'"):
        register(type("Other", (Operation,), {"name": "TestingLeak"}))


@pytest.mark.usefixtures("declared")
def test_a_manifest_that_says_another_kind_is_read_back_against_the_graph(tmp_path: Path) -> None:
    build(Leaky(), (torch.zeros(3, 4), step(0)), path=tmp_path / "leaky")
    manifest = StandaloneManifest.load(tmp_path / "leaky")
    changed = tuple(
        alias.replace("level@operator", "level@user").replace("level@user", "level@operator")
        for alias in manifest.aliases
    )
    manifest.model_copy(update={"aliases": changed}).save(tmp_path / "leaky")
    with pytest.raises(LoadError, match=r"level.* written by an operator of the user's own"):
        inplace.load(tmp_path / "leaky")


LOAD = """
import sys, torch, inplace
try:
    inplace.load(sys.argv[1])
except inplace.errors.LoadError as error:
    print("refused", error)
sys.path.insert(0, sys.argv[2])
import support.user_operators
print("loaded", inplace.load(sys.argv[1])(torch.zeros(3, 4), torch.ones(3, 4))[0].shape)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("declared")
def test_an_engine_needs_its_operators_where_it_is_loaded(tmp_path: Path) -> None:
    build(Leaky(), (torch.zeros(3, 4), step(0)), path=tmp_path / "leaky")
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path / "leaky"), tests]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    refused, loaded = done.stdout.splitlines()
    assert "import the module that registers the operators" in refused
    assert loaded == "loaded torch.Size([3, 4])"
