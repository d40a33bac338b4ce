"""One launch of a linear layer whose weights are 8-bit floats, on a GPU or in the interpreter."""

import torch
from inplace.kernels.linear import LinearBlocks, LinearSpec, linear, linear_workspace
from inplace.operators import linear as reference_linear
from inplace.operators.float8 import quantize

LAYERS = [
    LinearSpec(192, 80, norm=True, eps=1e-5, scaled=True),
    LinearSpec(72, 64, norm=True, eps=1e-5, activation="silu", gated=True, scaled=True),
    LinearSpec(520, 40, bias=True, norm=True, residual=True, eps=1e-5, scaled=True),
    LinearSpec(288, 48, residual=True, scaled=True, scale_group=128),
    LinearSpec(136, 72, bias=True, gated=True, residual=True, scaled=True, scale_group=64),
    LinearSpec(100, 36, norm=True, eps=1e-6, float_out=True, scaled=True, scale_group=20),
]  # fmt: skip
"""A scale for each output; then for groups of inputs, that divide them and tiles or do not."""


def check(
    spec: LinearSpec,
    tokens: int,
    dtype: torch.dtype,
    tolerance: float,
    *,
    device: str = "cpu",
    blocks: LinearBlocks | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Compare one launch with the operator in float64; memory after the result stays as it was.

    Returns:
        The result.
    """
    torch.manual_seed(0)
    x = torch.randn(tokens, spec.inputs).to(device, dtype)
    weight, scale = quantize(torch.randn(spec.outputs, spec.inputs), spec.scale_group)
    scale = scale / spec.inputs**0.5 * torch.rand_like(scale)
    weight, scale = weight.to(device), scale.to(device)
    bias = torch.randn(spec.outputs).to(device, dtype) if spec.bias else None
    norm = torch.randn(spec.inputs).to(device, dtype) if spec.norm else None
    residual = torch.randn(tokens, spec.width).to(device, dtype) if spec.residual else None
    out = torch.full(
        (tokens + 1, spec.width),
        float("nan"),
        dtype=torch.float32 if spec.float_out else dtype,
        device=device,
    )
    size = max(1, linear_workspace(spec, tokens, dtype.itemsize))
    linear(
        spec, x=x, weight=weight, bias=bias, norm=norm, residual=residual, scale=scale, out=out,
        workspace=torch.empty(size, dtype=torch.uint8, device=device), tokens=tokens,
        blocks=blocks, pdl=pdl,
    )  # fmt: skip
    # rows are rounded to x's type before they become 8-bit floats, so not in float64
    wide = dtype if spec.quantizes(tokens) else torch.float64
    bias, norm, residual = (
        None if part is None else part.to("cpu", wide) for part in (bias, norm, residual)
    )
    expected = reference_linear(  # on the CPU: on a GPU it launches these kernels
        x.to("cpu", wide), weight.cpu(), bias, norm, residual,
        eps=spec.eps, activation=spec.activation,
        gated=spec.gated, float_out=spec.quantizes(tokens), scale=scale.cpu(),
        scale_group=spec.scale_group, activation_rows=spec.activation_rows,
    )  # fmt: skip
    error = float((out[:tokens].cpu().double() - expected).norm() / expected.double().norm())
    assert error < tolerance, error
    assert out[tokens].isnan().all()
    return out[:tokens]
