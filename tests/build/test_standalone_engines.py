"""Standalone engines, called like their module: values, states, addresses, files, refusals."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inplace
import pytest
import torch
from inplace.errors import CallError, LoadError
from inplace.schema.standalone import FILE_NAME, StandaloneManifest
from inplace.standalone import Engine
from inplace_builder.compare import same_bits
from inplace_builder.errors import BuildError
from inplace_builder.graph.export import export_module
from inplace_builder.standalone.build import build
from support.corpus.case import noise
from support.corpus.states import Assigned
from support.manifests import edit
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

CAPACITY = 8


class Step(nn.Module):
    """A dict of two caches, a buffer, a number of tokens that varies, and outputs in a dict."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.register_buffer("count", torch.full((1,), 3, dtype=torch.int64))

    def forward(
        self, cache: dict[str, Tensor], x: Tensor, positions: Tensor, scale: int = 2
    ) -> dict[str, Any]:
        cache["keys"].index_copy_(1, positions, self.project(x))
        cache["values"].index_copy_(1, positions, x)
        self.count += 1
        return {
            "out": (cache["keys"] * cache["values"]).sum(1) * scale,
            "rest": (self.count.clone(), None),
        }


def new_cache() -> dict[str, Tensor]:
    return {"keys": torch.zeros(1, CAPACITY, 4), "values": torch.zeros(1, CAPACITY, 4)}


def inputs(step: int, tokens: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(1, tokens, 4, generator=generator), torch.arange(tokens) + step


@pytest.fixture(scope="module")
def module() -> Step:
    torch.manual_seed(0)
    return Step()


@pytest.fixture(scope="module")
def folder(module: Step, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "step"
    tokens = torch.export.Dim("tokens", min=1, max=CAPACITY)
    shapes = {"cache": {"keys": None, "values": None}, "x": {1: tokens}, "positions": {0: tokens}}
    build(module, (new_cache(), *inputs(0)), path=path, dynamic_shapes=shapes)
    assert module.count.item() == 3, "a build leaves the module as it was"
    return path


@pytest.fixture
def engine(folder: Path) -> Engine:
    return inplace.load(folder)


def eager(module: Step, cache: dict[str, Tensor], *arguments: Tensor, count: int) -> Any:
    module.count.fill_(count)
    with torch.no_grad():
        result = module(cache, *arguments)
    module.count.fill_(3)
    return result


def test_two_caches_alternate_at_their_addresses(module: Step, engine: Engine) -> None:
    mine, theirs = [new_cache(), new_cache()], [new_cache(), new_cache()]
    pointers = [[tensor.data_ptr() for tensor in cache.values()] for cache in mine]
    address = engine.states["count"].data_ptr()
    for step in range(6):
        x, positions = inputs(step, 1 + step % 3)
        which = step % 2
        expected = eager(module, theirs[which], x, positions, count=3 + step)
        # by name, and the dict in another order
        passed = {"values": mine[which]["values"], "keys": mine[which]["keys"]}
        result = (
            engine(passed, x, positions)
            if step < 3
            else engine(positions=positions, x=x, cache=passed)
        )
        torch.testing.assert_close(result["out"], expected["out"])
        assert (result["rest"][0].item(), result["rest"][1]) == (4 + step, None)
        assert list(result) == ["out", "rest"]
        for cache, own in zip(mine, theirs, strict=True):
            torch.testing.assert_close(cache, own)
            assert torch.equal(cache["values"], own["values"]), (
                "what is only copied is equal bit for bit"
            )
    assert pointers == [[tensor.data_ptr() for tensor in cache.values()] for cache in mine]
    assert address == engine.states["count"].data_ptr()
    assert engine.states["count"].item() == 9


def test_the_manifest_describes_states_and_arguments(folder: Path) -> None:
    manifest = StandaloneManifest.load(folder)
    assert [str(alias) for alias in manifest.parsed_aliases] == list(manifest.aliases)
    assert sorted(alias.rpartition("@")[2] for alias in manifest.aliases) == ["operator"] * 3
    assert {state.source: state.owner for state in manifest.states} == {
        "cache['keys']": "caller",
        "cache['values']": "caller",
        "count": "module",
    }
    assert [argument.where for argument in manifest.call.arguments] == [
        "cache['keys']",
        "cache['values']",
        "x",
        "positions",
    ]
    assert manifest.built_with["verified_calls"] == "6"


NEW_PROCESS = """
import sys, torch, inplace
engine, (cache, arguments) = inplace.load(sys.argv[1]), torch.load(sys.argv[2])
out = [engine(cache, *each)["out"] for each in arguments]
torch.save((out, cache, dict(engine.states)), sys.argv[3])
assert "inplace_builder" not in sys.modules
"""


@pytest.mark.slow
def test_saved_and_loaded_in_a_new_process(engine: Engine, tmp_path: Path) -> None:
    cache = new_cache()
    engine(cache, *inputs(0))
    engine.save(tmp_path / "again")
    engine.save(tmp_path / "again")  # in its own place
    steps = [inputs(step) for step in range(1, 4)]
    torch.save((cache, steps), tmp_path / "in.pt")
    arguments = [str(tmp_path / name) for name in ("again", "in.pt", "out.pt")]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NEW_PROCESS, *arguments], check=True, timeout=120
    )
    out, theirs, states = torch.load(tmp_path / "out.pt")
    for each, result in zip(steps, out, strict=True):
        assert torch.equal(engine(cache, *each)["out"], result)
    assert all(torch.equal(cache[name], theirs[name]) for name in cache)
    assert states["count"].item() == engine.states["count"].item() == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "in.pt", "out.pt"], (
        "no draft is left"
    )


