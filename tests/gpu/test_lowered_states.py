"""Every use of a state, run by TensorRT step after step beside the PyTorch operators: outputs close, states equal bit for bit."""

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.lower import choose, compile_network, lower
from state_cases import SLOTS, STATE_CASES, StateCase

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here")

from engine_runner import PlanRunner  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.int32: 0.0}


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return load_tensorrt("tensorrt")


@pytest.mark.parametrize("kind", ["copy", "kv_cache_update"])
@pytest.mark.parametrize("case", STATE_CASES, ids=lambda case: case.name)
def test_steps_give_what_the_operators_give(tensorrt: TensorRT, case: StateCase, kind: str) -> None:
    try:
        choose(case.exported.graph, case.states, tensorrt, order=(kind,))  # type: ignore[arg-type]
    except BuildError as error:
        pytest.skip(str(error))
    lowered = lower(case.exported, outputs=["out"], states=case.states, kinds={s.name: kind for s in case.states}, tensorrt=tensorrt)
    runner = PlanRunner(tensorrt, compile_network(lowered, [case.profile()]))
    expected_memory = case.memory()
    memory = {name: x.cuda() for name, x in case.memory().items()}
    for tokens, starts in case.steps:
        inputs = case.inputs(tokens, starts)
        with torch.no_grad():
            expected = case.module(**inputs, **expected_memory)
        bound = {output: memory[name] for name, output in lowered.state_outputs.items()} if kind == "kv_cache_update" else {}
        found = runner.run(inputs | memory, bound)
        memory |= {name: found[output] for name, output in lowered.state_outputs.items()}
        limit = TOLERANCE[case.dtype]
        torch.testing.assert_close(found["out"].cpu(), expected, rtol=limit, atol=limit)
        for name, x in memory.items():
            torch.testing.assert_close(x.cpu(), expected_memory[name], rtol=0, atol=0, equal_nan=True)


def test_a_null_row_gives_zeros(tensorrt: TensorRT) -> None:
    case = STATE_CASES[0]
    lowered = lower(case.exported, outputs=["out"], states=case.states, kinds={s.name: "copy" for s in case.states}, tensorrt=tensorrt)
    runner = PlanRunner(tensorrt, compile_network(lowered, [case.profile()]))
    tokens, starts = case.steps[0]
    out = runner.run(case.inputs(tokens, starts) | case.memory())["out"]
    null = SLOTS.index(-1)
    assert torch.count_nonzero(out[null * tokens : (null + 1) * tokens]) == 0
    assert torch.isfinite(out).all()
