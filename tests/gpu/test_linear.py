"""The fused linear kernels on a GPU, against the operator in PyTorch."""

import pytest
import torch
from inplace.kernels.argmax import argmax, argmax_workspace
from inplace.kernels.linear import LinearSpec, linear, linear_workspace
from inplace.operators import argmax as reference_argmax
from inplace.operators import linear as reference_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 130])
@pytest.mark.parametrize(
    "spec",
    [
        LinearSpec(576, 960, norm=True, eps=1e-5),
        LinearSpec(1536, 576, residual=True),
        LinearSpec(576, 3072, norm=True, eps=1e-5, activation="silu", gated=True),
        LinearSpec(80, 48, bias=True, norm=True, residual=True, eps=1e-5, activation="gelu"),
        LinearSpec(100, 72, bias=True, activation="gelu_tanh", gated=True, residual=True),
        LinearSpec(64, 1000, norm=True, eps=1e-6, float_out=True),
    ],
    ids=lambda spec: f"{spec.inputs}x{spec.outputs}",
)
def test_equals_the_operator(spec: LinearSpec, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    x, weight = random(tokens, spec.inputs), random(spec.outputs, spec.inputs) / spec.inputs**0.5
    bias = random(spec.outputs) if spec.bias else None
    norm = random(spec.inputs) if spec.norm else None
    residual = random(tokens, spec.width) if spec.residual else None
    out = torch.full((tokens, spec.width), float("nan"), device="cuda", dtype=torch.float32 if spec.float_out else dtype)
    workspace = torch.empty(max(1, linear_workspace(spec, tokens, dtype.itemsize)), device="cuda", dtype=torch.uint8)
    for pdl in (False, True):
        linear(
            spec, x=x, weight=weight, bias=bias, norm=norm, residual=residual, out=out,
            workspace=workspace.data_ptr(), tokens=tokens, pdl=pdl,
        )  # fmt: skip

        def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.double()

        expected = reference_linear(
            x.double(), weight.double(), wide(bias), wide(norm), wide(residual), eps=spec.eps, activation=spec.activation, gated=spec.gated
        )  # fmt: skip
        assert float((out.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


def test_argmax_takes_the_first_of_equals_and_leaves_its_counters_zero() -> None:
    torch.manual_seed(0)
    scores = torch.randn(33, 49152, device="cuda")
    scores[3, 70], scores[3, 40000] = 9.0, 9.0
    out = torch.zeros(33, 1, device="cuda", dtype=torch.int64)
    locks = torch.zeros(33, device="cuda", dtype=torch.int32)
    workspace = torch.empty(argmax_workspace(33) // 4, device="cuda")
    for pdl in (False, True, True):
        argmax(scores=scores, out=out, workspace=workspace, locks=locks, rows=33, count=49152, pdl=pdl)
        assert torch.equal(out, reference_argmax(scores))
        assert int(out[3]) == 70
        assert not locks.any()
