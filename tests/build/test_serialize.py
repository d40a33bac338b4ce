"""A serialized engine whose states, lifted buffers among them, are bindings of the caller."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.trt import load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from inplace_builder.standalone.serialize import Serialized, serialize
from support.corpus import CORPUS
from support.corpus.case import noise
from support.corpus.states import Gated
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings(
    "ignore:The given buffer is not writable:UserWarning"
)  # torch.export.load's own


@pytest.fixture(scope="module")
def recurrent() -> Serialized:
    torch.manual_seed(0)
    return serialize(Gated().eval(), (noise(0, 1, 4),), lift_mutable_buffers=True)


def test_mutated_buffers_are_lifted_only_when_asked() -> None:
    with pytest.raises(
        BuildError,
        match=r"mutates its buffers \['cell', .*'cache'\]: pass lift_mutable_buffers=True",
    ):
        serialize(Gated(), (noise(0, 1, 4),))


def test_bindings_describe_every_tensor(recurrent: Serialized) -> None:
    assert [binding.name for binding in recurrent.inputs] == ["x", "slots"]
    assert {state.source: state.shape for state in recurrent.records} == {
        "cell": (1, 4),
        "window": (3, 4),
        "count": (),
        "seen": (5,),
        "cache": (2, 1, 24, 4),
    }
    assert {binding.name: (str(binding.dtype), binding.shape) for binding in recurrent.states} == {
        "cell": ("float32", (1, 4)),
        "window": ("float32", (1, 3, 4)),
        "count": ("int64", (1,)),
        "seen": ("bool", (1, 5)),
        "cache": ("float32", (1, 2, 1, 24, 4)),
    }
    assert [(binding.name, binding.shape) for binding in recurrent.outputs] == [
        ("result_0", (4,)),
        ("result_1", ()),
    ]
    assert {alias.input for alias in recurrent.aliases} == {
        binding.name for binding in recurrent.states
    }
    assert recurrent.initial["count"].tolist() == [2]
    assert recurrent.plan is None


def test_the_caller_binds_and_threads_the_states(recurrent: Serialized) -> None:
    torch.manual_seed(0)
    eager = Gated().eval()
    graph = torch.export.load(io.BytesIO(recurrent.content)).module(check_guards=False)
    memory = {name: tensor.clone() for name, tensor in recurrent.initial.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in memory.items()}
    for step in range(5):
        x = noise(step, 1, 4)
        with torch.no_grad():
            result, expected = (
                graph(x, torch.arange(1, dtype=torch.int32), *memory.values()),
                eager(x),
            )
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other)
        for state in recurrent.records:
            torch.testing.assert_close(
                memory[state.name].view_as(eager.get_buffer(state.source)),
                eager.get_buffer(state.source),
            )
    assert addresses == {name: tensor.data_ptr() for name, tensor in memory.items()}
    assert torch.equal(recurrent.initial["count"], torch.tensor([2])), "initial values are copies"


@pytest.mark.parametrize(
    "name", ["attention written out", "recurrent", "number of tokens that varies"]
)
def test_plans_for_a_gpu_that_this_machine_does_not_have(name: str) -> None:
    case, plain = CORPUS[name], load_tensorrt("tensorrt_rtx").api
    serialized = serialize(
        case.module(),
        case.example(),
        lift_mutable_buffers=True,
        engine="tensorrt_rtx",
        compute_capability="8.9",
        **case.options,
    )
    assert serialized.plan is not None and (
        serialized.plan.compute_capability,
        serialized.plan.gpu,
    ) == ("8.9", "")
    assert serialized.plan.version == plain.__version__
    kind = "copy" if name == "recurrent" else "kv_cache_update"
    assert {alias.kind for alias in serialized.aliases} == {kind}
    assert all(
        record.refused[0].startswith("plugin: networks of TensorRT for RTX")
        for record in serialized.lowering
    )
    assert "slots" not in {binding.name for binding in serialized.inputs}
    assert len(serialized.content) > 1000


class Number(torch.nn.Module):
    def forward(self, cache: Tensor, x: Tensor, start: int) -> Tensor:
        cache[:, start : start + 1] = x
        return cache.sum(1)


def test_a_number_is_an_input() -> None:
    dynamic: Any = (None, None, torch.export.Dim.DYNAMIC)
    serialized = serialize(
        Number(), (torch.zeros(1, 8), torch.ones(1, 1), 3), dynamic_shapes=dynamic
    )
    assert [binding.name for binding in serialized.inputs] == ["x", "start", "slots"]
    graph = torch.export.load(io.BytesIO(serialized.content)).module(check_guards=False)
    memory = torch.zeros(1, 8)
    graph(torch.ones(1, 1), 5, torch.arange(1, dtype=torch.int32), memory)
    assert memory.tolist() == [[0, 0, 0, 0, 0, 1, 0, 0]]


class Builtins(nn.Module):
    def forward(self, id: Tensor, input: Tensor, type: Tensor) -> Tensor:
        id[:, 3:4] = input
        return id + type


@pytest.mark.parametrize("exported", [False, True])
def test_arguments_may_have_the_names_of_pythons_own(exported: bool, tmp_path: Path) -> None:
    """``copy.deepcopy`` of a graph renames them (``input_1``), and inputs are known by name."""
    example = (torch.zeros(1, 8, 4), torch.ones(1, 1, 4), torch.ones(1, 8, 4))
    module = torch.export.export(Builtins(), example) if exported else Builtins()
    engine = build(module, example, path=tmp_path / "builtins")
    cache = torch.zeros(1, 8, 4)
    assert engine(cache, input=example[1], type=example[2]).sum() == 36
    assert cache[0, :, 0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    serialized = serialize(Builtins(), example, engine="tensorrt_rtx", compute_capability="8.9")
    assert [binding.name for binding in serialized.inputs] == ["input", "type"]
