"""Every operator of the table, built and run by TensorRT, beside PyTorch, at two sizes of one plan."""

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import compile_network, lower
from operator_cases import CASES, Case

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here")

from engine_runner import PlanRunner  # noqa: E402


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return load_tensorrt("tensorrt")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator_computes_what_pytorch_computes(tensorrt: TensorRT, case: Case) -> None:
    lowered = lower(case.exported, outputs=case.outputs, tensorrt=tensorrt)
    case.check(PlanRunner(tensorrt, compile_network(lowered, [case.profile()])).run)
