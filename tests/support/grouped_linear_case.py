"""A layer of experts: the kernel beside a product for each pair, in Triton's interpreter or a GPU.

The weights of experts that no token has are NaN, so a kernel that multiplies with them is found.
"""

from itertools import product

import torch
from inplace.kernels.grouped_linear import (
    GroupedBlocks,
    GroupedLinearSpec,
    grouped_linear,
    grouped_linear_workspace,
)
from inplace.operators.linear import activate
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest relative error against products in float64."""


def expert_ids(spec: GroupedLinearSpec, tokens: int, per_token: int, *, seed: int = 0) -> Tensor:
    """Random ids, of which some are not an expert's; every third expert has no token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, spec.experts, (tokens, per_token), generator=generator)
    if spec.experts > 2:
        ids[ids % 3 == 2] = 0
    ids[1::7, 0] = spec.experts
    ids[3::7, -1] = -1
    return ids


def grouped_weights(spec: GroupedLinearSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of all experts."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(spec.experts, spec.outputs, spec.inputs, generator=generator)
    weight /= spec.inputs**0.5
    if spec.experts > 2:
        weight[2::3] = float("nan")
    weight = weight.mT.contiguous() if spec.transposed else weight
    bias = torch.randn(spec.experts, spec.outputs, generator=generator) if spec.bias else None
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def products(
    spec: GroupedLinearSpec, x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The result in float64, a product for each token and expert."""
    out = torch.zeros(*ids.shape, spec.width, dtype=torch.float64)
    for token, place in product(*map(range, ids.shape)):
        expert = int(ids[token, place])
        if not 0 <= expert < spec.experts:
            continue
        matrix = weight[expert].mT if spec.transposed else weight[expert]
        y = matrix.double() @ (x[token] if x.dim() == 2 else x[token, place]).double()
        y += 0 if bias is None else bias[expert].double()
        first, second = y.chunk(2) if spec.gated else (y, torch.ones(()))
        out[token, place] = activate(first, spec.activation) * second
    return out


def check_grouped_linear(
    spec: GroupedLinearSpec,
    tokens: int,
    per_token: int,
    *,
    shared: bool,
    dtype: torch.dtype,
    blocks: GroupedBlocks | None = None,
    device: str = "cpu",
    pdl: bool = False,
) -> None:
    """Compare a launch with the products themselves.

    Raises:
        AssertionError: they differ by more than `TOLERANCE`.
    """
    weight, bias = grouped_weights(spec, dtype)
    scale, given = None, weight
    if spec.scaled:
        scale = torch.rand(spec.experts, spec.outputs, generator=torch.Generator().manual_seed(3))
        scale = (scale + 0.5) / 100
        by_output = scale[:, None] if spec.transposed else scale[..., None]
        given = (weight.float() / by_output).to(torch.float8_e4m3fn)
        weight = given.double() * by_output
    ids = expert_ids(spec, tokens, per_token)
    generator = torch.Generator().manual_seed(2)
    shape = (tokens, spec.inputs) if shared else (tokens, per_token, spec.inputs)
    x = torch.randn(shape, generator=generator).to(dtype)
    expected = products(spec, x, ids, weight, bias)
    out = torch.full(expected.shape, float("nan"), dtype=dtype, device=device)
    bytes_needed = grouped_linear_workspace(spec, tokens * per_token)
    grouped_linear(
        spec,
        x=x.to(device),
        expert_ids=ids.to(device, torch.int32 if tokens % 2 else torch.int64),
        weight=given.to(device),
        scale=None if scale is None else scale.to(device),
        bias=None if bias is None else bias.to(device),
        out=out,
        workspace=torch.empty(max(1, bytes_needed // 4), dtype=torch.int32, device=device),
        tokens=tokens,
        experts_per_token=per_token,
        shared=shared,
        pdl=pdl,
        blocks=blocks,
    )
    error = (out.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert float(error) < TOLERANCE[dtype]
    assert torch.equal(out[ids.to(device) < 0], torch.zeros_like(out[ids.to(device) < 0]))
