"""The kernels of convolutions and recurrences on a GPU equal the operators on the CPU.

They also equal transformers' functions on each row. Ragged prompts, decode steps, null rows, rows
without tokens, steps without rows, and CUDA graphs.
"""

from typing import Any

import pytest
import torch
from inplace import operators
from support.attention_case import bits
from support.kernel_cases import no_synchronisation
from support.recurrence_steps import SHAPES, STEPS, Shape, Step
from support.recurrent_case import CHECKS, Operator
from torch import Tensor

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)

NAMES = ("causal_conv1d", "selective_scan", "delta_rule", "linear_recurrence")
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str
)
EACH = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@EACH
@pytest.mark.parametrize("step", STEPS)
@DTYPES
def test_the_kernels_equal_the_operators_on_the_cpu(
    dtype: torch.dtype, tolerance: float, step: str, shape: Shape
) -> None:
    on_cpu, on_gpu = Step(shape, step, dtype), Step(shape, step, dtype).to(DEVICE)
    before = on_cpu.state.clone()
    expected = on_cpu.run()
    on_gpu.compare(on_gpu.run(), expected, on_cpu.state, before, tolerance)


def on_device(operator: Operator) -> Operator:
    """An operator that computes on the GPU with tensors of the CPU."""

    def run(*arguments: Tensor | None, **options: Any) -> Tensor:
        moved = [x if x is None else x.to(DEVICE) for x in arguments]
        out = operator(*moved, **options)
        for own, new in zip(arguments, moved, strict=True):
            if own is not None and new is not None:
                own.copy_(new)
        return out.cpu()

    return run


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),  # time steps of up to 20 multiply the rounding of bfloat16
    [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)],
    ids=str,
)
def test_the_kernels_equal_the_functions_of_transformers(
    dtype: torch.dtype, tolerance: float, name: str
) -> None:
    on_gpu = {name: on_device(getattr(operators, name)) for name in NAMES}
    CHECKS[name](on_gpu, dtype, tolerance)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_replays_on_what_its_memory_then_holds(
    dtype: torch.dtype, shape: Shape
) -> None:
    for first, later in (("decode", "decode with null rows"), ("ragged", "ragged")):
        captured = Step(shape, first, dtype).to(DEVICE)
        captured.run()  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = captured.run()
        for seed, name in enumerate((later, first), 20):
            step = Step(shape, name, dtype, seed=seed).to(DEVICE)
            captured.copy_from(step)
            expected = step.run()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(bits(out), bits(expected))
            assert torch.equal(bits(captured.state), bits(step.state))


@EACH
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_the_operators_never_synchronise(index_dtype: torch.dtype, shape: Shape) -> None:
    step, again = (Step(shape, "ragged", torch.bfloat16).to(DEVICE) for _ in range(2))
    again.control = [x.to(index_dtype) for x in again.control]
    expected = step.run()
    torch.cuda.synchronize()
    with no_synchronisation():
        out = again.run()
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(again.state), bits(step.state))
