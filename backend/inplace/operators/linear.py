"""``inplace::linear`` and ``inplace::rms_norm``: a linear layer with its neighbours, and a norm.

Lowering emits them, and captured models whose weights are 8-bit floats do. They touch no state;
they are operators so that a fused graph can be run, and compared, in PyTorch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inplace.operators.float8 import FLOAT8, dequantize, num_groups, quantize
from inplace.operators.library import LIBRARY, define

ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")
"""What may follow the product.

A gated layer multiplies its activated first half by its second half.
"""


define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm=None, Tensor? residual=None, *, "
    "float eps=0.0, str activation='none', bool gated=False, bool float_out=False, "
    "Tensor? scale=None, int scale_group=0, int activation_rows=0) -> Tensor",
)


define("rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")


@torch.library.impl(LIBRARY, "rms_norm", "CompositeExplicitAutograd")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last axis (arXiv:1910.07467, eq. 4).

    Computed in float32; the result has x's dtype.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply one of `ACTIVATIONS`."""
    match activation:
        case "relu":
            return x.relu()
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
    return x


@torch.library.impl(LIBRARY, "linear", "CompositeExplicitAutograd")
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 0.0,
    activation: str = "none",
    gated: bool = False,
    float_out: bool = False,
    scale: Tensor | None = None,
    scale_group: int = 0,
    activation_rows: int = 0,
) -> Tensor:
    _check_scale(weight, scale, scale_group)
    x = x if norm is None else _rms_norm(x, norm, eps)
    if scale is None:
        out = F.linear(x, weight, bias)
    else:
        out = _scaled_product(x, weight, bias, scale, scale_group, activation_rows)
        out = out if float_out else out.to(x.dtype)
    if float_out:
        out = out.float()
    if gated:
        first, second = out.chunk(2, -1)
        out = activate(first, activation) * second
    else:
        out = activate(out, activation)
    return out if residual is None else out + residual


@torch.library.impl(LIBRARY, "linear", "CUDA")
def _linear_on_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    scale_group: int = 0,
    activation_rows: int = 0,
    **options: Any,
) -> Tensor:
    """With 8-bit weights in Triton-language kernels, else in PyTorch's."""
    if scale is None:
        return _linear(x, weight, bias, norm, residual, **options)
    from inplace.kernels import linear as kernels  # imports Triton

    _check_scale(weight, scale, scale_group)
    spec = kernels.LinearSpec(
        weight.shape[1],
        weight.shape[0],
        bias is not None,
        norm is not None,
        residual is not None,
        scaled=True,
        scale_group=scale_group,
        activation_rows=activation_rows,
        **options,
    )
    tokens = x.numel() // spec.inputs
    dtype = torch.float32 if spec.float_out else x.dtype
    out = x.new_empty((*x.shape[:-1], spec.width), dtype=dtype)
    if tokens:
        size = kernels.linear_workspace(spec, tokens, x.dtype.itemsize)
        kernels.linear(
            spec,
            x=x.contiguous(),
            weight=weight,
            bias=bias,
            norm=norm,
            residual=None if residual is None else residual.contiguous(),
            out=out,
            workspace=x.new_empty(max(1, size), dtype=torch.uint8),
            tokens=tokens,
            scale=scale,
        )
    return out


def _scaled_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    scale_group: int,
    activation_rows: int,
) -> Tensor:
    """The product with 8-bit weights in float32; `linear` says which rows are quantized too."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if 0 < activation_rows <= x.numel() // x.shape[-1]:
        wide = dequantize(*quantize(x, scale_group), scale_group)
    whole = dequantize(weight, scale, scale_group).to(wide.dtype)
    return F.linear(wide, whole, None if bias is None else bias.to(wide.dtype))


def _check_scale(weight: Tensor, scale: Tensor | None, scale_group: int) -> None:
    """Check that 8-bit weights have the scales of their groups.

    Raises:
        RuntimeError: they do not.
    """
    if scale is None:
        torch._check(
            weight.dtype != FLOAT8,
            lambda: f"weight is {weight.dtype}; such weights need a scale",
        )
        return
    expected = (weight.shape[0], num_groups(weight.shape[1], scale_group))
    torch._check(
        weight.dtype == FLOAT8 and scale.dtype == torch.float32 and tuple(scale.shape) == expected,
        lambda: (
            f"weight is {weight.dtype} with scales {tuple(scale.shape)} of {scale.dtype}, expected "
            f"{FLOAT8} with scales {expected} of float32 for groups of {scale_group or 'all'} "
            f"inputs"
        ),
    )


@torch.library.register_fake("inplace::linear", lib=LIBRARY)
def _linear_fake(
    x: Tensor,
    weight: Tensor,
    *others: Tensor | None,
    activation: str = "none",
    gated: bool = False,
    float_out: bool = False,
    scale: Tensor | None = None,
    scale_group: int = 0,
    **numbers: Any,
) -> Tensor:
    _check_scale(weight, scale, scale_group)
    torch._check(
        weight.dim() == 2 and x.shape[-1] == weight.shape[1],
        lambda: f"x {tuple(x.shape)} cannot be multiplied with weight {tuple(weight.shape)}",
    )
    torch._check(
        activation in ACTIVATIONS,
        lambda: f"activation {activation!r} must be one of {ACTIVATIONS}",
    )
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    return x.new_empty((*x.shape[:-1], width), dtype=torch.float32 if float_out else x.dtype)


@torch.library.register_fake("inplace::rms_norm", lib=LIBRARY)
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    torch._check(
        tuple(weight.shape) == (x.shape[-1],),
        lambda: f"norm weight {tuple(weight.shape)} must have the last extent of {tuple(x.shape)}",
    )
    return torch.empty_like(x)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 0.0,
    activation: str = "none",
    gated: bool = False,
    float_out: bool = False,
    scale: Tensor | None = None,
    scale_group: int = 0,
    activation_rows: int = 0,
) -> Tensor:
    """RMS norm, linear layer, activation, gate and residual of one step, each optional.

    With a ``scale``, weights are 8-bit floats. The product is that of ``x`` with
    ``weight * scale``, summed in float32 and rounded once, to x's dtype. In a call with at least
    ``activation_rows`` rows, if that is not 0, the rows of ``x``, after the norm, are replaced by
    8-bit floats first: each in the groups of the weights, as `inplace.operators.float8.quantize`
    rounds them. Nothing else of the call decides it, so all engines do the same.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``; when ``gated``, the first half of its rows is the gate and the second
            half what the gate is multiplied with.
        bias: ``[out]``.
        norm: ``[in]``: weight of an RMS norm of ``x`` before the product, any floating dtype.
        residual: added to the result, of its shape and dtype.
        eps: of the norm.
        activation: one of `ACTIVATIONS`.
        gated: ``activation(first half) * second half``.
        float_out: the result is float32, whatever dtype the weights have.
        scale: ``[out, groups]`` float32, of weights that are float8_e4m3fn.
        scale_group: inputs that share a scale; 0 for all.
        activation_rows: rows from which on activations are 8-bit floats too; 0 for never.

    Returns:
        ``[..., out]``, or ``[..., out / 2]`` when gated.
    """
    out = torch.ops.inplace.linear(
        x,
        weight,
        bias,
        norm,
        residual,
        eps=eps,
        activation=activation,
        gated=gated,
        float_out=float_out,
        scale=scale,
        scale_group=scale_group,
        activation_rows=activation_rows,
    )
    assert isinstance(out, Tensor)
    return out
