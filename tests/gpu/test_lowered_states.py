"""Every use of a state, run by TensorRT step by step beside the PyTorch operators.

Outputs are close, states equal bit for bit. The plans are built in parallel and at a low
optimization level, because building is most of the time of these tests.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from inplace.schema.specs import AliasKind
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.lower import (
    CompileOptions,
    LoweredNetwork,
    choose_mechanisms,
    compile_network,
    lower,
)
from support.state_cases import SLOTS, STATE_CASES, StateCase
from torch import Tensor

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)

from support.engine_runner import PlanRunner  # noqa: E402


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return load_tensorrt("tensorrt")


KINDS: tuple[AliasKind, ...] = ("copy", "kv_cache_update")
Plans = dict[tuple[str, AliasKind], Future[tuple[LoweredNetwork, Any]]]


@pytest.fixture(scope="module")
def plans(tensorrt: TensorRT) -> Plans:
    """The network and the plan of every case and mechanism."""

    def build(case: StateCase, kind: AliasKind) -> tuple[LoweredNetwork, Any]:
        choose_mechanisms(case.exported.graph, case.states, tensorrt, order=(kind,))
        kinds = {state.name: kind for state in case.states}
        lowered = lower(
            case.exported, outputs=["out"], states=case.states, kinds=kinds, tensorrt=tensorrt
        )
        return lowered, compile_network(
            lowered, [case.profile()], CompileOptions(optimization_level=1)
        )

    for case in STATE_CASES:
        _ = case.exported  # torch.export is not made for threads
    with ThreadPoolExecutor(8) as pool:
        return {
            (case.name, kind): pool.submit(build, case, kind)
            for case in STATE_CASES
            for kind in KINDS
        }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", STATE_CASES, ids=lambda case: case.name)
def test_steps_compute_what_the_operators_compute(
    tensorrt: TensorRT, plans: Plans, case: StateCase, kind: AliasKind
) -> None:
    try:
        choose_mechanisms(case.exported.graph, case.states, tensorrt, order=(kind,))
    except BuildError as error:
        pytest.skip(str(error))
    lowered, plan = plans[case.name, kind].result()
    runner = PlanRunner(tensorrt, plan)

    def step(
        inputs: dict[str, Tensor], memory: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        memory = {name: x.cuda() for name, x in memory.items()}
        in_place = (
            {output: memory[name] for name, output in lowered.state_outputs.items()}
            if kind == "kv_cache_update"
            else {}
        )
        outputs = runner.run(inputs | memory, in_place)
        return outputs["out"], memory | {
            name: outputs[output] for name, output in lowered.state_outputs.items()
        }

    case.check(step)


def test_a_null_row_gives_zeros(tensorrt: TensorRT, plans: Plans) -> None:
    case = STATE_CASES[0]
    runner = PlanRunner(tensorrt, plans[case.name, "copy"].result()[1])
    tokens, starts = case.steps[0]
    out = runner.run(case.inputs(tokens, starts) | case.memory())["out"]
    null = SLOTS.index(-1)
    assert torch.count_nonzero(out[null * tokens : (null + 1) * tokens]) == 0
    assert torch.isfinite(out).all()
