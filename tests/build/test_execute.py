"""A loaded engine in a `torch.export` program: one operator that holds it, with equal results."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import inplace
import pytest
import torch
from inplace.standalone import Engine
from inplace_builder.standalone.build import build
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

CAPACITY = 8
EXECUTE = torch.ops.inplace.execute.default


class Step(nn.Module):
    """Two caller-owned caches, a buffer in a submodule, a number, and a constant output."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.inner = nn.Module()
        self.inner.register_buffer("count", torch.full((1,), 3, dtype=torch.int64))

    def forward(self, cache: dict[str, Tensor], x: Tensor, start: int) -> dict[str, Any]:
        count = self.inner.get_buffer("count")
        cache["keys"][:, start : start + x.shape[1]] = self.project(x)
        cache["values"].mul_(0.5)
        count += 1
        return {
            "out": cache["keys"].sum(1) * count + cache["values"],
            "rest": (x * 2, None, start + 1),
        }


def new_cache() -> dict[str, Tensor]:
    return {"keys": torch.zeros(1, CAPACITY, 4), "values": torch.ones(1, 4)}


def inputs(step: int, tokens: int) -> tuple[Tensor, int]:
    return torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(step)), step


STEPS = [inputs(step, 2 + step % 2) for step in range(2, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("engines") / "step"
    shapes = (
        {"keys": None, "values": None},
        {1: Dim("tokens", min=2, max=CAPACITY - 1)},
        Dim.DYNAMIC,
    )
    build(Step(), (new_cache(), *inputs(2, 3)), path=path, dynamic_shapes=shapes)
    return path


def exported(engine: nn.Module) -> ExportedProgram:
    shapes = {
        "args": ({"keys": None, "values": None}, {1: Dim("tokens", min=2, max=4)}, Dim.DYNAMIC)
    }
    return torch.export.export(engine, (new_cache(), *inputs(2, 3)), dynamic_shapes=shapes)


@pytest.fixture
def program(folder: Path) -> ExportedProgram:
    return exported(inplace.load(folder))


def test_a_program_holds_one_execute_and_what_it_needs(
    program: ExportedProgram, folder: Path
) -> None:
    assert sum(node.target is EXECUTE for node in program.graph.nodes) == 1
    assert {str(node.target) for node in program.graph.nodes if node.op == "call_function"} <= {
        "inplace.execute.default",
        "aten.empty.memory_format",
        "aten.sym_size.int",
        "<built-in function add>",
    }, "beside it only the memory of its results"
    (file,) = program.constants.values()
    assert bytes(file.numpy()) == (folder / "engine.safetensors").read_bytes()
    assert program.state_dict["owned.inner.count"].tolist() == [3]


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_does_what_the_engine_does(
    folder: Path, program: ExportedProgram, decomposed: bool
) -> None:
    engine = inplace.load(folder)
    if decomposed:
        with warnings.catch_warnings():
            # torch's own, where it copies its call graph
            warnings.simplefilter("ignore", FutureWarning)
            program = program.run_decompositions({})
        assert set(program.graph_signature.buffers_to_mutate.values()) == {"owned.inner.count"}
        assert len(program.graph_signature.user_inputs_to_mutate) == 2
    module = program.module()
    mine, theirs = [new_cache(), new_cache()], [new_cache(), new_cache()]
    addresses = [tensor.data_ptr() for cache in theirs for tensor in cache.values()]
    for index, step in enumerate(STEPS):
        result, expected = module(theirs[index % 2], *step), engine(mine[index % 2], *step)
        assert torch.equal(result["out"], expected["out"])
        assert torch.equal(result["rest"][0], expected["rest"][0]) and result["rest"][
            1:
        ] == expected["rest"][1:] == (None, step[1] + 1)
    for cache, own in zip(theirs, mine, strict=True):
        assert all(torch.equal(cache[name], own[name]) for name in own)
    assert addresses == [tensor.data_ptr() for cache in theirs for tensor in cache.values()]
    assert (
        module.get_buffer("owned.inner.count").item()
        == engine.states["inner.count"].item()
        == 3 + len(STEPS)
    )


NEW_PROCESS = """
import sys, torch, inplace.standalone
module = torch.export.load(sys.argv[1]).module()
cache, steps = torch.load(sys.argv[2])
out = [module(cache, *step) for step in steps]
torch.save((out, cache, module.get_buffer("owned.inner.count")), sys.argv[3])
assert "inplace_builder" not in sys.modules
"""


@pytest.mark.slow
def test_a_saved_program_needs_nothing_but_itself(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "engine")
    engine = inplace.load(tmp_path / "engine")
    torch.export.save(exported(engine), tmp_path / "program.pt2")
    shutil.rmtree(tmp_path / "engine")
    torch.save((new_cache(), STEPS), tmp_path / "in.pt")
    arguments = [str(tmp_path / name) for name in ("program.pt2", "in.pt", "out.pt")]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NEW_PROCESS, *arguments], check=True, timeout=120
    )
    out, theirs, count = torch.load(tmp_path / "out.pt")
    mine = new_cache()
    for step, result in zip(STEPS, out, strict=True):
        expected = engine(mine, *step)
        assert torch.equal(result["out"], expected["out"]) and torch.equal(
            result["rest"][0], expected["rest"][0]
        )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(count, engine.states["inner.count"])


