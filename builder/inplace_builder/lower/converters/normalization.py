"""Normalisations and softmax, computed in float32 as PyTorch does."""

from collections.abc import Sequence

import torch

from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


@converter(aten.layer_norm.default)
def layer_norm(
    ctx: Network,
    x: ITensor,
    normalized_shape: Sequence[int],
    weight: ITensor | None = None,
    bias: ITensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> ITensor:
    """Zero mean and unit variance over the last axes, then scale and shift."""
    axes = _last(x, normalized_shape)
    value = ctx.cast(x, torch.float32)
    centred = ctx.subtract(value, ctx.reduce("AVG", value, axes, keep=True))
    return _scaled(ctx, x, centred, axes, eps, weight, bias)


@converter(aten.rms_norm.default)
def rms_norm(
    ctx: Network,
    x: ITensor,
    normalized_shape: Sequence[int],
    weight: ITensor | None = None,
    eps: float | None = None,
) -> ITensor:
    """Unit root mean square over the last axes, then scale.

    ``eps`` defaults to the machine epsilon of the input's type.
    """
    default = torch.finfo(ctx.dtype_of(x)).eps
    axes = _last(x, normalized_shape)
    return _scaled(
        ctx, x, ctx.cast(x, torch.float32), axes, default if eps is None else eps, weight, None
    )


def _scaled(
    ctx: Network,
    x: ITensor,
    value: ITensor,
    axes: Sequence[int],
    eps: float,
    weight: ITensor | None,
    bias: ITensor | None,
) -> ITensor:
    """``value / sqrt(mean(value²) + eps) * weight + bias``, in the type of ``x``."""
    square = ctx.reduce("AVG", ctx.multiply(value, value), axes, keep=True)
    root = ctx.unary("SQRT", ctx.add(square, ctx.scalar(eps, torch.float32)))
    value = ctx.elementwise("DIV", value, root)
    if weight is not None:
        value = ctx.multiply(value, ctx.cast(weight, torch.float32))
    if bias is not None:
        value = ctx.add(value, ctx.cast(bias, torch.float32))
    return ctx.cast(value, ctx.dtype_of(x))


def _last(x: ITensor, shape: Sequence[int]) -> list[int]:
    rank = len(x.shape)
    return list(range(rank - len(shape), rank))


@converter(aten.softmax.int, aten._softmax.default)
def softmax(ctx: Network, x: ITensor, dim: int, *_: object, **__: object) -> ITensor:
    """Softmax along an axis."""
    return ctx.as_float32(
        lambda value: ctx.softmax(value, dim % len(x.shape)), x, ctx.result().dtype
    )


@converter(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(ctx: Network, x: ITensor, dim: int, *_: object, **__: object) -> ITensor:
    """``x - max - log(sum(exp(x - max)))``: the logarithm of a softmax would lose small values."""
    axis = [dim % len(x.shape)]

    def compute(value: ITensor) -> ITensor:
        shifted = ctx.subtract(value, ctx.reduce("MAX", value, axis, keep=True))
        return ctx.subtract(
            shifted, ctx.unary("LOG", ctx.reduce("SUM", ctx.unary("EXP", shifted), axis, keep=True))
        )

    return ctx.as_float32(compute, x, ctx.result().dtype)
