"""Standalone engines on TensorRT: values, addresses, CUDA graphs, user plugins, refusals."""

import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import inplace
import pytest
import torch
from inplace.errors import CallError, LoadError
from inplace.plugins import plugins, register
from inplace.schema.standalone import StandaloneManifest
from inplace.standalone import Engine, execute
from inplace.trt import load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from inplace_builder.standalone.serialize import serialize
from inplace_builder.states import user_operators as aliases
from inplace_builder.states.user_operators import declare_alias
from support.comparing import tensors
from support.corpus import CORPUS
from support.corpus.attention import CAPACITY, Projected
from support.corpus.case import ModuleCase, noise
from support.corpus.states import Gated
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)

from support.engine_runner import PlanRunner  # noqa: E402
from support.user_operators import Leak, Leaky, Swapped, leak, make_leak  # noqa: E402

ATTENTION, RECURRENT = CORPUS["attention written out"], CORPUS["recurrent"]


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-4)


def cuda(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.cuda(), tree)


def built(case: ModuleCase, path: Path, **options: Any) -> tuple[nn.Module, Engine]:
    torch.manual_seed(0)
    module = case.module().eval()
    return module, build(
        deepcopy(module),
        case.example(),
        path=path,
        engine="tensorrt",
        optimization_level=1,
        **case.options,
        **options,
    )


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("standalone") / "attention"
    built(ATTENTION, path)
    return path