Arguments = dict[str, Any]


REFUSED: dict[str, tuple[Callable[[Arguments], object], str]] = {
    "missing": (lambda a: a.pop("positions"), "argument positions is missing"),
    "unknown": (lambda a: a.update(y=1), "argument y is unknown"),
    "structure": (lambda a: a["cache"].pop("keys"), r"nested in another way.*cache\['keys'\]"),
    "no tensor": (lambda a: a.update(x=[1.0]), "argument x is a list, the engine takes a tensor"),
    "dtype": (
        lambda a: a.update(positions=a["positions"].int()),
        r"argument positions is torch\.int32.*torch\.int64; convert",
    ),
    "state dtype": (
        lambda a: a["cache"].update(keys=a["cache"]["keys"].double()),
        r"argument cache\['keys'\] is torch\.float64.*allocate",
    ),
    "device": (
        lambda a: a.update(x=a["x"].to("meta")),
        "argument x is on meta, the engine runs on cpu",
    ),
    "rank": (
        lambda a: a.update(x=a["x"][0]),
        r"argument x is \[2, 4\], the engine takes \[1, \w+, 4\]",
    ),
    "extent": (
        lambda a: a.update(x=a["x"][..., :3]),
        "argument x has the extent on axis 2 3, the engine was built for 4",
    ),
    "range": (
        lambda a: a.update(x=torch.zeros(1, 9, 4)),
        "argument x has the extent on axis 1 9, the engine was built for 1 to 8",
    ),
    "two extents": (
        lambda a: a.update(positions=torch.arange(3)),
        "argument positions.*which must be that of x, 2",
    ),
    "state shape": (
        lambda a: a["cache"].update(values=torch.zeros(1, 9, 4)),
        r"argument cache\['values'\] has the extent on axis 1 9",
    ),
    "strides": (
        lambda a: a["cache"].update(keys=torch.zeros(1, 4, CAPACITY).mT),
        r"cache\['keys'\] is a state with strides",
    ),
    "one cache twice": (
        lambda a: a["cache"].update(keys=a["cache"]["values"]),
        r"cache\['values'\].*share memory|cache\['keys'\].*share memory",
    ),
    "input in a state": (
        lambda a: a.update(x=a["cache"]["keys"][:, 1:3]),
        r"cache\['keys'\] and argument x share memory",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_call_is_refused_and_changes_nothing(engine: Engine, case: str) -> None:
    change, message = REFUSED[case]
    cache, (x, positions) = new_cache(), inputs(0)
    arguments = {"cache": dict(cache), "x": x, "positions": positions}
    change(arguments)
    with pytest.raises(CallError, match=message) as refused:
        engine(**arguments)
    if "cache[" in str(refused.value) and case != "structure":
        assert re.search(
            r"; the module writes it at .*test_standalone_engines\.py\", line \d+, in forward \(",
            str(refused.value),
        )
    assert not any(tensor.any() for tensor in cache.values())
    assert engine.states["count"].item() == 3
    engine(cache, x, positions)
    assert engine.states["count"].item() == 4, "the engine is as usable as before"


class Pair(nn.Module):
    """A tuple, a number that is baked in, and a state that is returned."""

    def forward(
        self, cache: tuple[Tensor, Tensor], x: Tensor, factor: int
    ) -> tuple[Tensor, Tensor]:
        cache[0].add_(x * factor)
        cache[1].copy_(cache[0])
        return cache[0], x


def test_a_tuple_and_a_constant(tmp_path: Path) -> None:
    engine = build(
        Pair(), ((torch.zeros(3), torch.zeros(3)), torch.ones(3), 2), path=tmp_path / "pair"
    )
    assert engine.manifest.built_with["verified_error"] == "0, bit for bit"
    cache = (torch.zeros(3), torch.zeros(3))
    returned, x = engine(cache, torch.ones(3), 2)
    assert cache[1].tolist() == returned.tolist() == [2, 2, 2] and x.tolist() == [1, 1, 1]
    assert returned.data_ptr() != cache[0].data_ptr(), "a returned state is a snapshot"
    with pytest.raises(CallError, match="argument factor is 3, the engine was built for 2"):
        engine(cache, torch.ones(3), 3)
    with pytest.raises(
        CallError, match="4 arguments were passed, the engine takes 3: cache, x, factor"
    ):
        engine(cache, torch.ones(3), 2, 2)
    with pytest.raises(CallError, match="nested in another way"):
        engine(list(cache), torch.ones(3), 2)


def test_a_graph_that_disagrees_with_its_manifest_is_refused(
    folder: Path, engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "changed"

    def changed(change: Callable[[Any], object]) -> None:
        engine.save(path)
        edit(path, change, FILE_NAME)

    changed(lambda record: record["states"].reverse())
    with pytest.raises(LoadError, match="the manifest says"):
        inplace.load(path)
    changed(lambda record: record["aliases"].pop())
    with pytest.raises(LoadError, match="must have one alias"):
        inplace.load(path)
    changed(
        lambda record: record.update(
            aliases=[alias.replace("operator", "plugin") for alias in record["aliases"]]
        )
    )
    with pytest.raises(LoadError, match="updated by operators of a PyTorch graph"):
        inplace.load(path)
    changed(lambda record: record["call"]["arguments"][2].update(dtype="float64"))
    with pytest.raises(LoadError, match="takes x as"):
        inplace.load(path)
    changed(lambda record: record.update(manifest_version=1))
    with pytest.raises(LoadError) as old:
        inplace.load(path)
    assert "has manifest version 1, this runtime reads version 2: build the engine" in str(
        old.value
    )
    assert f'again with `inplace_builder.build(module, …, path="{path}")`' in str(old.value)
    engine.save(path)
    (path / "states.safetensors").write_bytes(b"x")
    with pytest.raises(LoadError, match="truncated or replaced"):
        inplace.load(path)


class Recording(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, position: int) -> Tensor:
        cache[:, position : position + 1] = x
        return cache.sum() * position


def test_an_exported_program_and_a_number_that_varies(tmp_path: Path) -> None:
    arguments = (torch.zeros(1, 8, 4), torch.ones(1, 1, 4), 3)
    exported = torch.export.export(
        Recording(), arguments, dynamic_shapes=(None, None, torch.export.Dim.DYNAMIC)
    )
    engine = build(exported, path=tmp_path / "recording")
    cache, x = torch.zeros(1, 8, 4), torch.ones(1, 1, 4)
    for position in (5, 2):
        engine(cache, x, position=position)
    assert cache[0, :, 0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    before = cache.clone()
    with pytest.raises(CallError, match="argument position is a float, the engine takes an int"):
        engine(cache, x, 1.0)
    with pytest.raises(IndexError, match="outside a slot that holds 8"):
        engine(cache, x, 8)
    assert torch.equal(cache, before)


class Unlike(nn.Module):
    """Computes something else while it is exported."""

    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        cache.copy_(x + (1 if torch.compiler.is_exporting() else 2))
        return cache + 1


def test_an_engine_that_differs_from_its_module_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match=r"(output 0 of call 0|state cache).* differs from the module"
    ):
        build(Unlike(), (torch.zeros(3), torch.ones(3)), path=tmp_path / "unlike")
    with pytest.raises(
        BuildError, match="the module cannot be called 1 times with its example inputs"
    ):
        build(Step(), (new_cache(), *inputs(CAPACITY)), path=tmp_path / "beside")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(BuildError, match="other files in it"):
        build(Pair(), ((torch.zeros(3), torch.zeros(3)), torch.ones(3), 2), path=tmp_path / "mine")


@pytest.mark.parametrize("name", ["caller_owned_cache", "module_owned_buffers"])
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / f"{name}.py"
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "nothing was copied" in printed and "@operator" in printed


class Copies(nn.Module):
    """Returns its state, which is a copy of the input, or of a constant."""

    constant: Tensor

    def __init__(self, *, constant: bool) -> None:
        super().__init__()
        self.takes_constant = constant
        self.register_buffer("constant", torch.ones(2, 4))

    def forward(self, cache: Tensor, value: Tensor) -> Tensor:
        cache.copy_(self.constant if self.takes_constant else value)
        return cache


def test_a_returned_state_is_memory_of_its_own(tmp_path: Path) -> None:
    """It is neither the input nor the engine's constant."""
    example = (torch.zeros(2, 4), torch.randn(2, 4))
    engine = build(Copies(constant=False), example, path=tmp_path / "copies")
    value = torch.randn(2, 4)
    snapshot = engine(torch.zeros(2, 4), value)
    expected = value.clone()
    value.zero_()
    assert same_bits(snapshot, expected)
    engine = build(Copies(constant=True), example, path=tmp_path / "constant")
    engine(torch.zeros(2, 4), value).fill_(7.0)
    cache = torch.zeros(2, 4)
    engine(cache, value)
    assert cache.eq(1.0).all()


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(4)

    def forward(self, value: Tensor) -> Tensor:
        self.total.add_(value)
        return self.total * 1


def test_a_plain_attribute_that_is_written_is_a_state_too(tmp_path: Path) -> None:
    engine = build(Unregistered(), (noise(0, 4),), path=tmp_path / "engine")
    total = torch.zeros(4)
    for step in range(4):
        total += noise(step, 4)
        torch.testing.assert_close(engine(noise(step, 4)), total)


def test_an_engine_that_was_converted_is_refused(tmp_path: Path) -> None:
    engine: Engine = build(Assigned(), (noise(0, 4),), path=tmp_path / "engine")
    engine.double()
    with pytest.raises(
        CallError,
        match=(
            r"state total has become \[4\] torch\.float64, the engine was built for \[4\] "
            r"float32"
        ),
    ):
        engine(noise(0, 4))


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
