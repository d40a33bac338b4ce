"""The fused linear kernels on a GPU equal the operator in PyTorch."""

import pytest
import torch
from inplace.kernels.linear import (
    GemvBlocks,
    LinearBlocks,
    LinearSpec,
    PipelinedBlocks,
    SlicedKBlocks,
    linear,
    linear_workspace,
)
from inplace.kernels.sample import argmax, argmax_workspace
from inplace.operators import argmax as reference_argmax
from inplace.operators import linear as reference_linear

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


SPECS = pytest.mark.parametrize(
    "spec",
    [
        LinearSpec(576, 960, norm=True, eps=1e-5),
        LinearSpec(1536, 576, residual=True),
        LinearSpec(576, 3072, norm=True, eps=1e-5, activation="silu", gated=True),
        LinearSpec(80, 48, bias=True, norm=True, residual=True, eps=1e-5, activation="gelu"),
        LinearSpec(100, 72, bias=True, activation="gelu_tanh", gated=True, residual=True),
        LinearSpec(64, 1000, norm=True, eps=1e-6, float_out=True),
        LinearSpec(64, 1),
        LinearSpec(64, 2, bias=True, gated=True),
    ],
    ids=lambda spec: f"{spec.inputs}x{spec.outputs}",
)


def check(
    spec: LinearSpec, tokens: int, dtype: torch.dtype, blocks: LinearBlocks | None = None
) -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    x, weight = random(tokens, spec.inputs), random(spec.outputs, spec.inputs) / spec.inputs**0.5
    bias = random(spec.outputs) if spec.bias else None
    norm = random(spec.inputs) if spec.norm else None
    residual = random(tokens, spec.width) if spec.residual else None
    out = torch.empty(
        (tokens, spec.width), device="cuda", dtype=torch.float32 if spec.float_out else dtype
    )
    workspace = torch.empty(
        max(1, linear_workspace(spec, tokens, dtype.itemsize)), device="cuda", dtype=torch.uint8
    )
    wide = [None if part is None else part.double() for part in (x, weight, bias, norm, residual)]
    expected = reference_linear(*wide, eps=spec.eps, activation=spec.activation, gated=spec.gated)  # type: ignore[arg-type]
    for pdl in (False, True):
        out.fill_(float("nan"))
        torch.cuda.synchronize()  # weights may be read before the preceding kernel has ended
        linear(
            spec, x=x, weight=weight, bias=bias, norm=norm, residual=residual, out=out,
            workspace=workspace.data_ptr(), tokens=tokens, pdl=pdl, blocks=blocks,
        )  # fmt: skip
        assert float((out.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


@SPECS
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 2, 9, 16, 17, 64, 130])
def test_equals_the_operator(spec: LinearSpec, tokens: int, dtype: torch.dtype) -> None:
    check(spec, tokens, dtype)


@SPECS
@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [
        (1, GemvBlocks(16, 256, 8)),
        (5, SlicedKBlocks(16, 16, 2)),
        (8, SlicedKBlocks(32, 64, 4)),
        (16, SlicedKBlocks(16, 32, 8)),
        (8, PipelinedBlocks(64, 256, 4, 2)),
        (33, PipelinedBlocks(64, 128, 8, 2)),
    ],
    ids=str,
)
def test_any_blocks_compute_the_same(spec: LinearSpec, tokens: int, blocks: LinearBlocks) -> None:
    check(spec, tokens, torch.bfloat16, blocks)


def test_argmax_takes_the_first_of_equals_and_leaves_its_counters_zero() -> None:
    torch.manual_seed(0)
    scores = torch.randn(33, 49152, device="cuda")
    scores[3, 70], scores[3, 40000] = 9.0, 9.0
    out = torch.zeros(33, 1, device="cuda", dtype=torch.int64)
    locks = torch.zeros(33, device="cuda", dtype=torch.int32)
    workspace = torch.empty(argmax_workspace(33) // 4, device="cuda")
    for pdl in (False, True, True):
        argmax(
            scores=scores, out=out, workspace=workspace, locks=locks, rows=33, count=49152, pdl=pdl
        )
        assert torch.equal(out, reference_argmax(scores))
        assert int(out[3]) == 70
        assert not locks.any()
