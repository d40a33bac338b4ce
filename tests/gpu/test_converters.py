"""Every operator of the table, built and run by TensorRT, beside PyTorch, at two sizes of one plan."""

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import compile_network, lower
from operator_cases import CASES, LARGE, SMALL, Case

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here")

from engine_runner import PlanRunner  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Absolute and relative, by the type of the result: a few units in the last place, TF32 off."""


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return load_tensorrt("tensorrt")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator_computes_what_pytorch_computes(tensorrt: TensorRT, case: Case) -> None:
    exported = case.exported
    names = [f"out_{index}" for index in range(len(exported.graph_signature.user_outputs))]
    lowered = lower(exported, outputs=names, tensorrt=tensorrt)
    runner = PlanRunner(tensorrt, compile_network(lowered, [case.profile()]))
    for sizes in (SMALL, LARGE):
        inputs = case.examples(sizes)
        with torch.no_grad():
            result = case.module(*inputs)
        expected = result if isinstance(result, list | tuple) else [result]
        found = runner.run({f"xs_{index}": x for index, x in enumerate(inputs)})
        for name, want in zip(names, expected, strict=True):
            got = found[name].cpu()
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            limit = TOLERANCE.get(want.dtype, 0.0) * case.loose
            torch.testing.assert_close(got, want, rtol=limit, atol=limit, equal_nan=True)