def test_two_caches_have_a_graph_each(attention: Path) -> None:
    engine, case = inplace.load(attention), ATTENTION
    caches = cuda([case.states() for _ in range(2)])
    for step in range(8):
        engine(*caches[step % 2], *cuda(case.inputs(step // 2)))
    graphs = engine._runner._graphs  # type: ignore[attr-defined]
    assert len(graphs) == 2 and all(graph is not None for graph in graphs.values())
    for name in ("keys", "values"):
        assert (
            torch.equal(caches[0][0][name], caches[1][0][name])
            and caches[0][0][name][:, :, :4].all()
        )
        assert not caches[0][0][name][:, :, 4:].any()
    for _ in range(20):  # more caches than graphs are kept
        engine(*cuda(case.states()), *cuda(case.inputs(0)))
    engine(*caches[0], *cuda(case.inputs(5)))
    assert caches[0][0]["keys"][:, :, 5].all()


def test_a_call_is_ordered_with_the_callers_stream(attention: Path) -> None:
    engine, case = inplace.load(attention), ATTENTION
    reference = cuda(case.states())
    expected = [engine(*reference, *cuda(case.inputs(step))).clone() for step in range(6)]
    stream, (cache,) = torch.cuda.Stream(), cuda(case.states())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for step in range(6):
            x, position = case.inputs(step)
            late = torch.zeros(1, 1, 16, device="cuda")
            torch.cuda._sleep(2_000_000)  # what is queued ahead of the call must be seen by it
            late.copy_(x.cuda())
            out = engine(cache, late, position.cuda())
            late.fill_(float("nan"))  # and what follows must not overtake it
            assert torch.equal(out, expected[step])
    stream.synchronize()


REFUSED: dict[str, tuple[Any, str]] = {
    "on the CPU": (
        lambda c: c.update(keys=c["keys"].cpu()),
        r"cache\['keys'\] is on cpu, the engine runs on cuda; allocate",
    ),
    "misaligned": (
        lambda c: c.update(
            keys=torch.zeros(1 + 16 * CAPACITY, device="cuda")[1:].view(1, 2, CAPACITY, 8)
        ),
        r"cache\['keys'\] begins at 0x.*multiples of 256 bytes",
    ),
    "strides": (
        lambda c: c.update(keys=torch.zeros(1, 2, 8, CAPACITY, device="cuda").mT),
        r"cache\['keys'\] is a state with strides",
    ),
    "dtype": (
        lambda c: c.update(keys=c["keys"].half()),
        r"cache\['keys'\] is torch\.float16, the engine was built for torch\.float32",
    ),
    "shape": (
        lambda c: c.update(keys=torch.zeros(1, 2, CAPACITY + 1, 8, device="cuda")),
        r"cache\['keys'\] has the extent on axis 2 13",
    ),
    "one twice": (lambda c: c.update(keys=c["values"]), "share memory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_call_is_refused_and_changes_nothing(attention: Path, case: str) -> None:
    engine = inplace.load(attention)
    (cache,) = cuda(ATTENTION.states())
    change, message = REFUSED[case]
    passed = dict(cache)
    change(passed)
    with pytest.raises(CallError, match=message):
        engine(passed, *cuda(ATTENTION.inputs(0)))
    assert not any(tensor.any() for tensor in cache.values())


def edited(folder: Path, tmp_path: Path, old: str, new: str) -> Path:
    inplace.load(folder).save(tmp_path / "edited")
    manifest = StandaloneManifest.load(tmp_path / "edited")
    changed = tuple(alias.replace(old, new) for alias in manifest.aliases)
    manifest.model_copy(update={"aliases": changed}).save(tmp_path / "edited")
    return tmp_path / "edited"


def test_aliases_that_disagree_with_the_plan_are_refused(attention: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="fails in its first step"):
        inplace.load(edited(attention, tmp_path, "@plugin", "@copy"))
    built(ATTENTION, tmp_path / "copied", alias="copy")
    with pytest.raises(LoadError, match="no plugin received the memory of"):
        inplace.load(edited(tmp_path / "copied", tmp_path, "@copy", "@plugin"))
    with pytest.raises(
        LoadError, match=r"is the memory of no input|needs a TensorRT with cache layers"
    ):
        inplace.load(edited(attention, tmp_path, "@plugin", "@kv_cache_update"))
    with pytest.raises(LoadError, match="has the tensors"):
        inplace.load(edited(attention, tmp_path, "_updated@", "_renewed@"))


NEW_PROCESS = """
import sys, torch, inplace.standalone
module = torch.export.load(sys.argv[1]).module()
(cache, arguments) = torch.load(sys.argv[2])
out = [module(cache, *each) for each in arguments]
torch.save((out, cache), sys.argv[3])
"""


def test_a_program_holds_the_plan_and_runs_in_a_new_process(
    attention: Path, tmp_path: Path
) -> None:
    engine, case = inplace.load(attention), ATTENTION
    steps = [cuda(case.inputs(step)) for step in range(4)]
    (cache,) = cuda(case.states())
    program = torch.export.export(engine, (cache, *steps[0]))
    assert (
        sum(node.target is torch.ops.inplace.execute.default for node in program.graph.nodes) == 1
    )
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((cache, steps), tmp_path / "in.pt")
    paths = [str(tmp_path / name) for name in ("program.pt2", "in.pt", "out.pt")]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NEW_PROCESS, *paths], check=True, timeout=120
    )
    out, theirs = torch.load(tmp_path / "out.pt")
    for step, result in zip(steps, out, strict=True):
        assert torch.equal(engine(cache, *step), result)
    assert all(torch.equal(cache[name], theirs[name]) for name in cache)
    execute._loaded.clear()  # now this process, too, must load the plan from the program
    (again,) = cuda(case.states())
    assert torch.equal(program.module()(again, *steps[0]), out[0])


def test_owned_states_are_saved(tmp_path: Path) -> None:
    case = RECURRENT
    _, engine = built(case, tmp_path / "engine")
    for step in range(3):
        engine(*cuda(case.inputs(step)))
    engine.save(tmp_path / "later")
    other = inplace.load(tmp_path / "later")
    assert other.states["count"].item() == 5
    for step in range(3, 6):
        for one, two in zip(
            tensors(engine(*cuda(case.inputs(step)))),
            tensors(other(*cuda(case.inputs(step)))),
            strict=True,
        ):
            assert torch.equal(one, two)
    assert all(
        engine.states[name].data_ptr() != other.states[name].data_ptr() for name in engine.states
    )


def test_a_module_on_the_gpu_builds_as_well(tmp_path: Path) -> None:
    class OnDevice(nn.Module):
        def forward(self, cache: Tensor, x: Tensor) -> Tensor:
            cache[:, :, 3:4] = x
            return cache + torch.arange(4, device=x.device)

    example = (torch.zeros(1, 2, 8, 4, device="cuda"), torch.ones(1, 2, 1, 4, device="cuda"))
    engine = build(
        OnDevice(), example, path=tmp_path / "engine", engine="tensorrt", optimization_level=1
    )
    cache = torch.zeros(1, 2, 8, 4, device="cuda")
    engine(cache, example[1])
    assert cache[:, :, 3].all() and cache.sum() == 8
    with pytest.raises(BuildError, match="a PyTorch engine runs on the CPU"):
        build(OnDevice(), example, path=tmp_path / "cpu")


def test_a_serialized_engine_is_bound_to_the_callers_memory() -> None:
    torch.manual_seed(0)
    eager = Gated().eval()
    made = serialize(
        deepcopy(eager), (noise(0, 1, 4),), lift_mutable_buffers=True, engine="tensorrt"
    )
    runner = PlanRunner(load_tensorrt("tensorrt"), made.content)
    memory = {name: tensor.cuda() for name, tensor in made.initial.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in memory.items()}
    for step in range(4):
        x = noise(step, 1, 4)
        result = runner.run(
            {"x": x, **memory}, {alias.output: memory[alias.input] for alias in made.aliases}
        )
        with torch.no_grad():
            expected = eager(x)
        for binding, value in zip(made.outputs, tensors(expected), strict=True):
            close(result[binding.name], value)
        for state in made.records:
            close(
                memory[state.name].view_as(eager.get_buffer(state.source)),
                eager.get_buffer(state.source),
            )
    assert addresses == {name: tensor.data_ptr() for name, tensor in memory.items()}


@pytest.fixture
def declared() -> Iterator[None]:
    kept = dict(aliases._declared)
    register(Leak)
    register(Swapped)
    declare_alias(leak, plugin=make_leak)
    yield
    aliases._declared.clear()
    aliases._declared.update(kept)


def leaks(index: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(index))


@pytest.mark.usefixtures("declared")
def test_a_plugin_of_the_users_own_has_several_aliased_outputs(tmp_path: Path) -> None:
    module = Leaky()
    engine = build(
        Leaky(),
        (torch.zeros(3, 4), leaks(0)),
        path=tmp_path / "leaky",
        engine="tensorrt",
        optimization_level=1,
    )
    assert sorted(engine.manifest.aliases) == [
        "level_updated@level@user",
        "steps_updated@steps@plugin",
        "total_updated@total@user",
    ]
    level, eager = torch.zeros(3, 4, device="cuda"), torch.zeros(3, 4)
    bound = {level.data_ptr(), *(tensor.data_ptr() for tensor in engine.states.values())}
    with plugins(load_tensorrt("tensorrt")).observe_aliases() as seen:
        engine(level, leaks(0).cuda())
    assert bound == seen, "each plugin received the states' own memory"
    module(eager, leaks(0))
    for index in range(1, 6):
        result, expected = engine(level, leaks(index).cuda()), module(eager, leaks(index))
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other)
        torch.testing.assert_close(level.cpu(), eager)
        torch.testing.assert_close(engine.states["total"].cpu(), module.total)
        torch.testing.assert_close(engine.states["steps"].cpu(), module.steps)


@pytest.mark.usefixtures("declared")
def test_a_plugin_that_does_not_update_its_state_is_refused(tmp_path: Path) -> None:
    example = (torch.zeros(3, 4), leaks(0))
    aliases._declared[leak] = aliases.DeclaredOperator(
        leak, ("level", "total"), lambda tensorrt, constants: Swapped(decay=0.5)
    )
    with pytest.raises(BuildError, match="has the aliases"):
        build(Leaky(), example, path=tmp_path / "swapped", engine="tensorrt")
    aliases._declared[leak] = aliases.DeclaredOperator(
        leak, ("level", "total"), lambda tensorrt, constants: Leak(decay=0.75)
    )
    with pytest.raises(
        BuildError, match=r"(output 0 of|state \w+ after) call \d differs from the module"
    ):
        build(Leaky(), example, path=tmp_path / "other", engine="tensorrt", optimization_level=1)
    aliases._declared[leak] = aliases.DeclaredOperator(leak, ("level", "total"), None)
    with pytest.raises(BuildError, match="was declared without a TensorRT plugin"):
        build(Leaky(), example, path=tmp_path / "none", engine="tensorrt")
    assert not list(tmp_path.iterdir())


def test_a_build_without_its_gpu_is_refused() -> None:
    with pytest.raises(
        BuildError, match="only TensorRT for RTX compiles for a GPU that this machine does not have"
    ):
        serialize(
            Projected(),
            ATTENTION.example(),
            engine="tensorrt",
            compute_capability="8.9",
        )
