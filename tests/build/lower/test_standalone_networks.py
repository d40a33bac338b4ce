"""Standalone modules as networks: they compile with TensorRT for RTX and compute what eager does.

The networks are interpreted in PyTorch, layer by layer; `tests/gpu/test_modules.py` runs them with
TensorRT.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from inplace.schema.specs import AliasKind
from inplace.schema.standalone import CallSignature, result_name
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.errors import BuildError
from inplace_builder.lower import LoweredNetwork
from inplace_builder.lower.compile import Target
from inplace_builder.standalone.build import describe_call, export_for
from inplace_builder.standalone.plan import build_plan, lower_module
from support.comparing import EagerStates
from support.corpus import CORPUS
from support.corpus.case import ModuleCase, position
from support.corpus.writes import Tokens, zeros
from support.long import long_except
from support.network_interpreter import interpret
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.slow

GPU = "8.9"
PLANNED = [case for case in CORPUS.values() if case.plans]
ATTENTION, TOKENS = CORPUS["attention written out"], CORPUS["number of tokens that varies"]


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


def captured(case: ModuleCase, module: nn.Module) -> tuple[ExportedCapture, CallSignature]:
    options = dict(case.options)
    exported = export_for(
        module,
        case.example(),
        "tensorrt_rtx",
        dynamic_shapes=options.pop("dynamic_shapes", None),
    )
    capture = capture_exported(exported, **options)
    return capture, describe_call(exported, capture)


def bound_shapes(lowered: LoweredNetwork) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's inputs; the cache layer's states have axes merged."""
    inputs = map(lowered.network.get_input, range(lowered.network.num_inputs))
    return {tensor.name: tuple(tensor.shape) for tensor in inputs}


@pytest.mark.parametrize("kind", ["copy", "kv_cache_update"])
@pytest.mark.parametrize("case", long_except(PLANNED[::4], PLANNED), ids=lambda case: case.name)
def test_a_module_compiles_and_computes_what_eager_does(
    rtx: TensorRT, case: ModuleCase, kind: AliasKind
) -> None:
    torch.manual_seed(0)
    eager = case.module().eval()
    capture, call = captured(case, deepcopy(eager))
    if kind == "kv_cache_update" and not case.fits_cache_layer and case is not TOKENS:
        with pytest.raises(BuildError, match=r"no mechanism can update .*kv_cache_update: "):
            lower_module(capture, call, rtx, alias=kind)
        return
    lowered, lowering = lower_module(capture, call, rtx, alias=kind)
    assert {record.kind for record in lowering} == {kind}
    shapes = bound_shapes(lowered)
    states = case.states()
    memory = {
        state.name: state.bound_initial().clone().view(shapes[state.name])
        for state in capture.states
    }
    eager_states = EagerStates(capture, states, eager)
    for step in range(6):
        inputs = case.inputs(step)
        with torch.no_grad():
            expected = pytree.tree_leaves(eager(*states, *inputs))
        outputs = interpret(lowered, dict(zip(capture.inputs, inputs, strict=True)) | memory)
        memory = {
            state.name: outputs[lowered.state_outputs[state.name]].clone()
            for state in capture.states
        }
        for place, value in enumerate(expected):
            if isinstance(value, Tensor):
                torch.testing.assert_close(
                    outputs[result_name(place)], value, msg=f"{{}} in step {step}".format
                )
        for state in capture.states:
            eager_state = state.bound(eager_states(state))
            torch.testing.assert_close(
                memory[state.name].view_as(eager_state),
                eager_state,
                msg=f"{{}} of {state.name}".format,
            )
    target = Target.of("tensorrt_rtx", GPU)
    plan = build_plan(capture, call, target, alias=kind)
    assert plan.content.nbytes > 1000 and plan.record.compute_capability == GPU
    assert {str(alias) for alias in plan.aliases} == {
        f"{s.name}_updated@{s.name}@{kind}" for s in capture.states
    }


class Number(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, start: int) -> Tensor:
        cache[:, start : start + 1] = x
        return cache.sum(1)


def test_arguments_that_tensorrt_cannot_take_are_refused_by_name() -> None:
    target = Target.of("tensorrt_rtx", GPU)
    dim = torch.export.Dim.DYNAMIC
    number = ModuleCase(
        "number",
        Number,
        zeros(1, 8),
        lambda _: (torch.ones(1, 1), 3),
        {},
        options={"dynamic_shapes": ({}, {}, dim)},
    )
    with pytest.raises(
        BuildError, match="argument start is a Python number that changes from call to call"
    ):
        build_plan(*captured(number, Number()), target)
    unlimited = torch.export.Dim("unlimited", min=1)
    shapes: Any = ({}, {2: unlimited}, {0: unlimited})
    tokens = replace(TOKENS, options=TOKENS.options | {"dynamic_shapes": shapes})
    with pytest.raises(BuildError, match=r"argument x is .* has no largest value"):
        build_plan(*captured(tokens, Tokens()), target)
    wide = ModuleCase(
        "wide",
        Tokens,
        zeros(1, 2, 16, 4, dtype=torch.float64),
        lambda step: (torch.ones(1, 2, 1, 4).double(), position(step)),
        {},
    )
    with pytest.raises(
        BuildError,
        match=r"copy: TensorRT does not select between elements of cache, which is float64",
    ):
        build_plan(*captured(wide, Tokens()), target)
    with pytest.raises(BuildError, match="strict refuses the mechanism copy"):
        build_plan(*captured(ATTENTION, ATTENTION.module()), target, alias="copy", strict=True)
    if not torch.cuda.is_available():
        with pytest.raises(BuildError, match="PyTorch sees none here"):
            Target.of("tensorrt_rtx")
