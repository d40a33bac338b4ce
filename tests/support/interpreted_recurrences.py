"""The kernels of convolutions and recurrences in Triton's interpreter.

`tests/unit/test_operator_recurrent.py` runs this file.
"""

from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from inplace.kernels import recurrence
from inplace.kernels.memory import Memory, Pointer
from inplace.operators.convolution import _causal_conv1d_on_gpu
from inplace.operators.recurrence import (
    _delta_rule_on_gpu,
    _linear_recurrence_on_gpu,
    _selective_scan_on_gpu,
)
from inplace.plugins import (
    CausalConv1dOperation,
    DeltaRuleOperation,
    Launch,
    LinearRecurrenceOperation,
    SelectiveScanOperation,
)
from inplace.plugins.recurrences import RecurrentOperation
from torch import Tensor

from support.long import long_except
from support.recurrent_case import CHECKS, Operators

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)  # Triton's own

KERNELS: Operators = {
    "causal_conv1d": _causal_conv1d_on_gpu,
    "selective_scan": _selective_scan_on_gpu,
    "delta_rule": _delta_rule_on_gpu,
    "linear_recurrence": _linear_recurrence_on_gpu,
}

SOME = list(CHECKS)[::2]
OTHERS = list(CHECKS)[1::2]


@pytest.mark.parametrize("name", long_except(SOME, CHECKS))
def test_the_kernels_continue_each_row_from_its_slot(name: str) -> None:
    CHECKS[name](KERNELS)


@pytest.mark.parametrize("name", long_except(OTHERS[:1], CHECKS))
def test_so_do_those_that_go_from_chunk_to_chunk(name: str) -> None:
    CHECKS[name](KERNELS, torch.float16, 1e-2)


@pytest.mark.parametrize(("memory", "size"), long_except([(14000, 32)], [(14000, 32), (7000, 16)]))
def test_chunks_are_shorter_where_shared_memory_is_small(
    monkeypatch: pytest.MonkeyPatch, memory: int, size: int
) -> None:
    monkeypatch.setattr(recurrence, "shared_memory", lambda: memory)
    chunks = recurrence._delta_chunks(80, 5, (3, 8, 6), torch.float16, diagonal=False)
    assert chunks is not None and chunks.size == size
    CHECKS["gated delta rule"](KERNELS, torch.float16, 1e-2)


@dataclass(frozen=True)
class InterpretedLaunch(Launch):
    """A launch on tensors; its scratch memory is as large as TensorRT makes it."""

    memory: Tensor

    def scratch(self, offset: int, dtype: torch.dtype) -> Memory:
        return self.memory[offset:].view(dtype)


def launch(operation: RecurrentOperation, *inputs: Tensor) -> Tensor:
    """What the operation's plugin launches for these inputs; its first output."""
    tensors = [x.int() if x.dtype is torch.int64 else x.contiguous() for x in inputs]
    state, shapes = tensors[operation.first_state], [tuple(x.shape) for x in tensors]
    dtypes = [x.dtype for x in tensors]
    out = torch.full(
        operation.output_shapes(shapes)[0], float("nan"), dtype=operation.output_dtypes(dtypes)[0]
    )
    operation.launch(
        InterpretedLaunch(
            shapes=shapes,
            inputs=cast("Any", tensors),
            outputs=cast("Any", [out, state]),
            workspace=0,
            locks=Pointer(0, torch.int32),
            pdl=False,
            memory=torch.full((operation.workspace(shapes, dtypes),), 255, dtype=torch.uint8),
        )
    )
    return out


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rows: Tensor, silu: bool = False
) -> Tensor:
    operation = CausalConv1dOperation(bias=bias is not None, silu=silu)
    return launch(operation, x, weight, *rows, *([] if bias is None else [bias]))


def _selective_scan(*arguments: Tensor | None) -> Tensor:
    *own, skip, state, slots, row_offsets = arguments
    inputs = [x for x in (*own, state, slots, row_offsets, skip) if x is not None]
    return launch(SelectiveScanOperation(skip=skip is not None), *inputs)


PLUGINS: Operators = {
    "causal_conv1d": _causal_conv1d,
    "selective_scan": _selective_scan,
    "delta_rule": lambda *inputs: launch(DeltaRuleOperation(), *inputs),
    "linear_recurrence": lambda *inputs: launch(LinearRecurrenceOperation(), *inputs),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    long_except([(torch.float32, 2e-5)], [(torch.float32, 2e-5), (torch.float16, 1e-2)]),
    ids=str,
)
@pytest.mark.parametrize("name", long_except(SOME, CHECKS))
def test_plugins_launch_the_same_kernels(name: str, dtype: torch.dtype, tolerance: float) -> None:
    CHECKS[name](PLUGINS, dtype, tolerance)