class Around(nn.Module):
    """A model of which an engine is a part, called twice."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.head = nn.Linear(4, 2)

    def forward(self, cache: dict[str, Tensor], x: Tensor) -> Tensor:
        first = self.engine(cache, x, 2)["out"]
        out: Tensor = self.head(self.engine(cache, x + first, 4)["out"])
        return out


def test_an_engine_is_a_part_of_a_larger_program(folder: Path) -> None:
    model, x = Around(inplace.load(folder)).eval(), inputs(0, 2)[0]
    program = torch.export.export(model, (new_cache(), x))
    model.engine = inplace.load(folder)  # the program has the buffers of the first
    assert sum(node.target is EXECUTE for node in program.graph.nodes) == 2
    mine, theirs = new_cache(), new_cache()
    with torch.no_grad():
        expected = model(mine, x)
        torch.testing.assert_close(program.module()(theirs, x), expected, rtol=0, atol=0)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_program_refuses_what_its_engine_refuses(program: ExportedProgram) -> None:
    module, cache = program.module(check_guards=False), new_cache()
    x, start = inputs(2, 2)
    with pytest.raises(inplace.errors.CallError, match=r"share memory"):
        module(cache, cache["keys"][:, :2], start)
    with pytest.raises(RuntimeError, match=r"state cache\['keys'\] has strides"):
        module({**cache, "keys": torch.zeros(1, 4, CAPACITY).mT}, x, start)
    assert not cache["keys"].any()


def test_an_engine_file_that_is_not_the_manifests_is_refused(folder: Path) -> None:
    # The same manifest as another text, for which no engine is loaded yet.
    text = inplace.load(folder).manifest.model_dump_json(indent=2)
    cache = new_cache()
    states = [cache["keys"], cache["values"], torch.zeros(1, dtype=torch.int64)]
    with pytest.raises(RuntimeError, match="checksum"):
        torch.ops.inplace.execute(
            torch.zeros(9, dtype=torch.uint8),
            text,
            [2],
            [inputs(2, 2)[0]],
            states,
            [torch.empty(1, 4)],
        )


class Selected(nn.Module):
    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        cache.add_(x)
        return x[x > 0]


def test_a_result_whose_shape_depends_on_values_is_refused_by_export(tmp_path: Path) -> None:
    engine = build(
        Selected(), (torch.zeros(4), torch.tensor([1.0, -1, 2, 3])), path=tmp_path / "selected"
    )
    assert engine(torch.zeros(4), torch.tensor([1.0, 2, 3, -1])).tolist() == [1, 2, 3]
    with pytest.raises(inplace.errors.CallError, match="depends on values"):
        torch.export.export(engine, (torch.zeros(4), torch.ones(4)))
