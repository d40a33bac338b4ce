"""``inplace::linear`` and ``inplace::rms_norm``: a linear layer with its neighbours, and a norm.

Only lowering emits them. They touch no state; they are operators so that a fused graph can be run,
and compared, in PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from inplace.operators.library import LIBRARY, define

ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")
"""What may follow the product.

A gated layer multiplies its activated first half by its second half.
"""


define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm=None, Tensor? residual=None, *, "
    "float eps=0.0, str activation='none', bool gated=False, bool float_out=False) -> Tensor",
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
) -> Tensor:
    out = F.linear(x if norm is None else _rms_norm(x, norm, eps), weight, bias)
    if float_out:
        out = out.float()
    if gated:
        first, second = out.chunk(2, -1)
        out = activate(first, activation) * second
    else:
        out = activate(out, activation)
    return out if residual is None else out + residual


@torch.library.register_fake("inplace::linear", lib=LIBRARY)
def _linear_fake(
    x: Tensor,
    weight: Tensor,
    *others: Tensor | None,
    activation: str = "none",
    gated: bool = False,
    float_out: bool = False,
    **eps: float,
) -> Tensor:
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
) -> Tensor:
    """RMS norm, linear layer, activation, gate and residual of one step, each optional.

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
    )
    assert isinstance(out, Tensor)
    return out
