"""Normalisations and softmax, computed in float32 as PyTorch does."""

from collections.abc import Sequence

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import argument, only_first_used
from inplace_builder.lower.converters.unsupported import UPDATES_STATISTICS
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


def _only_result(node: Node, ctx: Network) -> str | None:
    """Where the means and deviations, further results, are not used."""
    return only_first_used(node)


@converter(aten.native_layer_norm.default, validator=_only_result)
def native_layer_norm(
    ctx: Network,
    x: ITensor,
    normalized_shape: Sequence[int],
    weight: ITensor | None,
    bias: ITensor | None,
    eps: float,
) -> list[ITensor | None]:
    """Layer norm as core ATen has it."""
    return [layer_norm(ctx, x, normalized_shape, weight, bias, eps), None, None]


@converter(aten._fused_rms_norm.default, validator=_only_result)
def fused_rms_norm(ctx: Network, *arguments: object) -> list[ITensor | None]:
    """RMS norm as PyTorch decomposes it."""
    return [rms_norm(ctx, *arguments), None]  # type: ignore[arg-type]


def _per_channel(ctx: Network, x: ITensor, rank: int) -> ITensor:
    """One number for each channel as ``[1, channels, 1, …]``, in float32."""
    return ctx.reshape(ctx.cast(x, torch.float32), (1, -1, *(1,) * (rank - 2)))


def _channel_affine(
    ctx: Network, value: ITensor, weight: ITensor | None, bias: ITensor | None
) -> ITensor:
    rank = len(value.shape)
    if weight is not None:
        value = ctx.multiply(value, _per_channel(ctx, weight, rank))
    if bias is not None:
        value = ctx.add(value, _per_channel(ctx, bias, rank))
    return value


def _over(ctx: Network, value: ITensor, axes: Sequence[int], eps: float) -> ITensor:
    """Zero mean and unit variance over axes."""
    centred = ctx.subtract(value, ctx.reduce("AVG", value, axes, keep=True))
    variance = ctx.reduce("AVG", ctx.multiply(centred, centred), axes, keep=True)
    root = ctx.unary("SQRT", ctx.add(variance, ctx.scalar(eps, torch.float32)))
    return ctx.elementwise("DIV", centred, root)


def _batch_normalised(
    ctx: Network,
    x: ITensor,
    weight: ITensor | None,
    bias: ITensor | None,
    mean: ITensor | None,
    variance: ITensor | None,
    eps: float,
) -> ITensor:
    """Batch norm by statistics of its own, or by those of the batch where it has none."""
    rank, value = len(x.shape), ctx.cast(x, torch.float32)
    if mean is None or variance is None:
        value = _over(ctx, value, [axis for axis in range(rank) if axis != 1], eps)
    else:
        spread = ctx.add(_per_channel(ctx, variance, rank), ctx.scalar(eps, torch.float32))
        value = ctx.subtract(value, _per_channel(ctx, mean, rank))
        value = ctx.elementwise("DIV", value, ctx.unary("SQRT", spread))
    return ctx.cast(_channel_affine(ctx, value, weight, bias), ctx.dtype_of(x))


def _no_new_statistics(node: Node, ctx: Network) -> str | None:
    """Outside of training, or without running statistics."""
    training = argument(node, 5, "training", False)
    if training and argument(node, 3, "running_mean", None) is not None:
        return UPDATES_STATISTICS
    return None


@converter(aten.batch_norm.default, validator=_no_new_statistics)
def batch_norm(
    ctx: Network,
    x: ITensor,
    weight: ITensor | None,
    bias: ITensor | None,
    mean: ITensor | None,
    variance: ITensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: object,
) -> ITensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` for each channel."""
    return _batch_normalised(ctx, x, weight, bias, mean, variance, eps)


@converter(aten._native_batch_norm_legit_no_training.default, validator=_only_result)
def native_batch_norm(
    ctx: Network,
    x: ITensor,
    weight: ITensor | None,
    bias: ITensor | None,
    mean: ITensor,
    variance: ITensor,
    momentum: float,
    eps: float,
) -> list[ITensor | None]:
    """Batch norm by its own statistics, as core ATen has it."""
    return [_batch_normalised(ctx, x, weight, bias, mean, variance, eps), None, None]


@converter(aten._native_batch_norm_legit.no_stats, validator=_only_result)
def native_batch_norm_without_statistics(
    ctx: Network,
    x: ITensor,
    weight: ITensor | None,
    bias: ITensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> list[ITensor | None]:
    """Batch norm by the statistics of the batch, as core ATen has it."""
    return [_batch_normalised(ctx, x, weight, bias, None, None, eps), None, None]


def _of_the_input(node: Node, ctx: Network) -> str | None:
    """By the input's own statistics, without running ones."""
    if argument(node, 3, "running_mean", None) is None:
        return None
    used = argument(node, 5, "use_input_stats", True)
    return UPDATES_STATISTICS if used else None


@converter(aten.instance_norm.default, validator=_of_the_input)
def instance_norm(
    ctx: Network,
    x: ITensor,
    weight: ITensor | None,
    bias: ITensor | None,
    mean: ITensor | None,
    variance: ITensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *_: object,
) -> ITensor:
    """Zero mean and unit variance over the extents behind the channels."""
    if not use_input_stats:
        return _batch_normalised(ctx, x, weight, bias, mean, variance, eps)
    value = _over(ctx, ctx.cast(x, torch.float32), range(2, len(x.shape)), eps)
    return ctx.cast(_channel_affine(ctx, value, weight, bias), ctx.dtype_of(x))


@converter(aten.group_norm.default)
def group_norm(
    ctx: Network,
    x: ITensor,
    num_groups: int,
    weight: ITensor | None = None,
    bias: ITensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> ITensor:
    """Zero mean and unit variance over groups of channels and the extents behind them."""
    shape = ctx.meta(ctx.node.args[0]).shape
    grouped = ctx.reshape(ctx.cast(x, torch.float32), (0, num_groups, -1))
    value = ctx.reshape(_over(ctx, grouped, [2], eps), shape)
    return ctx.cast(_channel_affine(ctx, value, weight, bias), ctx.dtype_of(x))


@converter(aten.native_group_norm.default, validator=_only_result)
def native_group_norm(
    ctx: Network,
    x: ITensor,
    weight: ITensor | None,
    bias: ITensor | None,
    batch: object,
    channels: object,
    extent: object,
    num_groups: int,
    eps: float,
) -> list[ITensor | None]:
    """Group norm as core ATen has it."""
    return [group_norm(ctx, x, num_groups, weight, bias, eps), None, None]


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
